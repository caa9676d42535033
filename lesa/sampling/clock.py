"""Which run, step and branch a call of the transformer belongs to.

The timestep's value alone cannot tell: in bfloat16 neighbouring timesteps may be equal, and a second call
with the same value may be the next branch of classifier-free guidance or the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lesa.errors import LesaError

_MAX_DERIVED_BRANCHES = 2  # without a context: the conditional call, then the unconditional one
_VALUE_TOLERANCE = 2.0**-7  # relative; twice the rounding of bfloat16


@dataclass(frozen=True, slots=True)
class Tick:
    """Place of one transformer call."""

    new_run: bool
    step: int
    branch: str  # the cache context's name, or "#0", "#1" by order of the calls of a step


class ForeignCallError(LesaError):
    """A call of the transformer by another pipeline than the one whose scheduler is watched."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"another pipeline is running on this transformer ({why}): let the pipelines share one scheduler and take "
            "turns, or give each a transformer of its own and enable LESA on both"
        )


class Clock(Protocol):
    @property
    def num_steps(self) -> int: ...

    def allow_branches(self) -> None:
        """Let the run that has just begun have any number of guidance branches."""
        ...

    def tick(self, context: str | None, timestep: Any) -> Tick:
        """Place of the call that is about to run."""
        ...

    def fail(self) -> None:
        """The call did not complete: whatever comes next starts a new run."""
        ...


class Branches:
    """The branches seen at the current step, and their agreed number."""

    def __init__(self, num_branches: int | None) -> None:
        self._agreed = self._expected = num_branches
        self._seen: list[str] = []

    @property
    def complete(self) -> bool:
        """Whether a further call without a context belongs to the next step."""
        return len(self._seen) >= (self._expected or 1)

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def next_step(self, step: int) -> None:
        if self._expected is not None and self._seen and len(self._seen) != self._expected:
            raise LesaError(
                f"the transformer was called {len(self._seen)} time(s) at step {step - 1}, expected "
                f"{self._expected}: the guidance branches are not those that the predictor was made for"
            )
        self._seen = []

    def clear(self) -> None:
        """A run begins."""
        self._seen, self._expected = [], self._agreed

    def allow_any(self) -> None:
        """Whatever number of them the run that is under way has."""
        self._expected = None

    def enter(self, context: str | None, step: int) -> str:
        """Name of the branch of the call that is about to run at `step`."""
        name = context if context is not None else f"#{len(self._seen)}"
        limit = self._expected or (None if context is not None else _MAX_DERIVED_BRANCHES)
        if name in self._seen or (limit is not None and len(self._seen) >= limit):
            raise LesaError(
                f"call {len(self._seen) + 1} of the transformer at step {step} (context {context!r}), "
                f"expected at most {limit or 1}: another pipeline is running on this transformer, the scheduler that "
                "was given is not the one that steps, or the pipeline has more guidance branches than the predictor "
                "was made for"
            )
        self._seen.append(name)
        return name


