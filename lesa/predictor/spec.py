"""What a predictor is, without its numbers: width, steps, noise stages, history, variants (LESA, arXiv 2602.20497)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lesa.errors import LesaError
from lesa.schedule import Schedule, boundary_problems
from lesa.validation import build

KINDS = ("lesa", "per_step")
PROJECTIONS = ("dense", "low_rank", "per_channel")
GATES = ("kan", "mlp", "table")  # what gives alpha
MIXED = "mixed"  # name of the experts for other numbers of steps, beside those of the budgets
MIXED_HISTORY = 2  # K of these: the full steps that every carried schedule starts with
STEPS = "steps"  # name of a variant's step weights, where its stages have their numbers
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
MAX_CHANNELS, MAX_HISTORY, MAX_STAGES, MAX_VARIANTS, MAX_HIDDEN, MAX_STEPS = 65536, 16, 16, 32, 4096, 10000


def leading_steps(kind: str) -> int:
    """Full steps in a row at the start of a searched schedule: what the first prediction of this kind needs."""
    return 1 if kind == "per_step" else 2


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Experts trained for one budget, or for other numbers of steps (`MIXED_VARIANT`)."""

    name: str
    full_steps: tuple[int, ...]  # the schedule they were trained on; none for other numbers of steps

    @property
    def num_full(self) -> int:
        return len(self.full_steps)

    @property
    def is_relative(self) -> bool:
        """Whether the gate multiplies first-order extrapolation instead of giving alpha itself, on any schedule."""
        return self == MIXED_VARIANT


MIXED_VARIANT = Variant(name=MIXED, full_steps=())


@dataclass(frozen=True, kw_only=True)
class PredictorSpec:
    """Everything about a predictor but its numbers.

    Raises:
        ValueError: listing every field that is out of range.
    """

    channels: int  # C of the tapped feature
    num_steps: int  # of the runs it was trained on
    boundaries: tuple[float, ...]  # noise levels between the stages
    history_sizes: tuple[int, ...]  # K of each stage
    variants: tuple[Variant, ...]
    kind: str = "lesa"
    step_history: int = 3  # K of the step weights (kind per_step)
    history: str = "full_steps"
    projection: str = "dense"
    rank: int = 32
    gate: str = "kan"
    hidden: int = 8
    grid: int = 5
    step_counts: tuple[int, ...] = ()  # increasing numbers of steps that the mixed experts were trained on; (): none

    def __post_init__(self) -> None:
        problems = [*boundary_problems(self.boundaries), *self._step_count_problems()]
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("history", self.history, ("full_steps", "steps")),
            ("projection", self.projection, PROJECTIONS),
            ("gate", self.gate, GATES),
        ):
            if value not in known:
                problems.append(f"{name} {value!r} is not one of {', '.join(known)}")
        for name, number, high in (
            ("channels", self.channels, MAX_CHANNELS),
            ("num_steps", self.num_steps, MAX_STEPS),
            ("rank", self.rank, MAX_CHANNELS),
            ("hidden", self.hidden, MAX_HIDDEN),
            ("step_history", self.step_history, MAX_HISTORY),
            ("grid", self.grid, 64),
            ("number of boundaries + 1", len(self.boundaries) + 1, MAX_STAGES),
            ("number of variants", len(self.variants), MAX_VARIANTS),
            *((f"history_sizes[{i}]", size, MAX_HISTORY) for i, size in enumerate(self.history_sizes)),
        ):
            if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= high:
                problems.append(f"{name} must be an integer from 1 to {high}, got {number!r}")
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            problems.append(f"variants {names} must have different names")
        for variant in self.variants:
            if not isinstance(variant.name, str) or not _NAME.fullmatch(variant.name):
                problems.append(f"variant name {variant.name!r} must match {_NAME.pattern}")
            try:
                Schedule.explicit(self.num_steps, variant.full_steps)
            except ValueError as error:
                problems.append(f"variant {variant.name!r}: {error}")
        if self.kind == "per_step" and self.history != "full_steps":
            problems.append(f"kind per_step looks back on full_steps, history is {self.history!r}")
        if len(self.history_sizes) != len(self.boundaries) + 1:
            problems.append(f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} history sizes")
        if problems:
            raise LesaError("predictor: " + "; ".join(problems))

    def _step_count_problems(self) -> list[str]:
        counts, problems = self.step_counts, []
        if not counts:
            return []
        if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_STEPS for n in counts):
            problems.append(f"step_counts must be integers from 1 to {MAX_STEPS}, got {list(counts)}")
        elif list(counts) != sorted(set(counts)):
            problems.append(f"step_counts must increase without repeats, got {list(counts)}")
        elif self.num_steps not in counts:
            problems.append(f"step_counts {list(counts)} must contain num_steps {self.num_steps}")
        if self.gate == "table":
            problems.append("a table gate serves one number of steps, step_counts names several")
        if any(variant.name == MIXED for variant in self.variants):
            problems.append(f"variant name {MIXED!r} is that of the experts for step_counts")
        return problems

    @property
    def step_range(self) -> tuple[int, int]:
        """Lowest and highest number of steps that it was trained on."""
        return (self.step_counts[0], self.step_counts[-1]) if self.step_counts else (self.num_steps, self.num_steps)

    @property
    def all_variants(self) -> tuple[Variant, ...]:
        """The budgets' experts and, where there are any, those for other numbers of steps."""
        return (*self.variants, *((MIXED_VARIANT,) if self.step_counts else ()))

    def kind_of(self, variant: Variant) -> str:
        """The form of a variant's predictions: that of relative experts is LESA's whatever the kind."""
        return "lesa" if variant.is_relative else self.kind

    def sizes_of(self, variant: Variant) -> tuple[int, ...]:
        """K of each noise stage's expert."""
        return (MIXED_HISTORY,) * len(self.history_sizes) if variant.is_relative else self.history_sizes

    def is_trained_for(self, schedule: Schedule) -> bool:
        """Whether some budget's experts were trained on exactly these full steps."""
        known = (variant.full_steps for variant in self.variants)
        return schedule.num_steps == self.num_steps and schedule.full_steps in known

    def variant_for(self, schedule: Schedule) -> Variant:
        """The experts trained for this schedule, else those for any number of steps, else those for the number of
        full steps nearest to its."""
        if self.step_counts and not self.is_trained_for(schedule):
            return MIXED_VARIANT

        def distance(variant: Variant) -> tuple[bool, int]:
            return variant.full_steps != schedule.full_steps, abs(variant.num_full - schedule.num_full)

        return min(self.variants, key=distance)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "step_counts": list(self.step_counts),
            "boundaries": list(self.boundaries),
            "history_sizes": list(self.history_sizes),
            "variants": [{"name": v.name, "full_steps": list(v.full_steps)} for v in self.variants],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PredictorSpec:
        """Strict inverse of `to_dict`; `ValueError` names every missing, unknown and malformed value."""
        known = {f.name for f in dataclasses.fields(cls)}
        if set(data) != known:
            raise LesaError(
                f"predictor: missing keys {sorted(known - set(data))}, unknown keys {sorted(set(data) - known)}"
            )
        problems: list[str] = []
        spec: PredictorSpec = build(cls, dict(data), "predictor", problems)
        if problems:
            raise LesaError("; ".join(problems))
        return spec
