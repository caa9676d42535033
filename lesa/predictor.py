"""Experts with their routing, as a sampler uses them: `h_hat = h_t + alpha z` (LESA, arXiv 2602.20497).

Torch alone: alpha is evaluated once when a schedule is bound, and z depends on the cached features alone, so it is
computed once an anchor; what is left for a predicted step is one multiply-add an element (kind `lesa`), or a few
with weights of the step's own (kind `per_step`, see `lesa.step_weights`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lesa import gate as gates
from lesa import projection as projections
from lesa import step_weights
from lesa.history import History
from lesa.schedule import Schedule, history_problems
from lesa.stages import boundary_problems, stage_of_steps

KINDS = ("lesa", "per_step")
MIXED = "mixed"  # name of the experts for other numbers of steps, beside those of the budgets
MIXED_HISTORY = 2  # K of these: the full steps that every carried schedule starts with
STEPS = "steps"  # name of a variant's step weights, where its stages have their numbers
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
MAX_CHANNELS, MAX_HISTORY, MAX_STAGES, MAX_VARIANTS, MAX_HIDDEN, MAX_STEPS = 65536, 16, 16, 32, 4096, 10000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Experts trained for one budget."""

    name: str
    full_steps: tuple[int, ...]  # the schedule they were trained on

    @property
    def num_full(self) -> int:
        return len(self.full_steps)


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
            ("projection", self.projection, projections.KINDS),
            ("gate", self.gate, gates.KINDS),
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
            raise ValueError("predictor: " + "; ".join(problems))

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

    def sizes_of(self, variant: Variant) -> tuple[int, ...]:
        """K of each noise stage's expert."""
        return (MIXED_HISTORY,) * len(self.history_sizes) if variant == MIXED_VARIANT else self.history_sizes

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
        """Strict inverse of `to_dict`; `ValueError` names missing and unknown keys."""
        known = {f.name for f in dataclasses.fields(cls)}
        if set(data) != known:
            raise ValueError(
                f"predictor: missing keys {sorted(known - set(data))}, unknown keys {sorted(set(data) - known)}"
            )
        try:
            return cls(
                **{
                    **data,
                    "boundaries": tuple(map(_number, data["boundaries"])),
                    "history_sizes": tuple(data["history_sizes"]),
                    "step_counts": tuple(data["step_counts"]),
                    "variants": tuple(_variant(**variant) for variant in data["variants"]),
                }
            )
        except (TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"predictor: malformed: {error}") from None


def _variant(*, name: Any, full_steps: Any) -> Variant:
    if not isinstance(full_steps, list):
        raise TypeError(f"full_steps must be a list, got {full_steps!r}")
    return Variant(name=name, full_steps=tuple(full_steps))


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