class SchedulerClock:
    """Takes the step from the scheduler.

    `set_timesteps` makes a new `timesteps` tensor and clears `step_index`, so the tensor's identity tells a
    new run; `step_index` is None until the first `scheduler.step`: until then `begin_index` says the step.
    """

    def __init__(self, scheduler: Any, num_branches: int | None = None, timestep_factor: float = 1.0) -> None:
        self._source: Callable[[], Any] = scheduler if callable(scheduler) else lambda: scheduler
        if not hasattr(self.scheduler, "step_index"):
            raise LesaError(
                f"{type(self.scheduler).__name__} does not say its step (no step_index): "
                "give `timesteps` instead of `scheduler`"
            )
        self._branches = Branches(num_branches)
        self._timesteps: torch.Tensor | None = None
        self._step = -1
        self._factor = timestep_factor
        self._given: list[float] | None = None  # `timestep` of every step as the transformer is given it; None: unknown

    @property
    def scheduler(self) -> Any:
        """The scheduler in use now (pipelines may be given another one at any time)."""
        scheduler = self._source()
        if scheduler is None:
            raise LesaError(
                "the pipeline that LESA was enabled on is gone: call remove_lesa_cache(transformer), then "
                "enable it on the pipeline that uses the transformer now"
            )
        return scheduler

    @property
    def num_steps(self) -> int:
        return len(self.scheduler.timesteps)

    def tick(self, context: str | None, timestep: Any) -> Tick:
        scheduler = self.scheduler
        step = scheduler.step_index
        if step is None:
            step = getattr(scheduler, "begin_index", None) or 0
        new_run = scheduler.timesteps is not self._timesteps or step < self._step
        self._refuse_foreign(scheduler, step, None if new_run else timestep)
        if new_run:
            self._branches.clear()
            self._given = self._timesteps_given(scheduler, step, timestep)
        elif step != self._step:
            self._branches.next_step(step)
        self._timesteps, self._step = scheduler.timesteps, step
        return Tick(new_run, step, self._branches.enter(context, step))

    def allow_branches(self) -> None:
        self._branches.allow_any()

    def fail(self) -> None:
        self._timesteps, self._step = None, -1

    def _timesteps_given(self, scheduler: Any, step: int, timestep: Any) -> list[float] | None:
        """The timesteps of a run that begins, where the first one is the scheduler's and reading it waits for nothing.

        On another device than the CPU every comparison would wait for it.
        """
        if not isinstance(timestep, torch.Tensor) or timestep.device.type != "cpu":
            return None
        given = [float(value) * self._factor for value in scheduler.timesteps.tolist()]
        return given if _is_close(_first_value(timestep), given[step]) else None

    def _refuse_foreign(self, scheduler: Any, step: int, timestep: Any) -> None:
        """Refuse a call of a pipeline with a scheduler of its own, before it leaves a trace in the run under way."""
        if step >= len(scheduler.timesteps):
            raise ForeignCallError("the scheduler that LESA watches has done its last step")
        if self._given is None or not isinstance(timestep, torch.Tensor) or timestep.device.type != "cpu":
            return
        value = _first_value(timestep)
        if not _is_close(value, self._given[step]):
            raise ForeignCallError(
                f"its timestep is {value:.6g}, the scheduler that LESA watches is at {self._given[step]:.6g}"
            )


class TimestepClock:
    """Counts the calls against the list of timesteps, for transformers used without a scheduler.

    Values only confirm the count; a value that fits neither the count nor the first timestep is refused.
    """

    def __init__(self, timesteps: Sequence[float], num_branches: int | None = None) -> None:
        self._values = [float(value) for value in timesteps]
        self._branches = Branches(num_branches)
        self._step = -1

    @property
    def num_steps(self) -> int:
        return len(self._values)

    def tick(self, context: str | None, timestep: Any) -> Tick:
        value = _first_value(timestep)
        used = self._branches.complete if context is None else context in self._branches
        step = self._step + 1 if self._step < 0 or used else self._step
        new_run = (step == 0 and step != self._step) or step >= self.num_steps
        if new_run:
            step = 0
        if not self._fits(value, step):
            if not self._fits(value, 0):
                self.fail()
                raise LesaError(
                    f"timestep {value:.6g} where {self._values[step]:.6g} (step {step}) or a new run "
                    f"({self._values[0]:.6g}) was expected: give them as the transformer receives them"
                )
            step, new_run = 0, True  # the run before was broken off
        if new_run:
            self._branches.clear()
        elif step != self._step:
            self._branches.next_step(step)
        self._step = step
        return Tick(new_run, step, self._branches.enter(context, step))

    def allow_branches(self) -> None:
        self._branches.allow_any()

    def fail(self) -> None:
        self._step = -1

    def _fits(self, value: float, step: int) -> bool:
        return _is_close(value, self._values[step])


def _first_value(timestep: Any) -> float:
    if timestep is None:
        raise LesaError("the transformer was called without `timestep`, and no scheduler was given")
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, torch.Tensor) else float(timestep)


def _is_close(value: float, expected: float) -> bool:
    return abs(value - expected) <= _VALUE_TOLERANCE * max(abs(expected), abs(value))
