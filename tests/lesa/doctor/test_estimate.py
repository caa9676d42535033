"""Needs of a workload: computed from shapes, checked against what small models really take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lesa.doctor.estimate import PEAK_FLOPS, UTILISATION, CostEstimate, estimate_costs, full_step_counts
from lesa.doctor.model_size import model_facts
from lesa.models.families import FAMILIES
from lesa.models.pipelines import load_pipeline
from lesa.models.published import PRESETS
from lesa.params import BudgetParams, ScheduleParams, Workload
from lesa.params_file import load_params
from tests.helpers.recording import measured_size
from tests.helpers.tiny import tiny_repository

ROOT = Path(__file__).parents[3]


def published(name: str) -> Workload:
    return load_params(ROOT / "params.yaml", name)


def test_a_folder_is_measured_without_loading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_repository(tmp_path))
    workload = load_params()
    facts = model_facts(workload.name, workload.model, workload.call)
    costs = estimate_costs(workload)
    pipe = load_pipeline(workload.model, workload.resources.device)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert facts.numbers[name] == sum(p.numel() for p in getattr(pipe, name).parameters())
    measured = measured_size(workload, pipe)
    assert (facts.grid, facts.is_local, costs.download) == ((1, 4, 4), True, 0)
    assert costs.store == pytest.approx(measured.bytes(costs.trajectories), rel=0.01)
    assert costs.closed_loop > 0 and costs.gpu > costs.closed_loop


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_published_model_has_a_workload_of_its_size(name: str) -> None:
    workload, preset = published(name), PRESETS[name]
    facts = model_facts(workload.name, workload.model, workload.call)
    assert facts.preset is preset
    assert (facts.grid, facts.text_tokens) == (preset.grid, preset.text_tokens)
    assert FAMILIES[workload.model.family].transformer_class == preset.transformer_class
    assert workload.model.source == (preset.source or f"data/base/{name}")
    assert workload.call.num_inference_steps == preset.num_inference_steps
    assert workload.predictor.rank * 4 == 3072
    costs = estimate_costs(workload)
    calls = preset.branches * preset.num_inference_steps
    assert costs.run_flops / calls / 1e12 == pytest.approx({"flux-dev": 74.38, "flux-schnell": 69.47}.get(
        name, 131.68 if name.startswith("qwen") else 595.43), abs=0.02)  # fmt: skip
    assert costs.store < costs.store_all_tokens
    assert costs.gpu < 141e9  # an H200; what the runbook says of smaller ones is computed here too


def test_hours_are_operations_at_the_stated_rate() -> None:
    costs = estimate_costs(published("flux-dev"))
    record = 288 * 3719.2e12 / (PEAK_FLOPS * UTILISATION) / 3600
    assert costs.hours("record") == pytest.approx(record, rel=1e-3)
    assert costs.hours() == pytest.approx(sum(costs.hours(stage) for stage in costs.flops))
    features = 288 * 50 * 128 * 3072 * 2  # trajectories, steps, kept tokens, channels, bytes
    assert features < costs.store < 1.5 * features
    assert costs.store_all_tokens == pytest.approx(288 * 50 * 4096 * 3072 * 2, rel=0.02)


def test_closed_loop_memory_follows_its_settings() -> None:
    workload = published("flux-dev")

    def closed(**changes: object) -> int:
        loop = dataclasses.replace(workload.closed_loop, **changes)  # type: ignore[arg-type]
        return estimate_costs(dataclasses.replace(workload, closed_loop=loop)).closed_loop

    blocks = 57 * (4096 + 512) * 3072 * 2  # of one step: blocks, tokens, channels, bytes
    assert blocks < closed() < 2.5 * blocks
    assert closed(batch_size=2) == 2 * closed()
    assert closed(gradient_checkpointing=False) > 16 * 10 * blocks  # at every full step, more than its blocks' inputs
    a_trajectory, sums = 50 * 128 * 3072 * 8, 51 * 51 * 3072 * 8  # steps, tokens, channels, bytes
    assert estimate_costs(workload).fitting == 3 * max(a_trajectory, 1 << 28) + 2 * sums
    assert closed(iterations=0) == closed(gradient="drifted_states") == 0


def test_recomputing_makes_memory_independent_of_full_steps_and_keeps_the_transformer_alone() -> None:
    workload = published("qwen-image")

    def costs(num_full: int, **changes: object) -> CostEstimate:
        budgets = {"5x": BudgetParams(full_steps=tuple(range(num_full)))}
        loop = dataclasses.replace(workload.closed_loop, **changes)  # type: ignore[arg-type]
        schedule = dataclasses.replace(workload.schedule, budgets=budgets)
        return estimate_costs(dataclasses.replace(workload, schedule=schedule, closed_loop=loop))

    feature = 2 * 83 * 83 * 3072 * 2  # of both guidance branches, bytes
    assert costs(20).closed_loop - costs(10).closed_loop == 10 * feature
    assert costs(10).loop_weights == costs(10).weights["transformer"]
    kept = costs(10, gradient_checkpointing=False)
    assert kept.loop_weights == sum(kept.weights.values()) and kept.gpu == kept.loop_weights + kept.closed_loop


def test_the_loops_hours_follow_what_its_gradient_goes_through() -> None:
    workload = published("flux-dev")

    def hours(**changes: object) -> float:
        loop = dataclasses.replace(workload.closed_loop, **changes)  # type: ignore[arg-type]
        return estimate_costs(dataclasses.replace(workload, closed_loop=loop)).hours("train_stage2")

    a_forward = hours(model_gradient=0.0)
    half = hours(model_gradient=0.5, gradient_checkpointing=False)  # a half of a backward pass's two
    assert hours(model_gradient=1.0) - a_forward == pytest.approx(4 * (half - a_forward))


def test_full_steps_are_counted_whatever_way_a_budget_is_given() -> None:
    rule = ScheduleParams(
        budgets={"a": BudgetParams(num_full=6), "b": BudgetParams(full_steps=(0, 1, 5)), "c": BudgetParams(interval=7)},
        default_budget="a",
    )
    assert full_step_counts(rule, 50) == {"a": 6, "b": 3, "c": 10}


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    workload = published("flux-dev")
    strange = dataclasses.replace(
        workload, name="mine", model=dataclasses.replace(workload.model, source="someone/model")
    )
    with pytest.raises(ValueError, match="someone/model is no pipeline folder here and none of black-forest-labs"):
        estimate_costs(strange)
    (tmp_path / "model_index.json").write_text("{}")
    broken = dataclasses.replace(strange, model=dataclasses.replace(workload.model, source=str(tmp_path)))
    with pytest.raises(ValueError, match="transformer/config.json does not exist"):
        estimate_costs(broken)


def damaged_vae(folder: Path) -> None:
    (folder / "vae/config.json").write_text("{}")


def damaged_config(folder: Path) -> None:
    path = folder / "transformer/config.json"
    path.write_text(path.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": "two"'))


def other_family(folder: Path) -> None:
    path = folder / "transformer/config.json"
    path.write_text(path.read_text().replace("FluxTransformer2DModel", "QwenImageTransformer2DModel"))


def torn_header(folder: Path) -> None:
    path = next(folder.glob("transformer/*.safetensors"))
    path.write_bytes(path.read_bytes()[:5])


def torn_weights(folder: Path) -> None:
    path = next(folder.glob("transformer/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def strange_header(folder: Path) -> None:
    next(folder.glob("transformer/*.safetensors")).write_bytes(b"\x03" + bytes(7) + b"[1]")


def no_weights(folder: Path) -> None:
    next(folder.glob("transformer/*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_vae, "vae/config.json: says nothing of how much smaller"),
        (damaged_config, "transformer/config.json: no FluxTransformer2DModel can be made from it"),
        (other_family, "got 'QwenImageTransformer2DModel', the workload's family has 'FluxTransformer2DModel'"),
        (torn_header, "not a safetensors file, or a torn one"),
        (torn_weights, "not a safetensors file, or a torn one .* bytes, its header says"),
        (strange_header, "not a safetensors file, or a torn one"),
        (no_weights, "transformer: no weights in safetensors files"),
    ],
)
def test_a_damaged_folder_is_refused_in_words(
    damage: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_repository(tmp_path))
    workload = load_params()
    damage(Path(workload.model.source))
    with pytest.raises(ValueError, match=words):
        estimate_costs(workload)


def test_numbers_are_finite() -> None:
    for name in PRESETS:
        values = estimate_costs(published(name)).to_dict()["gpu_hours"].values()
        assert all(math.isfinite(value) and value >= 0 for value in values)
