"""The benchmark of other numbers of steps, at tiny scale."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.studies import step_counts
from lesa.bundle import load_bundle
from lesa.models.pipelines import load_pipeline
from lesa.params_file import load_params
from lesa.predictor.spec import MIXED_VARIANT
from lesa.publishing.bounds import bounds_by_budget
from lesa.publishing.build import make_bundle
from lesa.recording.dataset import noise_levels, recorded_elsewhere, recorded_splits
from lesa.recording.prompts import PromptError
from lesa.training.experts import untrained_predictor
from lesa.training.jobs import expert_design
from tests.helpers.recording import record
from tests.helpers.tiny import SPLITS, tiny_repository

BUNDLE = "data/bundles/tiny"
SMALL = ["--counts", "5", "7", "8", "--prompts", "2", "--seeds", "1", "--resamples", "100", "--out", "found/table.json"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = Path.cwd()
    prompts = {**SPLITS, "test": ["a cat", "a photo"]}
    root = tiny_repository(
        tmp_path_factory.mktemp("repository"), prompts=prompts, step_counts=[5], step_count_prompts=1
    )
    os.chdir(root)
    try:
        workload = load_params()
        changed = dataclasses.replace(workload.predictor, hidden=3, grid=3, history_sizes=(2, 2, 2))
        workload = dataclasses.replace(workload, predictor=changed)
        pipe = load_pipeline(workload.model, workload.resources.device)
        record(workload, pipe)
        (train, validation), others = recorded_splits(workload.recording), recorded_elsewhere(workload.recording)
        predictor = untrained_predictor(expert_design(workload), train.sigmas, train.channels, noise_levels(others))
        bounds = bounds_by_budget(pipe, workload, predictor, train, validation)
        facts = {"quality": {}, "error_bounds": bounds, "evaluation": {}, "created_from": {}}
        make_bundle(Path(BUNDLE), workload, pipe, predictor, train, validation, others=others, **facts)
        yield root
    finally:
        os.chdir(before)


def test_every_number_of_steps_beside_its_peers(place: Path) -> None:
    assert step_counts.main([BUNDLE, *SMALL]) == 0
    found = json.loads(Path("found/table.json").read_text())
    assert found["about"]["trained_counts"] == [5, 8] and found["about"]["samples"] == 2
    rows = found["rows"]
    assert [(row["num_steps"], row["trained"]) for row in rows] == [(5, True), (7, False), (8, True)]
    for row in rows:
        names = ["lesa", "reuse", "taylor1", "taylor2", "euler", *(["mixed"] if row["num_steps"] == 8 else [])]
        assert list(row["methods"]) == names and row["full_steps"][:2] == [0, 1]
        for figures in row["methods"].values():
            assert figures["low"] <= figures["mean"] <= figures["high"] and figures["p5"] > 0
            gain = figures["lesa_minus_this"]["mean"]
            assert gain == pytest.approx(row["methods"]["lesa"]["mean"] - figures["mean"], abs=1e-6)
    # Extrapolation in sigma beats reuse wherever something is predicted; nothing here is trained.
    predicting = [row for row in rows if len(row["full_steps"]) < row["num_steps"]]
    assert [row["num_steps"] for row in predicting] == [7, 8]
    assert all(row["methods"]["lesa"]["mean"] > row["methods"]["reuse"]["mean"] for row in predicting)
    text = Path("found/table.md").read_text()
    assert "2 samples of 2 held-out prompts" in text and "| 7 (between) | 2x |" in text


def test_the_mixed_experts_alone_serve_the_own_schedules_too(place: Path) -> None:
    bundle = load_bundle(BUNDLE)
    schedule = bundle.manifest.budgets["2x"].schedule
    mixed = step_counts.mixed_only(bundle.predictor)
    assert bundle.predictor.spec.variant_for(schedule).name == "2x"
    assert mixed.spec.variant_for(schedule) == MIXED_VARIANT
    alphas = mixed.alphas(schedule, torch.tensor(bundle.manifest.sigmas))
    assert not alphas[list(schedule.predicted_steps)].isnan().any()


def test_what_cannot_be_measured_is_refused_first(place: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "none.json")]
    with pytest.raises(ValueError, match=r"4 steps, the bundle serves 5 to 8; 9 steps.*budget '9x' is not one of 2x"):
        step_counts.main([BUNDLE, "--counts", "4", "8", "9", "--budgets", "9x", *out])
    params = Path("data/prompts/tiny/test.txt")
    kept = params.read_text()
    params.write_text("the blue cat\n")
    try:
        with pytest.raises(PromptError):
            step_counts.main([BUNDLE, "--counts", "8", *out])
    finally:
        params.write_text(kept)
    assert not list(tmp_path.iterdir())
