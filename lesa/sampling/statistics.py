"""What one accelerated sampler run did, step by step, and the table that shows it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lesa.schedule import Schedule


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One sampler step; the transformer calls of all its guidance branches share a record."""

    step: int
    kind: str  # "full" or "predicted"
    planned: str  # what the schedule says; differs from `kind` only where nothing usable could be predicted
    stage: int | None = None  # noise stage, where the rule has stages
    seconds: float = 0.0  # host time inside the transformer
    _errors: list[torch.Tensor] = field(default_factory=list)  # [B] of each measured guidance branch
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add_errors(self, errors: torch.Tensor) -> None:
        """[B] relative L1 errors of one guidance branch."""
        self._errors.append(errors)

    def add_time(self, seconds: float, events: tuple[torch.cuda.Event, torch.cuda.Event] | None) -> None:
        """Host seconds of one call, and where the device has a clock its events before and after."""
        self.seconds += seconds
        if events is not None:
            self._events.append(events)

    @property
    def error(self) -> float | None:
        """Relative L1 distance of what the rule would have predicted from the feature; None if not measured.

        The mean over samples and guidance branches.
        """
        # Kept on the device until asked for: reading it in the run would wait for the device at each step.
        return float(torch.stack(self._errors).mean()) if self._errors else None

    @property
    def sample_errors(self) -> torch.Tensor | None:
        """[B] of the error, the worst guidance branch of each sample; None if not measured."""
        return torch.stack(self._errors).amax(dim=0).cpu() if self._errors else None

    @property
    def device_seconds(self) -> float:
        """Seconds in the transformer, by the device's clock where there is one."""
        if not self._events:
            return self.seconds
        self._events[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._events) / 1000


@dataclass(frozen=True, slots=True)
class CallTimer:
    """Times one call of the transformer by the host's clock and, on a GPU, by the device's."""

    started: float  # host clock
    _event: torch.cuda.Event | None

    @classmethod
    def start(cls, tensor: Any) -> CallTimer:
        """Now; `tensor` is on the device that the call runs on."""
        started = time.perf_counter()
        return cls(started, _event_now() if isinstance(tensor, torch.Tensor) and tensor.is_cuda else None)

    def stop(self, record: StepRecord) -> float:
        """Add the call to its step; returns the host clock."""
        events = None if self._event is None else (self._event, _event_now())
        now = time.perf_counter()
        record.add_time(now - self.started, events)
        return now


def _event_now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(slots=True, kw_only=True)
class RunStatistics:
    """The newest run of one transformer.

    `finished` is False for a run that is under way or was broken off.
    """

    rule: str
    schedule: Schedule
    steps: list[StepRecord] = field(default_factory=list)
    num_branches: int = 0
    peak_bytes: int = 0  # features and derived tensors kept for prediction, all branches, at the most
    seconds: float = 0.0  # from the first transformer call to the end of the last one
    finished: bool = False
    change: int | None = None  # step from which on a slower schedule held, where errors were beyond their bounds
    notes: Mapping[str, str] = field(default_factory=dict)  # facts shown above the table
    bounds: Mapping[int, float] = field(default_factory=dict)  # largest error a full step's worst sample should have

    def record(self, step: int, planned: str, kind: str, stage: int | None) -> StepRecord:
        """The record of `step`; a full call in any branch makes the step full."""
        if not self.steps or self.steps[-1].step != step:
            self.steps.append(StepRecord(step=step, kind=kind, planned=planned, stage=stage))
        elif kind == "full":
            self.steps[-1].kind = "full"
        return self.steps[-1]

    def is_beyond(self, record: StepRecord) -> bool:
        """Whether the error of a step's worst sample is beyond its bound, before any change of schedule."""
        bound, errors = self.bounds.get(record.step), record.sample_errors
        if bound is None or errors is None or (self.change is not None and record.step >= self.change):
            return False
        return not float(errors.max()) <= bound  # NaN is beyond everything

    @property
    def num_full(self) -> int:
        return sum(record.kind == "full" for record in self.steps)

    @property
    def num_fallbacks(self) -> int:
        """Steps that were planned as predicted and ran in full: the prediction was unusable, or its history missing."""
        return sum(record.kind != record.planned for record in self.steps)

    @property
    def ratio(self) -> float | None:
        """Steps per full step of this run; None before the first step."""
        return len(self.steps) / self.num_full if self.steps else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; seconds are seconds, errors relative L1."""
        return {
            "rule": self.rule,
            "schedule": self.schedule.to_dict(),
            "notes": dict(self.notes),
            "finished": self.finished,
            "num_branches": self.num_branches,
            "steps": [
                {
                    "step": record.step,
                    "kind": record.kind,
                    "planned": record.planned,
                    "stage": record.stage,
                    "error": record.error,
                    "beyond_bound": self.is_beyond(record),
                    "seconds": record.device_seconds,
                }
                for record in self.steps
            ],
            "num_full": self.num_full,
            "num_fallbacks": self.num_fallbacks,
            "change": self.change,
            "ratio": self.ratio,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        lines = [f"{key}: {value}" for key, value in {"rule": self.rule, **self.notes}.items()]
        if not self.steps:
            none = "no figures: the newest run was refused" if "refused" in self.notes else "no run yet"
            return "\n".join([*lines, f"schedule: {self.schedule}", none])
        lines.append("step  kind       stage  error     seconds")
        for record in self.steps:
            stage = "-" if record.stage is None else str(record.stage)
            error = "-" if record.error is None else f"{record.error:.4f}"
            error += "!" if self.is_beyond(record) else ""
            kind = record.kind + ("*" if record.kind != record.planned else "")
            lines.append(f"{record.step:>4}  {kind:<9}  {stage:>5}  {error:<8}  {record.device_seconds:.4f}")
        if self.num_fallbacks:
            lines.append(
                "* planned as predicted; run in full because the prediction was unusable, or its history missing"
            )
        if any(map(self.is_beyond, self.steps)):
            lines.append(
                "! beyond its bound: the run is not like those the predictor was measured with; consider a slower "
                "budget, adaptive=True, or training on such runs"
            )
        lines.append(
            f"{self.num_full} full of {len(self.steps)}: {self.ratio:.2f}x, "
            f"{self.peak_bytes / 1e6:.2f} MB kept, {self.seconds:.2f} s"
            + ("" if self.finished else " (run not finished)")
        )
        return "\n".join(lines)
