"""The table of model families."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from lesa.models.families import FAMILIES, BlockList, Family, blocks, family_of, register_family
from lesa.models.published import PRESETS, family_flops
from tests.helpers.tiny import tiny_flux


def test_blocks_come_in_execution_order_and_the_last_is_the_tail(tmp_path: Path) -> None:
    transformer = tiny_flux(tmp_path, num_layers=2, num_single_layers=3).transformer
    family = family_of(transformer)
    assert family.name == "flux" and family.branches == ("denoise",)
    rows = blocks(transformer, family)
    assert [name for name, _, _ in rows] == [
        *(f"transformer_blocks.{i}" for i in range(2)),
        *(f"single_transformer_blocks.{i}" for i in range(3)),
    ]
    called: list[str] = []
    for name, block, _ in rows:
        block.register_forward_hook(lambda *_, name=name: called.append(name))
    transformer(
        hidden_states=torch.zeros(1, 4, 16),
        encoder_hidden_states=torch.zeros(1, 2, 16),
        pooled_projections=torch.zeros(1, 16),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(2, 3),
    )
    assert called == [name for name, _, _ in rows]
    assert rows[-1][1] is transformer.single_transformer_blocks[-1]


def test_every_row_names_classes_diffusers_has() -> None:
    for row in FAMILIES.values():
        assert issubclass(getattr(diffusers, row.transformer_class), nn.Module)
        for name in row.pipeline_classes + row.related_pipelines + row.other_pipelines:
            assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)


def test_published_models_have_the_steps_and_branches_of_the_paper() -> None:
    assert {name: (preset.num_inference_steps, preset.branches) for name, preset in PRESETS.items()} == {
        "flux-dev": (50, 1),
        "flux-schnell": (4, 1),
        "qwen-image": (50, 2),
        "qwen-image-lightning": (8, 1),
        "hunyuan-video": (50, 1),
    }
    assert PRESETS["hunyuan-video"].call.num_frames == 65
    with pytest.raises(ValueError, match="'flux-pro' is not one of .*: flux-dev, flux-schnell"):
        family_flops("flux-pro")


def test_published_models_have_their_grids_and_families() -> None:
    assert {name: (preset.grid, preset.size) for name, preset in PRESETS.items()} == {
        "flux-dev": ((1, 64, 64), "1024x1024"),
        "flux-schnell": ((1, 64, 64), "1024x1024"),
        "qwen-image": ((1, 83, 83), "1328x1328"),
        "qwen-image-lightning": ((1, 83, 83), "1328x1328"),
        "hunyuan-video": ((17, 30, 40), "480x640, 65 frames"),
    }
    classes = {row.transformer_class for row in FAMILIES.values()}
    assert {preset.transformer_class for preset in PRESETS.values()} == classes


def test_pipelines_are_related_by_the_weights_and_tokens_they_share() -> None:
    flux = FAMILIES["flux"]
    assert flux.are_related("FluxImg2ImgPipeline", "FluxPipeline")
    assert not flux.are_related("FluxKontextPipeline", "FluxPipeline")
    assert not flux.are_related("QwenImagePipeline", "FluxPipeline")


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "WanTransformer3DModel"])
def test_families_that_fit_no_row_are_refused_with_the_table(name: str) -> None:
    with torch.device("meta"):
        transformer = getattr(diffusers, name)(num_layers=1)
    with pytest.raises(ValueError, match=rf"{name} is not in the table.*hunyuan-video"):
        family_of(transformer)


def test_an_unknown_transformer_is_refused_with_the_table() -> None:
    with pytest.raises(ValueError, match=r"Linear is not in the table.*FluxTransformer2DModel \(flux\)"):
        family_of(nn.Linear(1, 1))


def test_a_family_from_outside() -> None:
    class OwnTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    row = Family(
        name="own",
        transformer_class="OwnTransformer",
        pipeline_classes=(),
        block_lists=(BlockList(attribute="layers", hidden_index=0, encoder_index=None),),
    )
    register_family(row)
    try:
        transformer = OwnTransformer()
        assert family_of(transformer) is row
        assert [name for name, _, _ in blocks(transformer, row)] == ["layers.0", "layers.1"]
        with pytest.raises(ValueError, match="'own' is in the table already"):
            register_family(row)
    finally:
        del FAMILIES["own"]