@dataclass(frozen=True)
class Predictor:
    """A spec with its tensors, named `<variant>/<stage>/projection.*`, `<variant>/<stage>/gate.*` and, with
    kind `per_step`, `<variant>/steps/*`.

    Experts for other numbers of steps (`MIXED`) have the LESA form whatever the kind, and a gate that multiplies
    first-order extrapolation: alpha = KAN(dt) dt_0 / (dt_1 - dt_0). So z is a slope in noise level, and what the gate
    has to learn changes little with the distance between steps.
    """

    spec: PredictorSpec
    tensors: Mapping[str, torch.Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        shapes = self.tensor_shapes(self.spec)
        problems = [f"missing tensor {name}" for name in sorted(shapes.keys() - self.tensors.keys())]
        problems += [f"unknown tensor {name}" for name in sorted(self.tensors.keys() - shapes.keys())]
        for name in sorted(shapes.keys() & self.tensors.keys()):
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shapes[name]:
                problems.append(f"tensor {name} has shape {tuple(tensor.shape)}, needs {shapes[name]}")
            elif not tensor.is_floating_point():
                problems.append(f"tensor {name} has dtype {tensor.dtype}, needs a floating one")
            elif not torch.isfinite(tensor).all():
                problems.append(f"tensor {name} has values that are not finite")
        if problems:
            raise ValueError("predictor: " + "; ".join(problems))

    @staticmethod
    def tensor_shapes(spec: PredictorSpec) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the spec calls for."""
        shapes: dict[str, tuple[int, ...]] = {}
        for variant in spec.all_variants:
            for stage, size in enumerate(spec.sizes_of(variant)):
                prefix = f"{variant.name}/{stage}/"
                of_projection = projections.projection_shapes(spec.projection, spec.channels, size, spec.rank)
                of_gate = gates.gate_shapes(spec.gate, size, spec.hidden, spec.grid, spec.num_steps)
                shapes |= {f"{prefix}projection.{name}": shape for name, shape in of_projection.items()}
                shapes |= {f"{prefix}gate.{name}": shape for name, shape in of_gate.items()}
            if spec.kind == "per_step" and variant != MIXED_VARIANT:
                of_steps = step_weights.step_weight_shapes(spec.num_steps, spec.step_history, spec.channels)
                shapes |= {f"{variant.name}/{STEPS}/{name}": shape for name, shape in of_steps.items()}
        return shapes

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def variant_for(self, schedule: Schedule) -> Variant:
        """As `PredictorSpec.variant_for`."""
        return self.spec.variant_for(schedule)

    def is_trained_for(self, schedule: Schedule) -> bool:
        """As `PredictorSpec.is_trained_for`."""
        return self.spec.is_trained_for(schedule)

    def step_tensors(self, variant: Variant) -> dict[str, torch.Tensor]:
        """The variant's step weights, named as in `lesa.step_weights`; empty with kind `lesa`."""
        prefix = f"{variant.name}/{STEPS}/"
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def expert(self, variant: Variant, stage: int, part: str) -> dict[str, torch.Tensor]:
        """One expert's tensors without their prefix; `part` is `projection` or `gate`."""
        prefix = f"{variant.name}/{stage}/{part}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def alphas(self, schedule: Schedule, sigmas: torch.Tensor) -> torch.Tensor:
        """[S] alpha of every step that has its expert's history (full steps too, for the error meter), else NaN.

        Args:
            schedule: the steps.
            sigmas: [S + 1] noise levels.

        Raises:
            ValueError: every predicted step whose history is too short or whose offsets were never trained on, or
                a number of steps outside `step_range`.
        """
        spec, variant = self.spec, self.variant_for(schedule)
        sizes, is_mixed = spec.sizes_of(variant), variant == MIXED_VARIANT
        low, high = spec.step_range
        if is_mixed and not low <= schedule.num_steps <= high:
            raise ValueError(f"num_inference_steps: got {schedule.num_steps}, the predictor serves {low} to {high}")
        if sigmas.shape != (schedule.num_steps + 1,):
            raise ValueError(
                f"schedule ({schedule}): needs {schedule.num_steps + 1} noise levels, got {list(sigmas.shape)}"
            )
        stages = stage_of_steps(sigmas, spec.boundaries)
        problems = []
        if spec.kind == "lesa" or is_mixed:  # weights of each step use what history there is, without the expert
            problems = history_problems(schedule, sizes, stages, spec.history)
        if spec.gate == "table" and schedule.num_steps != spec.num_steps:
            raise ValueError(
                f"schedule ({schedule}): the gate is a table of {spec.num_steps} steps and serves no other number"
            )
        untrained = spec.kind == "per_step" and not is_mixed and not self.is_trained_for(schedule)
        if untrained and schedule.predicted_steps:
            known = "; ".join(f"{v.name}: {list(v.full_steps)}" for v in spec.variants)
            problems.append(f"weights of each step serve the full steps they were trained for only ({known})")
        result = torch.full((schedule.num_steps,), float("nan"), dtype=torch.float64)
        for stage, size in enumerate(sizes):
            tensors = {name: t.double() for name, t in self.expert(variant, stage, "gate").items()}
            past = {
                step: gates.history_steps(schedule, step, size, spec.history)
                for step in range(schedule.num_steps)
                if stages[step] == stage
            }
            steps = [step for step, entries in past.items() if len(entries) == size]
            if not steps:
                continue
            dt = torch.stack([gates.offsets(sigmas.double(), step, past[step]) for step in steps])
            strange = gates.out_of_range(dt, tensors["low"], tensors["high"]) & torch.tensor(
                [not schedule.is_full(step) for step in steps]
            )
            if strange.any():
                at = [step for step, bad in zip(steps, strange.tolist(), strict=True) if bad]
                problems.append(
                    f"steps {at} of noise stage {stage} look back over noise-level offsets outside the range the "
                    f"experts {variant.name!r} were trained on; use a budget of the bundle or train for this schedule"
                )
            found = gates.alpha(spec.gate, tensors, dt, steps)
            result[steps] = found = found * gates.linear_alpha(dt) if is_mixed else found
            finite = dict(zip(steps, found.isfinite().tolist(), strict=True))
            bad = [step for step in steps if not finite[step] and not schedule.is_full(step)]
            if bad:
                problems.append(f"alpha of noise stage {stage} is not finite at steps {bad}: the gate is damaged")
        if problems:
            raise ValueError(f"schedule ({schedule}): " + "; ".join(problems))
        return result

    def bind(
        self,
        schedule: Schedule,
        sigmas: torch.Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> BoundPredictor:
        """Fix the schedule: alphas evaluated, weights folded, cast and moved.

        Raises:
            ValueError: as `alphas`.
        """
        alphas = self.alphas(schedule, sigmas)
        variant = self.variant_for(schedule)
        stages, sizes = stage_of_steps(sigmas, self.spec.boundaries), self.spec.sizes_of(variant)
        parts = {stage: self.expert(variant, stage, "projection") for stage in sorted(set(stages))}
        by_step: dict[str, torch.Tensor] = {}
        if self.spec.kind == "per_step" and self.is_trained_for(schedule):
            by_step = fold_step_weights(self.step_tensors(variant), parts, stages, alphas)
            parts = {stage: projections.without_channel_part(tensors) for stage, tensors in parts.items()}
        experts = {
            stage: {
                name: tensor.to(device=device, dtype=dtype) for name, tensor in projections.fold(tensors).items()
            }
            for stage, tensors in parts.items()
        }
        return BoundPredictor(
            name=f"lesa[{variant.name}]",
            history_size=max(*sizes, self.spec.step_history if by_step else 1),
            keeps_predictions=self.spec.history == "steps",
            alphas=tuple(alphas.tolist()),
            stages=tuple(stages),
            # Weights of each step can say something from one feature on.
            sizes=(1,) * len(sizes) if by_step else sizes,
            expert_sizes=sizes,
            experts=experts,
            by_step={name: tensor.to(device=device, dtype=dtype) for name, tensor in by_step.items()},
        )


def fold_step_weights(
    own: Mapping[str, torch.Tensor],
    experts: Mapping[int, Mapping[str, torch.Tensor]],
    stages: Sequence[int],
    alphas: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Step weights that hold the per-channel part of `alpha z` too: it costs nothing more at a predicted step.

    Args:
        own: `weight` [S, K, C] and `bias` [S, C].
        experts: projection tensors of each noise stage.
        stages: of each step.
        alphas: [S]; NaN where there is no prediction.
    """
    num_steps, size, channels = own["weight"].shape
    deepest = max(size, *(tensors["scale"].shape[0] for tensors in experts.values()))
    weight = torch.zeros(num_steps, deepest, channels)
    weight[:, :size] = own["weight"]
    bias = own["bias"].float().clone()
    for step, (stage, alpha) in enumerate(zip(stages, alphas.tolist(), strict=True)):
        if not math.isnan(alpha):
            scale = step_weights.in_differences(experts[stage]["scale"].float())
            weight[step, : len(scale)] += alpha * scale
            bias[step] += alpha * experts[stage]["bias"].float()
    return {"weight": weight, "bias": bias}


@dataclass(frozen=True, kw_only=True)
class BoundPredictor:
    """A predictor on one schedule: a `lesa.forecast.Rule`."""

    name: str
    history_size: int
    keeps_predictions: bool
    alphas: tuple[float, ...]  # of each step; NaN where the history is too short
    stages: tuple[int, ...]  # noise stage of each step
    sizes: tuple[int, ...]  # features that a prediction needs, of each stage
    expert_sizes: tuple[int, ...]  # K of each stage's expert
    experts: Mapping[int, Mapping[str, torch.Tensor]] = field(repr=False)
    by_step: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)  # step weights, folded

    def __call__(self, history: History, step: int) -> torch.Tensor:
        newest = history.features[0]
        if not self.by_step:
            return torch.add(newest, self._z(history, step), alpha=self.alphas[step])
        weight = self.by_step["weight"][step]
        # Summed up before the feature is added: in low precision one rounding at its size, not one a term.
        change = step_weights.correction(newest, self._differences(history), weight, self.by_step["bias"][step])
        if self.experts[self.stages[step]] and not math.isnan(self.alphas[step]):
            change.add_(self._z(history, step), alpha=self.alphas[step])
        return change.add_(newest)

    def _z(self, history: History, step: int) -> torch.Tensor:
        stage = self.stages[step]
        z = history.memo.get(stage)
        if z is None:
            size = self.expert_sizes[stage]
            for earlier in [key for key in history.memo if isinstance(key, int)]:
                del history.memo[earlier]  # a run goes through each noise stage once
            history.memo[stage] = z = projections.project_folded(history.features[:size], self.experts[stage])
        return z

    def _differences(self, history: History) -> list[torch.Tensor]:
        found = [history.memo[key] for key in sorted(k for k in history.memo if isinstance(k, str))]
        if not found and len(history.features) > 1:
            found = step_weights.differences(history.features, self.by_step["weight"].shape[1])
            history.memo |= {f"difference{index:02d}": change for index, change in enumerate(found)}
        return found

    @property
    def nbytes(self) -> int:
        tensors = [*self.by_step.values(), *(t for expert in self.experts.values() for t in expert.values())]
        return sum(t.numel() * t.element_size() for t in tensors)
