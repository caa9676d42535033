"""Full steps by need, calibrated on recorded training runs of a real pipeline, and published with the bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import lesa
from lesa.bundle import load_bundle
from lesa.difficulty import pooled
from lesa.fit_difficulty import first_features, fit_difficulty
from lesa.hook import LesaCacheConfig, apply_lesa_cache, is_lesa_cache_enabled, remove_lesa_cache
from lesa.jobs import recorded_splits
from lesa.make_bundle import make_bundle
from lesa.metrics import psnr
from lesa.moving_rule import MovingRule
from lesa.params import BudgetParams, load_params
from lesa.pipelines import load_pipeline, sample
from lesa.record import record_all
from lesa.store import TrajectoryStore
from lesa.training import untrained_predictor
from tests.tiny import tiny_repository

BUDGETS = {"4x": (0, 1), "2.67x": (0, 1, 4), "2x": (0, 1, 3, 5), "1.6x": (0, 1, 2, 4, 6)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_repository(tmp_path_factory.mktemp("repository")))
        workload = load_params()
        schedule = dataclasses.replace(
            workload.schedule,
            budgets={name: BudgetParams(full_steps=steps) for name, steps in BUDGETS.items()},
            default_budget="2x",
            warmup_steps=2,
        )
        workload = dataclasses.replace(
            workload,
            schedule=schedule,
            record=dataclasses.replace(workload.record, seeds_per_prompt=3),
            predictor=dataclasses.replace(workload.predictor, gate="table", history_sizes=(2, 2, 2)),
            publish=dataclasses.replace(workload.publish, need_samples=10),
        )
        pipe = load_pipeline(workload)
        record_all(workload, TrajectoryStore.create(workload.paths.trajectories), pipe)
        yield workload, pipe, *recorded_splits(workload)


def test_it_is_fitted_to_the_pictures_of_recorded_runs(made) -> None:
    workload, pipe, train, _ = made
    predictor = untrained_predictor(workload, train.sigmas, train.channels)
    told: list[str] = []
    found = fit_difficulty(pipe, workload, predictor, train, {}, told.append)
    assert found is not None and not is_lesa_cache_enabled(pipe.transformer)
    assert found.names == tuple(BUDGETS) and found.samples == 10 and len(found.correlation) == 4
    assert set(found.levels) == {"2.67x", "2x"}
    assert told[0] == "full steps by need: plain runs of 10 training prompts" and len(told) == 5
    # The mean that it says is the mean that these runs have.
    rows = [i for i, branch in enumerate(train.branch) if branch == 0]
    rows = [rows[i] for i in torch.linspace(0, len(rows) - 1, 10).round().long().tolist()]
    said = found.difficulty.of_pooled(first_features(train, rows)).mean(dim=0)
    prompts, seeds = [train.prompts[i] for i in rows], [train.seeds[i] for i in rows]
    plain = sample(pipe, prompts, seeds, workload.call)
    for place, (name, schedule) in enumerate(workload.budgets().items()):
        rule = MovingRule(predictor, schedule, train.sigmas)
        config = LesaCacheConfig(schedule=schedule, rule=rule, scheduler=lambda: pipe.scheduler)
        apply_lesa_cache(pipe.transformer, config)
        try:
            values = psnr(sample(pipe, prompts, seeds, workload.call), plain)
        finally:
            remove_lesa_cache(pipe.transformer)
        assert float(said[place]) == pytest.approx(float(values.mean()), abs=0.05), name


def test_there_must_be_something_to_choose_from(made) -> None:
    workload, pipe, train, _ = made
    predictor = untrained_predictor(workload, train.sigmas, train.channels)
    off = dataclasses.replace(workload, publish=dataclasses.replace(workload.publish, need_samples=0))
    assert fit_difficulty(pipe, off, predictor, train, {}) is None
    two = {name: BudgetParams(full_steps=BUDGETS[name]) for name in ("2x", "4x")}
    few = dataclasses.replace(workload, schedule=dataclasses.replace(workload.schedule, budgets=two))
    assert fit_difficulty(pipe, few, predictor, train, {}) is None


def test_the_first_features_are_those_of_the_store_and_the_run(made) -> None:
    train = made[2]
    found = first_features(train, [0, 5])
    assert torch.equal(found[1:], pooled([train.feature_batch([5], [0])[:, 0]]))
    assert found.shape == (2, 2 * train.channels)


def test_the_bundle_says_it_and_an_adaptive_run_goes_by_it(made, tmp_path: Path) -> None:
    workload, pipe, train, validation = made
    predictor = untrained_predictor(workload, train.sigmas, train.channels)
    arguments = {"quality": {}, "evaluation": {}, "created_from": {"git": "0" * 40}}
    bundle = make_bundle(tmp_path / "a", workload, pipe, predictor, train, validation, **arguments)
    entry = json.loads((tmp_path / "a" / "manifest.json").read_text())["difficulty"]
    assert entry["budgets"] == list(BUDGETS) and entry["samples"] == 10 and set(entry["levels"]) == {"2.67x", "2x"}
    again = make_bundle(tmp_path / "b", workload, pipe, predictor, train, validation, **arguments)
    assert again.digest == bundle.digest
    card = (tmp_path / "a" / "README.md").read_text()
    assert "`adaptive=True` spends full steps by need, each budget's number in the mean, at: 2.67x, 2x." in card
    loaded = load_bundle(tmp_path / "a")
    assert loaded.difficulty is not None and loaded.manifest.difficulty.levels == entry["levels"]
    full = []
    lesa.enable(pipe, loaded, adaptive=True)
    try:
        for prompt, seed in zip(train.prompts, train.seeds, strict=True):
            sample(pipe, [prompt], [seed], workload.call)
            full.append(lesa.summary(pipe).num_full)
    finally:
        lesa.disable(pipe)
    # These are the runs of the calibration and two more; alarms apart, their mean is the budget's four full steps.
    assert sum(full) / len(full) == pytest.approx(4.0, abs=0.5)
