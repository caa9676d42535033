"""The bounded fallback: a run whose own errors are too large goes on with a slower schedule.

At each full step the feature is compared with its prediction (the error meter). The first error
beyond the bound its step was calibrated to (`publishing.calibration`) raises the alarm: from the slower schedule's next
full step on, the run keeps to that schedule and to the predictor trained on it. What that predictor looks back on and
this run has only predicted stands in its history as predicted. Single full steps put between the scheduled ones would
do harm: weights trained through the whole sampler let the errors of different steps cancel, and a step that is suddenly
exact leaves the others' uncancelled (`benchmarks/studies/adaptive.md`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lesa.bundle import Bundle
from lesa.bundle.budgets import slower_budget
from lesa.errors import LesaError
from lesa.predictor.rule import Rule
from lesa.sampling.binding import LazyPredictor
from lesa.schedule import Schedule


@dataclass(frozen=True)
class Fallback:
    """What a run with too large errors changes over to; `begin` watches one run.

    Raises:
        ValueError: naming every setting that does not fit.
    """

    schedule: Schedule  # that runs begin with
    bounds: Mapping[int, float]  # largest relative L1 error of a sample, for the full steps that are watched
    slower: Schedule  # to change over to
    rule: Rule = field(repr=False)  # predicts on it
    name: str  # of it, for people

    def __post_init__(self) -> None:
        own = self.schedule
        problems = [f"bounds: step {step} is not a full step" for step in self.bounds if not own.is_full(step)]
        problems += [
            f"bounds: {bound} of step {step} is not above zero"
            for step, bound in self.bounds.items()
            if not 0 < bound < math.inf
        ]
        if self.slower.num_steps != own.num_steps:
            problems.append(f"slower: has {self.slower.num_steps} steps, the schedule {own.num_steps}")
        if self.rule.keeps_predictions:
            problems.append("rule: looks back on predicted steps, and so on a run of its own from the first step on")
        if problems:
            raise LesaError("fallback: " + "; ".join(problems))

    def begin(self) -> FallbackWatch:
        """A run begins."""
        return FallbackWatch(self)

    def change_after(self, step: int) -> int | None:
        """The slower schedule's next full step; None after its last one."""
        later = bisect_right(self.slower.full_steps, step)
        return self.slower.full_steps[later] if later < self.slower.num_full else None

    @property
    def most(self) -> int:
        """Full steps that a run may have beyond its schedule's, at the most."""
        changes = [change for step in self.bounds if (change := self.change_after(step)) is not None]
        return max((self._full_steps_with(change) - self.schedule.num_full for change in changes), default=0)

    @property
    def promise(self) -> str:
        return f"{self.name} where errors are beyond their bounds, at most {self.most} full steps more"

    def _full_steps_with(self, change: int) -> int:
        return sum(s < change for s in self.schedule.full_steps) + sum(s >= change for s in self.slower.full_steps)


class FallbackWatch:
    """Whether and when the run that is under way changes over."""

    def __init__(self, fallback: Fallback) -> None:
        self.fallback = fallback
        self.alarm: int | None = None  # full step with the first error beyond its bound
        self.change: int | None = None  # full step from which on the slower schedule holds

    def watches(self, step: int) -> bool:
        """Whether the error at `step` decides anything."""
        can_change = step in self.fallback.bounds and self.fallback.change_after(step) is not None
        return self.alarm is None and can_change

    def observe(self, step: int, error: float) -> None:
        """Take the error of full step `step`, of the worst sample and branch; one that is no number is too large."""
        if not error <= self.fallback.bounds[step]:
            self.alarm, self.change = step, self.fallback.change_after(step)

    @property
    def description(self) -> str:
        """What the run did about it."""
        return f"to {self.fallback.name} at step {self.change}: the error at step {self.alarm} was beyond its bound"


def fallback_of(bundle: Bundle, chosen: str) -> Fallback:
    """The fallback of a budget: its error bounds, and the next slower budget to change over to.

    Raises:
        ValueError: what was chosen is no budget, is the slowest, or has no bounds.
    """
    manifest = bundle.manifest
    if chosen not in manifest.budgets:
        raise LesaError(f"adaptive: {chosen} has no error bounds; choose a budget: {', '.join(manifest.budgets)}")
    budget = manifest.budgets[chosen]
    name = slower_budget(manifest, chosen)
    if not budget.bounds:
        raise LesaError(
            f"adaptive: budget {chosen!r} of this bundle has no error bounds: they were calibrated on fewer than two "
            "runs, or with errors that were no numbers; publish the bundle again"
        )
    schedule = manifest.budgets[name].schedule
    return Fallback(
        budget.schedule,
        budget.bounds,
        schedule,
        LazyPredictor(bundle.predictor, schedule, torch.tensor(manifest.sigmas)),
        name,
    )


def adaptive_problems(scheduler: Any, schedule: Schedule) -> list[str]:
    """What keeps a run from being adaptive: bounds are known for the bundle's own number of steps."""
    steps = getattr(scheduler, "num_inference_steps", None)
    if steps is None or steps == schedule.num_steps:
        return []
    return [f"adaptive: error bounds are known for {schedule.num_steps} steps; for other numbers enable without it"]


def fallback_problems(transformer: torch.nn.Module, first_step: int) -> list[str]:
    """What keeps a run from changing over, whatever made its bounds."""
    problems = []
    if is_context_parallel(getattr(transformer, "_parallel_config", None)):
        problems.append("adaptive: not with context parallelism, where every device would decide for itself")
    if first_step:
        problems.append("adaptive: not for runs that begin in the middle of the schedule")
    return problems


def is_context_parallel(parallel: Any) -> bool:
    """Whether diffusers' `_parallel_config` spreads the tokens over devices, each of which sees its own part."""
    return getattr(parallel, "context_parallel_config", parallel) is not None
