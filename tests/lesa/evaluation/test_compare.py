from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lesa.evaluation import compare as compare_module
from lesa.evaluation.compare import TuneJob, compare, evaluate_methods, evaluate_workload, one_by_one, tune
from lesa.evaluation.measure import samples
from lesa.evaluation.table import format_table
from lesa.params import BudgetParams, ModelParams, RecordParams, ScheduleParams, Workload
from lesa.peers.rules import rule_method
from lesa.recording.prompts import PromptError, prompt_digests
from lesa.sampling.checks import MismatchError
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL, NUM_STEPS, extrapolating, make_bundle
from tests.helpers.evaluation import BUDGETS, SETTINGS, pipeline, results, sigmas
from tests.helpers.tiny import tiny_flux

PEERS = {
    "reuse",
    "taylor1",
    "taylor2",
    "taylor1_own",
    "euler",
    "adams_bashforth2",
    "first_block_cache",
    "mag_cache",
}


def test_samples_pair_prompts_with_seeds_of_their_own() -> None:
    prompts, seeds = samples(["a", "b", "c"], 2, 100)
    assert prompts == ["a", "a", "b", "b", "c", "c"]
    assert seeds == [100, 101, 102, 103, 104, 105]
    with pytest.raises(ValueError, match="seeds_per_prompt"):
        samples(["a"], 0, 0)


def test_every_peer_is_measured_at_every_budget() -> None:
    found = results()
    assert found.budgets == tuple(BUDGETS)
    for budget, schedule in BUDGETS.items():
        rows = {row.method: row for row in found.at(budget)}
        assert PEERS - {"taylor1_own"} <= rows.keys() and "lesa" in rows
        for row in rows.values():
            assert len(found.values(budget, row.method)) == 4
            assert row.psnr.low <= row.psnr.mean <= row.psnr.high
            assert row.psnr.mean == pytest.approx(found.values(budget, row.method).mean())
            assert 0 < row.ssim.mean <= 1 and row.psnr.p5 <= row.psnr.mean
            assert row.wall_clock_ratio is not None and row.wall_clock_ratio > 0
            assert row.flops_ratio is not None and row.flops_ratio > 0.9
            assert row.agreement is not None and row.converged_psnr is not None
            if row.kind in ("lesa", "rule", "solver"):
                assert row.computed_steps == schedule.num_full
                assert row.step_ratio == pytest.approx(schedule.ratio)
        assert (rows["lesa"].bytes_kept or 0) > (rows["reuse"].bytes_kept or 0) > 0


def test_features_are_compared_step_by_step_where_steps_are_the_same() -> None:
    found = results()
    row = found.row("1.67x", "taylor1")
    assert row.feature_error_by_step is not None and len(row.feature_error_by_step) == NUM_STEPS
    warmup = BUDGETS["1.67x"].full_steps[:4]
    assert all(row.feature_error_by_step[step] == 0.0 for step in warmup)
    predicted = [row.feature_error_by_step[step] for step in BUDGETS["1.67x"].predicted_steps]
    assert row.feature_error == pytest.approx(np.mean(predicted)) and min(predicted) > 0
    assert found.row("1.67x", "euler").feature_error_by_step is None


def test_extrapolation_in_sigma_and_in_steps_are_near_each_other_and_beat_reuse() -> None:
    """Sanity of the whole chain: on a smooth model first order is closer than no order."""
    found = results()
    mean = {name: found.row("1.67x", name).psnr.mean for name in ("lesa", "taylor1", "reuse")}
    assert mean["lesa"] > mean["reuse"] and mean["taylor1"] > mean["reuse"]


def test_differences_are_paired_and_antisymmetric() -> None:
    found = results()
    gain = found.difference("1.67x", "lesa", "reuse")
    values = found.values("1.67x", "lesa") - found.values("1.67x", "reuse")
    assert gain.mean == pytest.approx(values.mean()) and gain.low <= gain.mean <= gain.high
    assert found.difference("1.67x", "reuse", "lesa").mean == pytest.approx(-gain.mean)
    assert found.differences("1.67x").keys() == {row.method for row in found.at("1.67x")} - {"lesa"}
    assert len(found.values("1.67x", "lesa", "converged_psnr")) == len(found.converged_indices) == 2
    with pytest.raises(KeyError, match="nobody"):
        found.row("1.67x", "nobody")


