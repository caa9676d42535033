"""Which schedules are trained before the search takes one, and what their training is judged by."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lesa.params import ClosedLoopParams
from lesa.schedule import Schedule
from lesa.search import finalists
from lesa.search.finalists import error_after_training, leaders
from lesa.training.step_weights import StepFits, StepWeights
from tests.lesa.training.test_closed_loop import Place, place  # noqa: F401 - fixtures


def test_leaders_are_the_best_that_are_not_too_alike() -> None:
    errors = {(0, 6, 20): 1.0, (0, 7, 22): 1.1, (0, 8, 22): 1.2, (0, 6, 12): 2.0, (0, 9, 25): 3.0}
    assert leaders(errors, 3) == [(0, 6, 20), (0, 8, 22), (0, 6, 12)]  # (0, 7, 22) is three steps from the first
    assert leaders(errors, 9) == [(0, 6, 20), (0, 8, 22), (0, 6, 12), (0, 9, 25)]
    assert leaders(errors, 1) == [(0, 6, 20)]
    assert leaders(errors, 3, [(0, 9, 25)]) == [(0, 9, 25), (0, 6, 20), (0, 8, 22)]  # the chosen come first
    assert leaders(errors, 1, [(0, 9, 25), (0, 6, 12)]) == [(0, 9, 25)]


def trained(place: Place, iterations: int, rate: float = 0.03) -> float:  # noqa: F811
    workload = place.workload
    data, schedule = place.train, Schedule.explicit(8, (0, 2, 5))
    fitted, judged = list(range(len(data) - 2)), list(range(len(data) - 2, len(data)))
    fits = StepFits(data, fitted, workload.predictor.step_history, workload.predictor.ridge, place.pipe.device)
    return error_after_training(
        place.pipe,
        workload.call,
        data,
        schedule,
        fits.weights(schedule),
        settings=dataclasses.replace(workload.closed_loop, step_learning_rate=rate),
        history_size=workload.predictor.step_history,
        seed=workload.seed,
        fitted=fitted,
        judged=judged,
        iterations=iterations,
    )


def test_training_lowers_the_error_of_trajectories_that_it_does_not_learn_from(place: Place) -> None:  # noqa: F811
    start = trained(place, 1, rate=0.0)
    assert trained(place, 12) < start - 0.05  # 0.2 dB and more
    assert trained(place, 12) == trained(place, 12)
    assert not any(p.requires_grad for p in place.pipe.transformer.parameters())


def test_a_training_that_leaves_the_finite_numbers_wins_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    real = finalists.log_latents_loss
    monkeypatch.setattr(finalists, "log_latents_loss", lambda *given: real(*given) * torch.nan)
    assert trained(place, 2) == math.inf


def test_what_is_learned_from_and_what_judges_are_never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stood in for by the number of its row: every row meets its own latents, in training and in judgement."""
    asked: list[tuple[bool, list[int]]] = []
    data = SimpleNamespace(latents=torch.arange(6.0)[:, None] * 10)
    start = StepWeights(torch.zeros(2, 2, 1), torch.eye(2).expand(2, 1, 2, 2).clone())

    def latents(pipe: Any, call: Any, schedule: Any, rule: Any, data: Any, rows: list[int], *_: Any) -> torch.Tensor:
        asked.append((torch.is_grad_enabled(), list(rows)))
        return torch.tensor([[row * 10.0] for row in rows]) + 0.1 + start.values.sum()

    monkeypatch.setattr(finalists, "freeze_pipeline", lambda pipe: None)
    monkeypatch.setattr(finalists, "accelerated_latents", latents)
    error = error_after_training(
        None, None, data, Schedule.explicit(2, (0,)), start,  # type: ignore[arg-type]
        settings=ClosedLoopParams(batch_size=2, step_learning_rate=0.0), history_size=1, seed=0,
        fitted=[1, 4, 5], judged=[3, 2], iterations=4,
    )  # fmt: skip
    assert error == pytest.approx(math.log(0.01), abs=1e-3)
    learned, judged = ([rows for grad, rows in asked if grad is wanted] for wanted in (True, False))
    assert {tuple(rows) for rows in judged} == {(3, 2)} and len(learned) == 4
    assert {row for rows in learned for row in rows} == {1, 4, 5} and all(len(rows) == 2 for rows in learned)
