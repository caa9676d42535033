"""The table of model families: everything that differs between transformers is a row here, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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
    pipeline_classes: tuple[str, ...]
    block_lists: tuple[BlockList, ...]
    embedders: tuple[str, ...] = ()  # modules whose output nothing but the blocks reads
    branches: tuple[str, ...] = ("denoise",)  # calls of the transformer per step, in the pipeline's order
    guidance_argument: str = "guidance_scale"  # the pipeline argument that carries the guidance


_FLUX_PIPELINES = tuple(
    f"Flux{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "Kontext", "Fill", "ControlNet", "Control")
)

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="flux",
            transformer_class="FluxTransformer2DModel",
            pipeline_classes=_FLUX_PIPELINES,
            block_lists=(
                BlockList(attribute="transformer_blocks", hidden_index=1, encoder_index=0),
                BlockList(attribute="single_transformer_blocks", hidden_index=1, encoder_index=0),
            ),
            embedders=("x_embedder", "context_embedder"),
        ),
        Family(
            name="qwen-image",
            transformer_class="QwenImageTransformer2DModel",
            pipeline_classes=("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
            block_lists=(BlockList(attribute="transformer_blocks", hidden_index=1, encoder_index=0),),
            embedders=("img_in", "txt_in"),
            branches=("cond", "uncond"),
            guidance_argument="true_cfg_scale",
        ),
        Family(
            name="hunyuan-video",
            transformer_class="HunyuanVideoTransformer3DModel",
            pipeline_classes=("HunyuanVideoPipeline",),
            block_lists=(
                BlockList(attribute="transformer_blocks", hidden_index=0, encoder_index=1),
                BlockList(attribute="single_transformer_blocks", hidden_index=0, encoder_index=1),
            ),
            embedders=("x_embedder", "context_embedder"),
        ),
    )
}


def register_family(row: Family) -> None:
    """Add a family from outside; a name that is taken is refused with `ValueError`."""
    if row.name in FAMILIES:
        raise ValueError(f"family {row.name!r} is in the table already; choose another name")
    FAMILIES[row.name] = row


def family_of(transformer: torch.nn.Module) -> Family:
    """The row of a transformer; `ValueError` with the list when there is none."""
    name = type(getattr(transformer, "_orig_mod", transformer)).__name__
    for row in FAMILIES.values():
        if row.transformer_class == name:
            return row
    known = ", ".join(f"{row.transformer_class} ({row.name})" for row in FAMILIES.values())
    raise ValueError(
        f"{name} is not in the table of model families: {known}. Add a row with lesa.families.register_family"
    )


def blocks(transformer: torch.nn.Module, family: Family) -> list[tuple[str, Any, BlockList]]:
    """Name, module and output order of every block in execution order; the last one is the tail."""
    return [
        (f"{row.attribute}.{index}", block, row)
        for row in family.block_lists
        for index, block in enumerate(getattr(transformer, row.attribute))
    ]
