"""Which steps of a sampler run are full: the one object recorder, trainer, evaluator, sampler and bundle share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lesa.errors import LesaError
from lesa.validation import is_int

if TYPE_CHECKING:
    import torch  # reading settings takes no second of it

MIN_CARRIED = 3  # full steps that a schedule keeps, however short the run it is carried to


@dataclass(frozen=True)
class Schedule:
    """The full steps of one run of `num_steps` sampler steps; every other step is predicted.

    Raises:
        ValueError: naming every rule that the steps break.
    """

    num_steps: int  # sampler steps in a run, >= 1
    full_steps: tuple[int, ...]  # increasing step indices at which the transformer runs; step 0 is one

    def __post_init__(self) -> None:
        problems = []
        if not is_int(self.num_steps) or self.num_steps < 1:
            problems.append(f"num_steps must be an integer of at least 1, got {self.num_steps!r}")
        elif not all(is_int(step) for step in self.full_steps):
            problems.append(f"full_steps must be integers, got {list(self.full_steps)}")
        else:
            if list(self.full_steps) != sorted(set(self.full_steps)):
                problems.append(f"full_steps must increase without repeats, got {list(self.full_steps)}")
            outside = [step for step in self.full_steps if not 0 <= step < self.num_steps]
            if outside:
                problems.append(f"full_steps {outside} lie outside 0..{self.num_steps - 1}")
            if 0 not in self.full_steps:
                problems.append("full_steps must contain step 0: nothing can be predicted before it")
        if problems:
            raise LesaError("schedule: " + "; ".join(problems))

    @classmethod
    def uniform(
        cls, num_steps: int, interval: int, warmup_steps: int = 3, cooldown_steps: int = 0
    ) -> Schedule:
        """`{0 .. W-1} U {W + kN}`, plus the last `cooldown_steps`: LESA's rule with W = 3 (10 full of 50 at N = 7).

        Args:
            num_steps: sampler steps, >= 1.
            interval: N, steps from one full step to the next, >= 1; 1 is plain sampling.
            warmup_steps: W, leading steps that are always full, >= 0 (step 0 is full in any case).
            cooldown_steps: trailing steps that are always full, >= 0.
        """
        problems = []
        if not is_int(num_steps) or num_steps < 1:
            problems.append(f"num_steps must be an integer of at least 1, got {num_steps!r}")
        if not is_int(interval) or interval < 1:
            problems.append(f"interval must be an integer of at least 1 (1 is plain sampling), got {interval!r}")
        for name, value in (("warmup_steps", warmup_steps), ("cooldown_steps", cooldown_steps)):
            if not is_int(value) or value < 0:
                problems.append(f"{name} must be an integer of at least 0, got {value!r}")
        if problems:
            raise LesaError("schedule: " + "; ".join(problems))
        steps = {0, *range(min(warmup_steps, num_steps)), *range(warmup_steps, num_steps, interval)}
        steps |= set(range(max(num_steps - cooldown_steps, 0), num_steps))
        return cls(num_steps, tuple(sorted(steps)))

    @classmethod
    def explicit(cls, num_steps: int, full_steps: Iterable[int]) -> Schedule:
        """A list of full steps as given, for example a searched one."""
        return cls(num_steps, tuple(full_steps))

    def carried(self, num_steps: int, least: int = MIN_CARRIED) -> Schedule:
        """This schedule for a run of another number of steps: the same step ratio, the same places along the run.

        `num_steps / ratio` full steps, rounded, at least `least`; two of them lead the run, so that whatever is
        predicted has two full steps behind it. The others stand where interpolation between this schedule's
        places, as fractions of the run, puts them. Carried to its own number of steps, a schedule that leads with
        two full steps and has three stays as it is.

        Args:
            num_steps: of the other run, >= 1.
            least: full steps that are kept however short the run is, as far as it has them.

        Raises:
            ValueError: `num_steps` is no number of steps.
        """
        if not is_int(num_steps) or num_steps < 1:
            raise LesaError(f"schedule: num_steps must be an integer of at least 1, got {num_steps!r}")
        count = min(num_steps, max(least, math.floor(num_steps / self.ratio + 0.5)))
        lead = list(range(min(2, count)))
        own_lead = 2 if self.full_steps[:2] == (0, 1) else 1
        places = [step / self.num_steps for step in (*self.full_steps[own_lead - 1 :], self.num_steps)]
        rest = count - len(lead)
        full = lead
        for number in range(1, rest + 1):
            at = number * (len(places) - 1) / (rest + 1)
            before = min(int(at), len(places) - 2)
            place = places[before] + (at - before) * (places[before + 1] - places[before])
            step = math.floor(place * num_steps + 0.5)
            # Later ones need room too: neighbours that round to one step move apart.
            full.append(min(max(step, full[-1] + 1), num_steps - 1 - (rest - number)))
        return Schedule(num_steps, tuple(full))

    def is_full(self, step: int) -> bool:
        return step in self.full_steps

    @property
    def num_full(self) -> int:
        return len(self.full_steps)

    @property
    def predicted_steps(self) -> tuple[int, ...]:
        full = set(self.full_steps)
        return tuple(step for step in range(self.num_steps) if step not in full)

    @property
    def ratio(self) -> float:
        """Step ratio `num_steps / num_full`, the acceleration the papers print."""
        return self.num_steps / self.num_full

    def anchors(self, step: int, size: int) -> tuple[int, ...]:
        """The `size` newest full steps before `step`, newest first; fewer where the run is still young."""
        return tuple(full for full in reversed(self.full_steps) if full < step)[:size]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "full_steps": list(self.full_steps)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schedule:
        return cls(data["num_steps"], tuple(data["full_steps"]))

    def __str__(self) -> str:
        return f"{self.num_full} full of {self.num_steps}: {self.ratio:.2f}x"


def longest_run(num_full: int, max_gap: int, leading: int = 1) -> int:
    """Steps of the longest run that so many full steps serve: the first `leading` in a row, then gaps of `max_gap`."""
    return leading - 1 + (num_full - leading + 1) * max_gap


def least_full(budgets: Iterable[Schedule]) -> int:
    """Full steps that every budget of a bundle keeps at any number of steps: as many as the fastest has at its own.

    With fewer than a budget was measured with, a shorter plain run is better.
    """
    return min(schedule.num_full for schedule in budgets)


def picture(schedule: Schedule) -> str:
    """One character a step, `#` full and `.` predicted, in groups of ten."""
    marks = "".join("#" if schedule.is_full(step) else "." for step in range(schedule.num_steps))
    return " ".join(marks[start : start + 10] for start in range(0, len(marks), 10))


def history_problems(
    schedule: Schedule, sizes: Sequence[int], stages: Sequence[int], history: str = "full_steps"
) -> list[str]:
    """Every predicted step whose expert wants more history than the run has had by then.

    Args:
        schedule: the steps.
        sizes: K of each noise stage's expert.
        stages: noise stage of each step, length `num_steps`.
        history: `full_steps`, or `steps` where predictions count too.
    """
    problems = []
    what = "full steps" if history == "full_steps" else "steps"
    for stage, size in enumerate(sizes):
        for step in schedule.predicted_steps:
            available = len(schedule.anchors(step, size)) if history == "full_steps" else min(step, size)
            if stages[step] == stage and available < size:
                problems.append(
                    f"history_size {size} of noise stage {stage} needs {size} {what} before step {step}, "
                    f"the schedule ({schedule}) has {available}: lower the history size or raise warmup_steps"
                )
                break
    return problems


def stage_of_steps(sigmas: torch.Tensor, boundaries: Sequence[float]) -> list[int]:
    """Noise stage of every step: 0 is the noisiest.

    Boundaries are noise levels rather than step numbers, so that one set serves any step count and any shift.

    Args:
        sigmas: [S + 1] noise levels of a run, decreasing, the last is 0.
        boundaries: decreasing noise levels strictly inside (0, 1); `len + 1` stages.

    Returns:
        S integers; step i belongs to stage j when exactly j boundaries are above `sigmas[i]`.
    """
    return [sum(float(sigma) < boundary for boundary in boundaries) for sigma in sigmas[:-1]]


def boundary_problems(boundaries: Sequence[float]) -> list[str]:
    """What is wrong with a list of boundaries; empty when nothing is."""
    problems = []
    if any(not 0.0 < boundary < 1.0 for boundary in boundaries):
        problems.append(f"boundaries must be noise levels strictly between 0 and 1, got {list(boundaries)}")
    if any(later >= earlier for earlier, later in pairwise(boundaries)):
        problems.append(f"boundaries must decrease without repeats, got {list(boundaries)}")
    return problems
