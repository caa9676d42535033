"""A predictor bound to the schedule, device and precision of the run at hand, whatever its number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lesa.errors import LesaError
from lesa.predictor.predictor import BoundPredictor, Predictor
from lesa.predictor.rule import History, Rule
from lesa.sampling.checks import SIGMA_TOLERANCE
from lesa.schedule import Schedule


def noise_levels(scheduler: Any) -> torch.Tensor:
    """[S + 1] of the run that begins, float32 on the CPU; `LesaError` where the scheduler has none."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, torch.Tensor):
        raise LesaError("sigmas: the scheduler has none")
    return sigmas.detach().to("cpu", torch.float32, copy=True)


class LazyPredictor:
    """`Predictor.bind`, done again wherever the features have moved: a `lesa.predictor.rule.Rule`."""

    def __init__(self, predictor: Predictor, schedule: Schedule, sigmas: torch.Tensor) -> None:
        self._predictor, self._schedule, self._sigmas = predictor, schedule, sigmas
        self._place = (torch.device("cpu"), torch.float32)
        self._bound: BoundPredictor = predictor.bind(schedule, sigmas)
        self.name = self._bound.name
        self.history_size = self._bound.history_size
        self.keeps_predictions = self._bound.keeps_predictions
        self.stages, self.sizes = self._bound.stages, self._bound.sizes

    def __call__(self, history: History, step: int) -> torch.Tensor:
        newest = history.features[0]
        place = (newest.device, newest.dtype)
        if place != self._place:
            self._bound = self._predictor.bind(
                self._schedule, self._sigmas, device=newest.device, dtype=newest.dtype
            )
            self._place = place
        return self._bound(history, step)


ScheduleOf = Callable[[int], Schedule]  # number of steps -> the schedule that was asked for; ValueError where none is
Bind = Callable[[Predictor, Schedule, torch.Tensor], Rule]


class StepCountBinding:
    """Schedule and rule for a run's noise levels; remembers the newest: runs of one length follow each other.

    Args:
        predictor: the bundle's.
        sigmas: noise levels that the bundle was made with; a run must start and end as they do.
        schedule_of: the schedule that was asked for, by number of steps.
        bind: makes the rule.
    """

    def __init__(self, predictor: Predictor, sigmas: Sequence[float], schedule_of: ScheduleOf, bind: Bind) -> None:
        self._predictor, self._ends = predictor, (sigmas[0], sigmas[-1])
        self._schedule_of, self._bind = schedule_of, bind
        self._newest: tuple[torch.Tensor, tuple[Schedule, Rule]] | None = None

    def __call__(self, sigmas: torch.Tensor) -> tuple[Schedule, Rule]:
        """For noise levels [S + 1] of a run.

        Raises:
            ValueError: the number of steps is outside the trained range, the noise levels are not those of such a
                run, or the schedule cannot be carried or served.
        """
        if self._newest is not None and torch.equal(self._newest[0], sigmas):
            return self._newest[1]
        low, high = self._predictor.spec.step_range
        num_steps = len(sigmas) - 1
        if not low <= num_steps <= high:
            raise LesaError(f"num_inference_steps: got {num_steps}, expected {low} to {high}, as it was trained")
        problems = [
            f"sigmas: got {float(sigmas[place]):.6g} at the {name}, expected {expected:.6g}"
            for name, place, expected in (("start", 0, self._ends[0]), ("end", -1, self._ends[1]))
            if not abs(float(sigmas[place]) - expected) <= SIGMA_TOLERANCE
        ]
        if not (sigmas[1:] < sigmas[:-1]).all():
            problems.append("sigmas: must decrease from step to step")
        if problems:
            raise LesaError("; ".join(problems))
        schedule = self._schedule_of(num_steps)
        bound = schedule, self._bind(self._predictor, schedule, sigmas)
        self._newest = sigmas, bound
        return bound