def test_json_is_plain_and_complete() -> None:
    found = results()
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["schema"] == 1 and len(document["rows"]) == len(found.rows)
    assert document["plain"]["converged_psnr"]["mean"] > 0
    assert len(document["alphas"]["1.67x"]["lesa"]) == NUM_STEPS
    assert document["alphas"]["1.67x"]["lesa"][0] is None  # a full step has no prediction
    against = {d["against"] for d in document["differences"] if d["metric"] == "psnr"}
    assert PEERS <= against
    metrics = json.loads(json.dumps(found.metrics(), allow_nan=False))
    assert metrics["budgets"]["1.67x"]["lesa"]["psnr"]["p5"] == found.row("1.67x", "lesa").psnr.p5
    for row in found.rows:
        share = float((found.values(row.budget, row.method) < 30.0).mean())
        assert metrics["budgets"][row.budget][row.method]["outlier_share"]["mean"] == share == row.outliers.mean
    assert metrics["budgets"]["1.67x"]["lesa"]["psnr_gain"]["reuse"]["low"] is not None


def test_the_table_names_everything() -> None:
    text = format_table(results())
    for row in results().rows:
        assert row.label in text
    assert "6 full of 10 steps" in text and "4 samples of 2 prompts" in text


def test_a_run_with_every_step_full_is_at_the_cap() -> None:
    methods = [rule_method("taylor1", "1x", Schedule.uniform(NUM_STEPS, 1))]
    settings = dataclasses.replace(SETTINGS, converged_fraction=0.0)
    found = evaluate_methods(
        pipeline(), methods, *samples(["a dog"], 2, 0), call=CALL, settings=settings, timing=False
    )
    row = found.row("1x", "taylor1")
    assert row.psnr.mean == 80.0 and row.ssim.mean == pytest.approx(1.0)
    assert row.wall_clock_ratio is None and row.converged_psnr is None and row.agreement is None
    assert row.feature_error_by_step == (0.0,) * NUM_STEPS and row.feature_error is not None
    json.dumps(found.to_json(), allow_nan=False)
    assert "taylor1" not in format_table(found) and row.label in format_table(found)


def test_what_cannot_be_judged_is_refused_with_every_reason() -> None:
    method = rule_method("reuse", "b", BUDGETS["1.67x"])
    with pytest.raises(ValueError, match=r"(?s)2 prompts and 1 seeds.*reuse at b"):
        evaluate_methods(pipeline(), [method, method], ["a", "b"], [1], call=CALL, settings=SETTINGS)
    with pytest.raises(ValueError, match="seeds: one is there twice"):
        evaluate_methods(pipeline(), [method], ["a", "b"], [1, 1], call=CALL, settings=SETTINGS)


def test_a_bundle_is_compared_at_its_budgets(tmp_path: Path) -> None:
    pipe = pipeline()
    bundle = make_bundle(pipe, tmp_path / "bundle")
    settings = dataclasses.replace(SETTINGS, converged_fraction=0.0, batch_size=1)
    found = compare(bundle, pipe, ["a thin seven", "a dog"], 1, 900, settings=settings)
    assert set(found.budgets) == set(bundle.manifest.budgets)
    assert found.about["bundle"] == bundle.digest
    assert not any(row.method.startswith("mag_cache") for row in found.rows)  # nothing to tune on
    assert found.row("1.67x", "lesa").computed_steps == 6
    with pytest.raises(MismatchError):
        compare(bundle, tiny_flux(seed=1), ["a dog"], 1, 900, settings=settings)
    with pytest.raises(PromptError, match="both judged and tuned on"):
        compare(bundle, pipe, ["a dog"], 1, 900, settings=settings, tuning_prompts=["a dog"])
    manifest = dataclasses.replace(
        bundle.manifest,
        data={**bundle.manifest.data, "training": {"prompt_digests": prompt_digests(["a dog"])}},
    )
    with pytest.raises(PromptError, match="1 of 2 prompts were trained on"):
        compare(
            dataclasses.replace(bundle, manifest=manifest), pipe, ["a cat", "a dog"], 1, 0, settings=settings
        )


def test_a_workload_is_judged_on_its_test_prompts_and_reported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/prompts/tiny"
    folder.mkdir(parents=True)
    for split, lines in (
        ("train", ["a red house", "a cat"]),
        ("validation", ["a dog"]),
        ("test", ["one", "two"]),
    ):
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    workload = Workload(
        name="tiny",
        model=ModelParams(family="flux", source="data/base/tiny"),
        call=CALL,
        prompts="tiny",
        schedule=ScheduleParams(budgets={"1.67x": BudgetParams(interval=3)}, default_budget="1.67x"),
        record=RecordParams(train_prompts=2, validation_prompts=1),
        evaluate=dataclasses.replace(SETTINGS, seeds_per_prompt=1, seed_offset=50, converged_fraction=0.0),
    )
    pipeline().save_pretrained(tmp_path / "data/base/tiny")
    predictor = extrapolating(pipeline().transformer.inner_dim, sigmas(), BUDGETS["1.67x"])
    asked: list[str] = []

    def noting(work: Any, workload: Workload, jobs: Mapping[str, Any]) -> dict[str, Any]:
        asked.extend(jobs)
        return one_by_one(work, workload, jobs)

    found = evaluate_workload(workload, {"lesa": predictor, "lesa_ground_truth": predictor}, run=noting)
    assert set(found.prompts) == {"one", "two"} and found.seeds == (50, 51)
    assert asked == ["first_block_cache mag_cache", "part0"]
    assert {row.method for row in found.at("1.67x")} >= PEERS - {"taylor1_own"}
    twin = found.difference("1.67x", "lesa", "lesa_ground_truth")
    assert (twin.mean, twin.low, twin.high) == (0.0, 0.0, 0.0)
    page = tmp_path / "data/reports/tiny/index.html"
    assert "LESA, ground truth only" in page.read_text()
    few = dataclasses.replace(workload, evaluate=dataclasses.replace(workload.evaluate, prompts=3))
    with pytest.raises(PromptError, match="3 test prompts are wanted"):
        evaluate_workload(few, {"lesa": predictor})


