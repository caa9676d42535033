"""From a trained predictor to the published folder, and from the folder to an accelerated pipeline."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lesa
from lesa.bundle import Bundle, load_bundle
from lesa.models.fingerprint import fingerprint
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.publishing.bounds import bounds_by_budget, measure_bounds
from lesa.publishing.build import make_bundle
from lesa.publishing.calibration import bounds_of, calibrated_bounds, meter_errors
from lesa.recording.dataset import recorded_splits
from lesa.recording.prompts import prompt_digests
from lesa.sampling.binding import LazyPredictor
from lesa.training.experts import untrained_predictor
from lesa.training.jobs import expert_design, save_predictor
from tests.helpers.recording import record
from tests.helpers.tiny import SPLITS, tiny_repository

QUALITY = {"2x": {"psnr_mean": 31.5, "psnr_p5": 27.0}}


@dataclasses.dataclass
class Made:
    """A workload and its bundle."""

    workload: Workload
    pipe: Any
    bundle: Bundle
    again: Any  # makes it once more, into another folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    before = Path.cwd()
    os.chdir(tiny_repository(tmp_path_factory.mktemp("repository")))
    try:
        workload = load_params()
        workload = dataclasses.replace(
            workload, predictor=dataclasses.replace(workload.predictor, gate="table", history_sizes=(2, 2, 2))
        )
        pipe = load_pipeline(workload.model, workload.resources.device)
        record(workload, pipe)
        train, validation = recorded_splits(workload.recording)
        predictor = untrained_predictor(expert_design(workload), train.sigmas, train.channels)

        def make(folder: Path) -> Bundle:
            return make_bundle(
                folder,
                workload,
                pipe,
                predictor,
                train,
                validation,
                quality=QUALITY,
                error_bounds=bounds_by_budget(pipe, workload, predictor, train, validation),
                evaluation={"samples": 4},
                created_from={"git": "0" * 40},
            )

        yield Made(workload, pipe, make(workload.paths.bundle), make)
    finally:
        os.chdir(before)


def test_the_folder_is_closed_and_loads(made: Made) -> None:
    folder = made.workload.paths.bundle
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "manifest.json", "weights.safetensors"]
    loaded = load_bundle(folder, expected_digest=made.bundle.digest)
    assert loaded.predictor.spec == made.bundle.predictor.spec
    for name, value in made.bundle.predictor.tensors.items():
        assert torch.equal(loaded.predictor.tensors[name], value)


def test_the_manifest_says_what_it_fits(made: Made) -> None:
    manifest = json.loads((made.workload.paths.bundle / "manifest.json").read_text())
    assert manifest["model"]["fingerprint"] == fingerprint(made.pipe.transformer)
    assert manifest["model"]["pipeline_class"] == "FluxPipeline"
    assert manifest["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert manifest["scheduler"]["config"]["shift"] == 3.0
    # Predicted steps follow full steps 3 and 6 alone.
    bounds = manifest["budgets"]["2x"]["error_bounds"][3:]
    assert manifest["budgets"]["2x"] == {
        "full_steps": [0, 1, 2, 3, 6],
        "interval": 3,
        "quality": QUALITY["2x"],
        "error_bounds": [None, None, None, *bounds],
    }
    assert all(0 < bound < 1 for bound in bounds)
    assert manifest["default_budget"] == "2x" and manifest["num_inference_steps"] == 8
    train, validation = recorded_splits(made.workload.recording)
    assert manifest["sigmas"] == train.sigmas.tolist()
    training = manifest["training"]
    assert (training["num_trajectories"], training["num_validation_trajectories"]) == (4, 2)
    assert training["prompt_digests"] == prompt_digests(SPLITS["train"] + SPLITS["validation"])
    assert training["noise_seeds"] == [
        min(*train.seeds, *validation.seeds),
        max(*train.seeds, *validation.seeds),
    ]


def test_prompts_and_paths_stay_at_home(made: Made) -> None:
    folder = made.workload.paths.bundle
    text = (folder / "manifest.json").read_text() + (folder / "README.md").read_text()
    assert str(Path.cwd()) not in text and os.uname().nodename not in text
    assert not any(prompt in text for prompt in SPLITS["train"] + SPLITS["validation"])


def test_it_accelerates_the_pipeline_it_was_made_for(made: Made) -> None:
    call = made.workload.call
    plain = sample(made.pipe, ["a black cat"], [7], call)
    lesa.enable(made.pipe, made.workload.paths.bundle)
    try:
        fast = sample(made.pipe, ["a black cat"], [7], call)
        assert "5 full of 8" in str(lesa.summary(made.pipe))
    finally:
        lesa.disable(made.pipe)
    assert 0 < float((fast - plain).abs().mean()) < 0.1
    assert torch.equal(sample(made.pipe, ["a black cat"], [7], call), plain)


def test_making_it_again_gives_the_same_digest(made: Made, tmp_path: Path) -> None:
    first = made.again(tmp_path / "tiny")
    second = made.again(tmp_path / "tiny")  # in the place of the first
    assert first.digest == second.digest == made.bundle.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def _assert_rounded_up(found: list[float | None], exact: dict[int, float]) -> None:
    """To three digits, and never below: the run that has the largest error must not be beyond its own bound."""
    assert found[:3] == [None, None, None] and len(found) == 5
    for bound, least in zip(found[3:], (exact[3], exact[6]), strict=True):
        digit = 10.0 ** (math.floor(math.log10(least)) - 2)
        assert bound is not None and float(f"{bound:.3g}") == bound
        assert least <= bound < least + digit * (1 + 1e-9)


def test_bounds_rest_on_training_runs_too(made: Made) -> None:
    workload, pipe = made.workload, made.pipe
    train, validation = recorded_splits(workload.recording)
    predictor = untrained_predictor(expert_design(workload), train.sigmas, train.channels)
    schedule = workload.budgets()["2x"]
    rule = LazyPredictor(predictor, schedule, train.sigmas)

    def bounds(samples: int) -> list[float | None]:
        return calibrated_bounds(
            pipe, workload.call, schedule, rule, validation, train, batch_size=batch_size, samples=samples
        )

    batch_size = workload.evaluate.batch_size
    seen = [
        meter_errors(pipe, workload.call, schedule, rule, data, range(len(data)), batch_size)
        for data in (validation, train)
    ]
    assert [len(errors[3]) for errors in seen] == [2, 4]
    _assert_rounded_up(bounds(0), bounds_of(seen[0], schedule))
    every = {step: seen[0][step] + seen[1][step] for step in (3, 6)}
    _assert_rounded_up(bounds(256), bounds_of(every, schedule))
    assert bounds(2) not in (bounds(0), bounds(256))


def test_a_job_finds_the_bounds_with_the_predictor_that_was_saved(made: Made) -> None:
    workload = made.workload
    train, _ = recorded_splits(workload.recording)
    predictor = untrained_predictor(expert_design(workload), train.sigmas, train.channels)
    save_predictor(workload.paths.closed_loop, predictor, {})
    told: list[tuple[int, dict[str, float]]] = []
    found = measure_bounds(workload, ["2x"], lambda step, values: told.append((step, dict(values))))
    manifest = json.loads((workload.paths.bundle / "manifest.json").read_text())
    assert found == {"2x": manifest["budgets"]["2x"]["error_bounds"]}
    assert told == [(1, {"bounds": 2})]
