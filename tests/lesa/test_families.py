"""The table of model families."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from lesa.families import FAMILIES, BlockList, Family, blocks, family_of, register_family
from tests.tiny import tiny_flux


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
        for name in row.pipeline_classes:
            assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)


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
