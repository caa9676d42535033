"""A few steps of a base model's training, for each data set: the folders it leaves are a pipeline and a scorer."""

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from lesa.params import BaseParams, load_params
from lesa.reference import DATA_SETS, DataSet, load_scorer, train_base

PLAIN = {"flux-digits": "a thin seven", "flux-photos": "a view of the temple, top row, left"}
# Prompts that the encoders must tell apart.
CLOSE = {
    "flux-digits": ["a two", "a three", "a two, black on white", "a two, white on black"],
    "flux-photos": [
        "a view of the temple, top row, left",
        "a view of the flower, top row, left",
        "a view of the temple, top row, far left",
        "a view of the temple, top row, left, mirrored",
    ],
}
WEIGHTS = (
    "base/transformer/diffusion_pytorch_model",
    "base/vae/diffusion_pytorch_model",
    "scorer/weights",
)


def train(
    data_set: DataSet, folder: Path, steps: int = 3
) -> tuple[dict[str, float], list[tuple[int, dict[str, float]]]]:
    reports: list[tuple[int, dict[str, float]]] = []
    metrics = train_base(
        data_set,
        base_dir=folder / "base",
        scorer_dir=folder / "scorer",
        prompts=data_set.language.split_prompts()["train"][:40],
        steps=steps,
        batch_size=8,
        learning_rate=1e-3,
        seed=7,
        device="cpu",
        report=lambda step, values: reports.append((step, values)),
    )
    return metrics, reports


@pytest.fixture(scope="module", params=DATA_SETS.values(), ids=DATA_SETS)
def data_set(request: pytest.FixtureRequest) -> DataSet:
    return request.param


@pytest.fixture(scope="module")
def trained(data_set: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "base").mkdir()
    (folder / "base" / "left over").write_text("replaced with the folder")
    metrics, reports = train(data_set, folder)
    assert set(metrics) == {"vae_psnr", "flow_loss", "scorer_accuracy", "agreement"}
    assert 0 <= metrics["agreement"] <= 1 and metrics["flow_loss"] > 0
    assert {key for _, values in reports for key in values} >= {
        "flow_loss",
        "vae_loss",
        "scorer_loss",
        "text_loss",
    }
    return folder


def test_the_folder_is_a_flux_pipeline(data_set: DataSet, trained: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(trained / "base")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.scheduler.config.use_dynamic_shifting and pipeline.scheduler.config.max_shift == 1.15
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id != 2
    assert pipeline.vae.config.scaling_factor != 1.0
    size = data_set.image_size
    images = pipeline(
        [PLAIN[data_set.name], data_set.language.all_prompts()[0]],
        height=size,
        width=size,
        num_inference_steps=4,
        max_sequence_length=data_set.t5_length,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (2, 3, size, size) and torch.isfinite(images).all()
    assert sorted(p.name for p in trained.iterdir()) == ["base", "scorer"]
    assert not (trained / "base" / "left over").exists()


def test_text_reaches_both_encoders_outputs(data_set: DataSet, trained: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(trained / "base")
    tokens, pooled, _ = pipeline.encode_prompt(CLOSE[data_set.name], max_sequence_length=data_set.t5_length)
    assert tokens.shape == (4, data_set.t5_length, pipeline.transformer.config.joint_attention_dim)
    for first in range(4):
        for second in range(first):
            assert (pooled[first] - pooled[second]).abs().max() > 1e-2
            assert (tokens[first] - tokens[second]).abs().max() > 1e-2


def test_training_is_deterministic(data_set: DataSet, trained: Path, tmp_path: Path) -> None:
    train(data_set, tmp_path)
    for part in WEIGHTS:
        first, second = (load_file(root / f"{part}.safetensors") for root in (trained, tmp_path))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part


def test_without_a_reading_there_is_no_scorer(data_set: DataSet, trained: Path, tmp_path: Path) -> None:
    """No folder of it, and nothing reported that it would measure."""
    metrics, reports = train(dataclasses.replace(data_set, reading=None), tmp_path)
    assert set(metrics) == {"vae_psnr", "flow_loss"}
    assert not any("scorer_loss" in values for _, values in reports)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    FluxPipeline.from_pretrained(tmp_path / "base")


def test_the_scorer_judges_only_what_it_reads(data_set: DataSet, trained: Path) -> None:
    scorer = load_scorer(trained / "scorer")
    size, prompts = data_set.image_size, CLOSE[data_set.name][:3]
    assert scorer.data_set is data_set
    agreed = scorer.agreement(torch.rand(3, 3, size, size), prompts)
    assert agreed.shape == (3,) and agreed.dtype == torch.bool
    with pytest.raises(ValueError, match=rf"reads \[B, 3, {size}, {size}\]"):
        scorer.agreement(torch.rand(1, 3, 32, 32), prompts[:1])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        scorer.agreement(torch.rand(2, 3, size, size), prompts[:1])


def test_a_damaged_scorer_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks scorer.json and weights.safetensors"):
        load_scorer(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes((trained / "scorer" / "weights.safetensors").read_bytes())
    card = json.loads((trained / "scorer" / "scorer.json").read_text())
    (tmp_path / "scorer.json").write_text(json.dumps(card | {"kind": "cat-finder"}))
    with pytest.raises(ValueError, match=r"kind is 'cat-finder', not one of digit-reader, place-reader"):
        load_scorer(tmp_path)
    (tmp_path / "scorer.json").write_text(json.dumps(card | {"image_size": 32, "classes": ["cat"]}))
    with pytest.raises(ValueError, match=r"image_size is 32.*classes is \['cat'\]"):
        load_scorer(tmp_path)
    kinds = {"digit-reader": "place-reader", "place-reader": "digit-reader"}
    (tmp_path / "scorer.json").write_text(json.dumps(card | {"kind": kinds[card["kind"]]}))
    with pytest.raises(ValueError, match=r"image_size is .*classes is "):  # another data set's
        load_scorer(tmp_path)


def test_bad_arguments_are_refused_before_anything_is_written(data_set: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        train_base(
            data_set,
            base_dir=tmp_path / "base",
            scorer_dir=tmp_path / "scorer",
            prompts=["a purple seven"],
            steps=0,
            batch_size=1,
            learning_rate=-1.0,
            seed=0,
            device="cpu",
            report=lambda step, values: None,
        )
    for problem in ("steps is 0", "batch_size is 1", "learning_rate is -1.0", "'purple'"):
        assert problem in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_workload_calls_its_model_at_the_size_it_was_trained_for(data_set: DataSet) -> None:
    root = Path(__file__).parents[3]
    workload = load_params(root / "params.yaml", data_set.name)
    assert workload.base is not None and workload.base.trainer == data_set.name
    assert workload.prompts == data_set.name
    assert workload.call.height == workload.call.width == data_set.image_size
    assert workload.call.max_sequence_length == data_set.t5_length


def test_the_settings_name_every_data_set() -> None:
    assert get_args(get_type_hints(BaseParams)["trainer"]) == tuple(DATA_SETS)