@dataclasses.dataclass
class Set:
    """A workload of three splits, and what its caches were tuned with."""

    workload: Workload
    tuned: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@pytest.fixture
def three_splits(monkeypatch: pytest.MonkeyPatch) -> Set:
    workload = Workload(
        name="tiny",
        model=ModelParams(family="flux", source="data/base/tiny"),
        call=CALL,
        prompts="tiny",
        schedule=ScheduleParams(budgets={"1.67x": BudgetParams(interval=3)}, default_budget="1.67x"),
        record=RecordParams(train_prompts=2, validation_prompts=2, seed_offset=7000),
        evaluate=dataclasses.replace(SETTINGS, seeds_per_prompt=1, seed_offset=50),
    )
    splits = {"train": ["learned", "learnt"], "validation": ["chosen", "picked"], "test": ["judged", "weighed"]}
    made = Set(workload)

    def tuned(pipe: Any, ours: Any, **given: Any) -> list[Any]:
        made.tuned.append(given)
        return []

    monkeypatch.setattr(compare_module, "read_splits", lambda folder: splits)
    monkeypatch.setattr(compare_module, "load_pipeline", lambda model, device: None)
    monkeypatch.setattr(compare_module, "tuned_caches", tuned)
    return made


def test_caches_are_tuned_on_training_prompts_with_training_noise(three_splits: Set) -> None:
    predictor = extrapolating(8, torch.linspace(1, 0, NUM_STEPS + 1), BUDGETS["1.67x"])
    job = TuneJob(caches=("mag_cache",), predictor=predictor)
    assert tune(three_splits.workload, job, lambda *_: None) == []
    (given,) = three_splits.tuned
    assert (given["prompts"], given["seeds"]) == (["learned", "learnt"], [7000, 7001])


def test_a_workload_s_jobs_are_of_test_prompts_and_of_the_second_step_s_predictor(three_splits: Set) -> None:
    levels = torch.linspace(1, 0, NUM_STEPS + 1)
    predictors = {name: extrapolating(8, levels, BUDGETS["1.67x"]) for name in ("lesa", "lesa_ground_truth")}
    asked: list[Any] = []

    class Enough(Exception):
        pass

    def run(work: Any, workload: Workload, jobs: Mapping[str, Any]) -> dict[str, Any]:
        asked.extend(jobs.values())
        if work is not tune:
            raise Enough
        return {name: [] for name in jobs}

    with pytest.raises(Enough):
        evaluate_workload(three_splits.workload, predictors, run=run)
    first, *measuring = asked
    assert first.predictor is predictors["lesa"]
    assert [(job.prompts, job.seeds) for job in measuring] == [(["judged", "weighed"], [50, 51])]


def test_a_comparison_tunes_on_noise_that_it_does_not_judge_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(compare_module, "enable", lambda pipe, bundle: None)
    monkeypatch.setattr(compare_module, "disable", lambda pipe: None)
    monkeypatch.setattr(compare_module, "default_methods", lambda *_, **given: asked.update(given) or [])
    monkeypatch.setattr(compare_module, "evaluate_methods", lambda pipe, methods, texts, seeds, **_: seeds)
    manifest = SimpleNamespace(data={}, budgets={}, call=CALL, workload="tiny", default_budget="2x")
    bundle: Any = SimpleNamespace(manifest=manifest, predictor=None, digest="")
    seeds: Any = compare(bundle, None, ["a dog", "a cat"], 2, 900, tuning_prompts=["one", "two", "three"])
    assert seeds == [900, 901, 902, 903] and len(set(asked["tuning_seeds"])) == 3
    assert not set(seeds) & set(asked["tuning_seeds"]) and asked["tuning_prompts"] == ["one", "two", "three"]
