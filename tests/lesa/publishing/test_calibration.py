"""Which runs error bounds are made of: all of validation and a share of training, each once, with their own noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lesa.params import CallParams
from lesa.publishing import bounds as bounds_module
from lesa.publishing import calibration
from lesa.publishing.bounds import bounds_by_budget
from lesa.publishing.calibration import bounds_of, calibrated_bounds, meter_errors
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule

SCHEDULE = Schedule.explicit(6, (0, 1, 3, 5))  # predicted steps follow 1 and 3
CALL = CallParams(height=16, width=16, num_inference_steps=6)


def runs(number: int, name: str) -> Any:
    """`number` recorded runs of two guidance branches each."""
    made = SimpleNamespace(
        prompts=tuple(f"{name} {run}" for run in range(number) for _ in range(2)),
        seeds=tuple(100 + run for run in range(number) for _ in range(2)),
        branch=(0, 1) * number,
        sigmas=torch.linspace(1, 0, 7),
    )
    made.first_branch_rows = lambda: Trajectories.first_branch_rows(made)
    return made


def test_all_validation_runs_and_some_training_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = runs(5, "train"), runs(2, "validation")
    asked: list[tuple[Any, list[int]]] = []

    def errors(pipe: Any, call: Any, schedule: Any, rule: Any, data: Any, rows: list[int], size: int) -> Any:
        asked.append((data, list(rows)))
        return {3: [0.5, 0.1] if data is validation else [0.1, 0.2, 0.1]}

    monkeypatch.setattr(calibration, "meter_errors", errors)
    found = calibrated_bounds(None, CALL, SCHEDULE, None, validation, train, batch_size=2, samples=3)  # type: ignore[arg-type]
    assert asked == [(validation, [0, 2]), (train, [0, 4, 8])]
    expected = bounds_of({3: [0.5, 0.1, 0.1, 0.2, 0.1]}, SCHEDULE)[3]
    assert found[:2] == [None, None] and found[3] is None
    assert found[2] is not None and expected <= found[2] <= expected * 1.01, "rounded up to three digits"


def test_a_bound_is_not_below_an_error_that_was_seen() -> None:
    seen = {1: [0.01] * 40 + [0.9], 3: [0.1, 0.1]}
    found = bounds_of(seen, SCHEDULE)
    assert found[1] >= 0.9 and found[3] > 0.1
    assert list(bounds_of({0: [0.1, 0.2], 1: [0.1, 0.2], 3: [0.1, 0.2], 5: [0.1, 0.2]}, SCHEDULE)) == [1, 3]


@pytest.mark.parametrize("bound, rounded", [(0.12341, 0.124), (0.1234, 0.124), (0.12, 0.12), (3.0001, 3.01)])
def test_a_bound_is_rounded_up(bound: float, rounded: float) -> None:
    assert calibration._rounded_up(bound) == rounded >= bound


def test_runs_are_made_again_with_their_own_prompts_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], list[int]]] = []
    monkeypatch.setattr(calibration, "apply_lesa_cache", lambda *_: None)
    monkeypatch.setattr(calibration, "remove_lesa_cache", lambda *_: None)
    monkeypatch.setattr(calibration, "LesaCacheConfig", lambda **_: None)
    monkeypatch.setattr(calibration, "sample", lambda pipe, prompts, seeds, *_, **__: asked.append((prompts, seeds)))
    record = SimpleNamespace(step=3, sample_errors=torch.tensor([0.25]))
    monkeypatch.setattr(calibration, "cache_state", lambda _: SimpleNamespace(steps=[record]))
    found = meter_errors(SimpleNamespace(transformer=None), CALL, SCHEDULE, None, runs(4, "run"), [2, 6, 4], 2)  # type: ignore[arg-type]
    assert asked == [(["run 1", "run 3"], [101, 103]), (["run 2"], [102])] and found == {3: [0.25, 0.25]}


def test_a_bundle_s_bounds_are_of_validation_and_of_a_share_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def bounds(pipe: Any, call: Any, schedule: Any, rule: Any, validation: Any, train: Any, **given: Any) -> list[None]:
        asked.append((schedule, validation, train, given["samples"]))
        return [None] * schedule.num_full

    monkeypatch.setattr(bounds_module, "calibrated_bounds", bounds)
    monkeypatch.setattr(bounds_module, "LazyPredictor", lambda *_: None)
    other = Schedule.explicit(6, (0, 1, 4))
    workload = SimpleNamespace(
        budgets=lambda: {"2x": other, "1.5x": SCHEDULE},
        call=CALL,
        evaluate=SimpleNamespace(batch_size=2),
        publish=SimpleNamespace(bound_samples=17),
    )
    train, validation = runs(3, "train"), runs(2, "validation")
    found = bounds_by_budget(None, workload, None, train, validation)  # type: ignore[arg-type]
    assert asked == [(other, validation, train, 17), (SCHEDULE, validation, train, 17)]
    assert list(found) == ["2x", "1.5x"]
