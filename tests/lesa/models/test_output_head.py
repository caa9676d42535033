"""The cheap ends, read alone from a saved transformer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lesa.models.output_head import load_output_head, output_head_of
from tests.helpers.tiny import tiny_flux


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("flux")
    tiny_flux(made)
    return made


def test_equal_to_the_transformers_own(folder: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    transformer.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    feature, temb = torch.randn(2, 5, 32), torch.randn(2, 32)
    own = output_head_of(transformer)
    assert own.norm_out is transformer.norm_out
    for source in (folder / "transformer", tmp_path / "sharded"):
        head = load_output_head(source)
        assert torch.equal(head(feature, temb), own(feature, temb))
        assert not any(p.requires_grad for p in head.parameters()) and not head.training
        assert {p.device.type for p in head.parameters()} == {"cpu"}
    half = load_output_head(folder / "transformer", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_gradients_reach_the_feature(folder: Path) -> None:
    feature = torch.randn(1, 2, 32, requires_grad=True)
    load_output_head(folder / "transformer")(feature, torch.randn(1, 32)).sum().backward()
    assert feature.grad is not None and feature.grad.abs().sum() > 0


def test_a_folder_without_the_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "transformer/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"proj_out.weight.*are missing; is it a saved transformer"):
        load_output_head(tmp_path)


@pytest.mark.parametrize("name", ["AutoencoderKL", "utils", "__loader__", None])
def test_only_classes_of_the_table_are_built(folder: Path, tmp_path: Path, name: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match="is not in the table of model families"):
        load_output_head(tmp_path)
