"""The table of model families: everything that differs between transformers is a row here, and nowhere else.

What is not here does not fit a row (read at diffusers 0.42.1):
    FLUX.2           its last blocks return text and image in one tensor, which the model splits afterwards
    Wan 2.1, 2.2     ends in a scale and shift of its own, not in norm_out(feature, temb); 2.2 has two transformers
    HunyuanVideo Framepack, Qwen-Image-Layered   several sections or layers share one run's tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lesa.errors import LesaError

if TYPE_CHECKING:
    import torch  # settings name families; reading them takes no second of it


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the tokens of the image being made lie."""

    frames: int
    rows: int  # in tokens or, where the transformer makes the tokens itself, in latents
    columns: int
    latents_per_side: int  # 2 where 2 x 2 latents are packed into a token, 1 for latents
    num_tokens: int | None  # how many leading image tokens they are; None: all of them


def by_ids(given: Mapping[str, Any]) -> Grid | None:
    """FLUX: `img_ids` [L, 3] of image, row and column; the image being made is number 0 and comes first."""
    import torch

    ids = given.get("img_ids")
    if not isinstance(ids, torch.Tensor):
        return None
    flat = ids[0] if ids.ndim == 3 else ids
    own = flat[flat[:, 0] == 0]
    rows, columns = (own[:, 1:3].amax(dim=0) + 1).int().tolist()
    return Grid(1, rows, columns, 2, len(own))


def by_shapes(given: Mapping[str, Any]) -> Grid | None:
    """Qwen-Image: `img_shapes`, a list of (frames, rows, columns) a sample, the image being made first."""
    shapes = given.get("img_shapes")
    if not shapes:
        return None
    first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
    frames, rows, columns = (int(size) for size in first)
    return Grid(frames, rows, columns, 2, frames * rows * columns)


def by_latents(given: Mapping[str, Any]) -> Grid | None:
    """Video transformers that are given the latents themselves, `hidden_states` [B, C, F, H, W]."""
    import torch

    latents = given.get("hidden_states")
    if not (isinstance(latents, torch.Tensor) and latents.ndim == 5):
        return None
    frames, rows, columns = latents.shape[2:]
    return Grid(frames, rows, columns, 1, None)


TAP = "image tokens after the last block, before norm_out"  # the only feature this project predicts


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A list of blocks on the transformer, in execution order."""

    attribute: str  # name of the ModuleList
    hidden_index: int  # where a block's output tuple holds the image tokens
    encoder_index: int | None  # where it holds the text tokens; None when the block returns one tensor


@dataclass(frozen=True, kw_only=True)
class Family:
    """How diffusers runs one kind of transformer."""

    name: str
    transformer_class: str
    pipeline_classes: tuple[str, ...]  # called with prompts alone: what a workload records, trains and judges
    # The same weights on the same tokens, with input images too: these take a bundle of `pipeline_classes` when asked.
    related_pipelines: tuple[str, ...] = ()
    # Weights or tokens of their own: these take a bundle of their own class only.
    other_pipelines: tuple[str, ...] = ()
    block_lists: tuple[BlockList, ...]
    embedders: tuple[str, ...] = ()  # modules whose output only the blocks read
    branches: tuple[str, ...] = ("denoise",)  # calls of the transformer per step, in the pipeline's order
    timestep_factor: float = 1.0  # what the transformer is given, over the scheduler's timestep
    guidance_factor: float = 1.0  # what the transformer is given as guidance, over the pipeline's argument
    grid: Callable[[Mapping[str, Any]], Grid | None] | None = None  # where the image's tokens lie, from the arguments
    pads_to_longest: bool = False  # a call's prompts get as many text tokens as the longest of them

    def are_related(self, pipeline_class: str, other: str) -> bool:
        """Whether a predictor made with one of the two pipelines sees the same features in the other."""
        group = self.pipeline_classes + self.related_pipelines
        return pipeline_class in group and other in group


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="flux",
            transformer_class="FluxTransformer2DModel",
            pipeline_classes=("FluxPipeline",),
            related_pipelines=(
                "FluxImg2ImgPipeline",
                "FluxInpaintPipeline",
                "FluxControlNetPipeline",
                "FluxControlNetImg2ImgPipeline",
                "FluxControlNetInpaintPipeline",
            ),
            other_pipelines=("FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline"),
            block_lists=(
                BlockList(attribute="transformer_blocks", hidden_index=1, encoder_index=0),
                BlockList(attribute="single_transformer_blocks", hidden_index=1, encoder_index=0),
            ),
            embedders=("x_embedder", "context_embedder"),
            timestep_factor=1e-3,
            grid=by_ids,
        ),
        Family(
            name="qwen-image",
            transformer_class="QwenImageTransformer2DModel",
            pipeline_classes=("QwenImagePipeline",),
            related_pipelines=(
                "QwenImageImg2ImgPipeline",
                "QwenImageInpaintPipeline",
                "QwenImageControlNetPipeline",
            ),
            other_pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
            block_lists=(BlockList(attribute="transformer_blocks", hidden_index=1, encoder_index=0),),
            embedders=("img_in", "txt_in"),
            branches=("cond", "uncond"),
            timestep_factor=1e-3,
            grid=by_shapes,
            pads_to_longest=True,
        ),
        Family(
            name="hunyuan-video",
            transformer_class="HunyuanVideoTransformer3DModel",
            pipeline_classes=("HunyuanVideoPipeline",),
            other_pipelines=("HunyuanSkyreelsImageToVideoPipeline",),
            block_lists=(
                BlockList(attribute="transformer_blocks", hidden_index=0, encoder_index=1),
                BlockList(attribute="single_transformer_blocks", hidden_index=0, encoder_index=1),
            ),
            embedders=("x_embedder", "context_embedder"),
            guidance_factor=1000.0,
            grid=by_latents,
        ),
    )
}


def register_family(row: Family) -> None:
    """Add a family from outside; a name that is taken is refused with `ValueError`."""
    if row.name in FAMILIES:
        raise LesaError(f"family {row.name!r} is in the table already; choose another name")
    FAMILIES[row.name] = row


def family_of(transformer: torch.nn.Module) -> Family:
    """The row of a transformer; `ValueError` with the list when there is none."""
    name = type(getattr(transformer, "_orig_mod", transformer)).__name__
    for row in FAMILIES.values():
        if row.transformer_class == name:
            return row
    known = ", ".join(f"{row.transformer_class} ({row.name})" for row in FAMILIES.values())
    raise LesaError(
        f"{name} is not in the table of model families: {known}. Add a row with lesa.models.families.register_family"
    )


def blocks(transformer: torch.nn.Module, family: Family) -> list[tuple[str, Any, BlockList]]:
    """Name, module and output order of every block in execution order; the last one is the tail."""
    return [
        (f"{row.attribute}.{index}", block, row)
        for row in family.block_lists
        for index, block in enumerate(getattr(transformer, row.attribute))
    ]
