"""A few steps of the base model's training: the folders it leaves are a pipeline and a scorer."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from lesa.reference import load_scorer, train_flux_digits
from lesa.reference.prompts import split_prompts
from lesa.reference.tokenizers import T5_LENGTH

PROMPTS = split_prompts()["train"][:40]


def train(folder: Path, steps: int = 3) -> tuple[dict[str, float], list[tuple[int, dict[str, float]]]]:
    reports: list[tuple[int, dict[str, float]]] = []
    metrics = train_flux_digits(
        base_dir=folder / "base",
        scorer_dir=folder / "scorer",
        prompts=PROMPTS,
        steps=steps,
        batch_size=8,
        learning_rate=1e-3,
        seed=7,
        device="cpu",
        report=lambda step, values: reports.append((step, values)),
    )
    return metrics, reports


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "base").mkdir()
    (folder / "base" / "left over").write_text("replaced with the folder")
    metrics, reports = train(folder)
    assert set(metrics) == {"vae_psnr", "flow_loss", "scorer_accuracy", "agreement"}
    assert 0 <= metrics["agreement"] <= 1 and metrics["flow_loss"] > 0
    assert {key for _, values in reports for key in values} >= {
        "flow_loss",
        "vae_loss",
        "scorer_loss",
        "text_loss",
    }
    return folder


def test_the_folder_is_a_flux_pipeline(trained: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(trained / "base")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.scheduler.config.use_dynamic_shifting and pipeline.scheduler.config.max_shift == 1.15
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id != 2
    assert pipeline.vae.config.scaling_factor != 1.0
    images = pipeline(
        ["a thin seven", PROMPTS[0]],
        height=16,
        width=16,
        num_inference_steps=4,
        max_sequence_length=T5_LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (2, 3, 16, 16) and torch.isfinite(images).all()
    assert sorted(p.name for p in trained.iterdir()) == ["base", "scorer"]
    assert not (trained / "base" / "left over").exists()


def test_text_reaches_both_encoders_outputs(trained: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(trained / "base")
    tokens, pooled, _ = pipeline.encode_prompt(
        ["a two", "a three", "a two, black on white", "a two, white on black"], max_sequence_length=T5_LENGTH
    )
    assert tokens.shape == (4, T5_LENGTH, pipeline.transformer.config.joint_attention_dim)
    for first in range(4):
        for second in range(first):
            assert (pooled[first] - pooled[second]).abs().max() > 1e-2
            assert (tokens[first] - tokens[second]).abs().max() > 1e-2


def test_training_is_deterministic(trained: Path, tmp_path: Path) -> None:
    train(tmp_path)
    for part in (
        "base/transformer/diffusion_pytorch_model",
        "base/vae/diffusion_pytorch_model",
        "scorer/weights",
    ):
        first, second = (load_file(root / f"{part}.safetensors") for root in (trained, tmp_path))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part


def test_the_scorer_judges_only_what_it_reads(trained: Path) -> None:
    scorer = load_scorer(trained / "scorer")
    agreed = scorer.agreement(torch.rand(3, 3, 16, 16), ["a two", "a three", "a bold four, top left"])
    assert agreed.shape == (3,) and agreed.dtype == torch.bool
    with pytest.raises(ValueError, match=r"reads \[B, 3, 16, 16\]"):
        scorer.agreement(torch.rand(1, 3, 32, 32), ["a two"])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        scorer.agreement(torch.rand(2, 3, 16, 16), ["a two"])


def test_a_damaged_scorer_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks scorer.json and weights.safetensors"):
        load_scorer(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes((trained / "scorer" / "weights.safetensors").read_bytes())
    card = json.loads((trained / "scorer" / "scorer.json").read_text())
    (tmp_path / "scorer.json").write_text(json.dumps(card | {"kind": "cat-finder", "image_size": 32}))
    with pytest.raises(ValueError, match=r"kind is 'cat-finder'.*image_size is 32"):
        load_scorer(tmp_path)


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        train_flux_digits(
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
