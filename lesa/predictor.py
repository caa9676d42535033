"""Experts with their routing, as a sampler uses them: `h_hat = h_t + alpha z` (LESA, arXiv 2602.20497).

Torch alone: alpha is evaluated once when a schedule is bound, and z depends on the cached features alone, so it is
computed once an anchor; what is left for a predicted step is one multiply-add an element.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lesa import gate as gates
from lesa import projection as projections
from lesa.history import History
from lesa.schedule import Schedule, history_problems
from lesa.stages import boundary_problems, stage_of_steps

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
MAX_CHANNELS, MAX_HISTORY, MAX_STAGES, MAX_VARIANTS, MAX_HIDDEN, MAX_STEPS = 65536, 16, 16, 32, 4096, 10000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Experts trained for one budget."""

    name: str
    num_full: int


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
    history: str = "full_steps"
    projection: str = "dense"
    rank: int = 32
    gate: str = "kan"
    hidden: int = 8
    grid: int = 5

    def __post_init__(self) -> None:
        problems = list(boundary_problems(self.boundaries))
        for name, value, known in (
            ("kind", self.kind, ("lesa",)),
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
            full = variant.num_full
            if not isinstance(full, int) or isinstance(full, bool) or full < 1:
                problems.append(f"num_full of variant {variant.name!r} must be an integer of at least 1, got {full!r}")
        if len(self.history_sizes) != len(self.boundaries) + 1:
            problems.append(f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} history sizes")
        if problems:
            raise ValueError("predictor: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "boundaries": list(self.boundaries),
            "history_sizes": list(self.history_sizes),
            "variants": [dataclasses.asdict(variant) for variant in self.variants],
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
                    "variants": tuple(Variant(**variant) for variant in data["variants"]),
                }
            )
        except (TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"predictor: malformed: {error}") from None


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


@dataclass(frozen=True)
class Predictor:
    """A spec with its tensors, named `<variant>/<stage>/projection.*` and `<variant>/<stage>/gate.*`."""

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
        for variant in spec.variants:
            for stage, size in enumerate(spec.history_sizes):
                prefix = f"{variant.name}/{stage}/"
                of_projection = projections.projection_shapes(spec.projection, spec.channels, size, spec.rank)
                of_gate = gates.gate_shapes(spec.gate, size, spec.hidden, spec.grid, spec.num_steps)
                shapes |= {f"{prefix}projection.{name}": shape for name, shape in of_projection.items()}
                shapes |= {f"{prefix}gate.{name}": shape for name, shape in of_gate.items()}
        return shapes

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def variant_for(self, schedule: Schedule) -> Variant:
        """The experts trained for the number of full steps nearest to the schedule's."""
        return min(self.spec.variants, key=lambda variant: abs(variant.num_full - schedule.num_full))

    def expert(self, variant: Variant, stage: int, part: str) -> dict[str, torch.Tensor]:
        """One expert's tensors without their prefix; `part` is `projection` or `gate`."""
        prefix = f"{variant.name}/{stage}/{part}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def alphas(self, schedule: Schedule, sigmas: torch.Tensor) -> torch.Tensor:
        """[S] alpha of every step that has enough history (full steps too, for the error meter), else NaN.

        Args:
            schedule: the steps.
            sigmas: [S + 1] noise levels.

        Raises:
            ValueError: every predicted step whose history is too short or whose offsets were never trained on.
        """
        spec, variant = self.spec, self.variant_for(schedule)
        if sigmas.shape != (schedule.num_steps + 1,):
            raise ValueError(
                f"schedule ({schedule}): needs {schedule.num_steps + 1} noise levels, got {list(sigmas.shape)}"
            )
        stages = stage_of_steps(sigmas, spec.boundaries)
        problems = history_problems(schedule, spec.history_sizes, stages, spec.history)
        if spec.gate == "table" and schedule.num_steps != spec.num_steps:
            raise ValueError(
                f"schedule ({schedule}): the gate is a table of {spec.num_steps} steps and serves no other number"
            )
        result = torch.full((schedule.num_steps,), float("nan"), dtype=torch.float64)
        for stage, size in enumerate(spec.history_sizes):
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
            result[steps] = found = gates.alpha(spec.gate, tensors, dt, steps)
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
        stages = stage_of_steps(sigmas, self.spec.boundaries)
        experts = {
            stage: {
                name: tensor.to(device=device, dtype=dtype)
                for name, tensor in projections.fold(self.expert(variant, stage, "projection")).items()
            }
            for stage in sorted(set(stages))
        }
        return BoundPredictor(
            name=f"lesa[{variant.name}]",
            history_size=max(self.spec.history_sizes),
            keeps_predictions=self.spec.history == "steps",
            alphas=tuple(alphas.tolist()),
            stages=tuple(stages),
            sizes=self.spec.history_sizes,
            experts=experts,
        )


@dataclass(frozen=True, kw_only=True)
class BoundPredictor:
    """A predictor on one schedule: a `lesa.forecast.Rule`."""

    name: str
    history_size: int
    keeps_predictions: bool
    alphas: tuple[float, ...]  # of each step; NaN where the history is too short
    stages: tuple[int, ...]  # noise stage of each step
    sizes: tuple[int, ...]  # K of each stage
    experts: Mapping[int, Mapping[str, torch.Tensor]] = field(repr=False)

    def __call__(self, history: History, step: int) -> torch.Tensor:
        stage = self.stages[step]
        z = history.memo.get(stage)
        if z is None:
            size = self.sizes[stage]
            z = projections.project_folded(history.features[:size], self.experts[stage])
            history.memo[stage] = z
        return torch.add(history.features[0], z, alpha=self.alphas[step])

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for expert in self.experts.values() for t in expert.values())
