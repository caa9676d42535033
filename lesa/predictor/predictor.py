"""Experts with their routing, as a sampler uses them: `h_hat = h_t + alpha z` (LESA, arXiv 2602.20497).

Torch alone: alpha is evaluated once when a schedule is bound, and z depends on the cached features alone, so it is
computed once an anchor; what is left for a predicted step is one multiply-add an element (kind `lesa`), or a few
with weights of the step's own (kind `per_step`, see `lesa.training.step_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lesa.errors import LesaError
from lesa.predictor import projection as projections
from lesa.predictor import step_weights
from lesa.predictor.alpha import evaluate_alpha, gate_shapes, history_steps, linear_alpha, out_of_range, time_offsets
from lesa.predictor.rule import History
from lesa.predictor.spec import STEPS, PredictorSpec, Variant
from lesa.schedule import Schedule, history_problems, stage_of_steps


@dataclass(frozen=True)
class Predictor:
    """A spec with its tensors, named `<variant>/<stage>/projection.*`, `<variant>/<stage>/gate.*` and, with
    kind `per_step`, `<variant>/steps/*`.

    Experts for other numbers of steps (`Variant.is_relative`) have the LESA form whatever the kind, and a gate that
    multiplies first-order extrapolation: alpha = KAN(dt) dt_0 / (dt_1 - dt_0). So z is a slope in noise level, and what
    the gate has to learn changes little with the distance between steps.
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
            raise LesaError("predictor: " + "; ".join(problems))

    @staticmethod
    def tensor_shapes(spec: PredictorSpec) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the spec calls for."""
        shapes: dict[str, tuple[int, ...]] = {}
        for variant in spec.all_variants:
            for stage, size in enumerate(spec.sizes_of(variant)):
                prefix = f"{variant.name}/{stage}/"
                projection = projections.projection_shapes(spec.projection, spec.channels, size, spec.rank)
                gate = gate_shapes(spec.gate, size, spec.hidden, spec.grid, spec.num_steps)
                shapes |= {f"{prefix}projection.{name}": shape for name, shape in projection.items()}
                shapes |= {f"{prefix}gate.{name}": shape for name, shape in gate.items()}
            if spec.kind_of(variant) == "per_step":
                steps = step_weights.step_weight_shapes(spec.num_steps, spec.step_history, spec.channels)
                shapes |= {f"{variant.name}/{STEPS}/{name}": shape for name, shape in steps.items()}
        return shapes

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def step_tensors(self, variant: Variant) -> dict[str, torch.Tensor]:
        """The variant's step weights, named as in `lesa.training.step_weights`; empty with kind `lesa`."""
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
        variant = self.spec.variant_for(schedule)
        self._refuse_unserved(schedule, sigmas, variant)
        stages = stage_of_steps(sigmas, self.spec.boundaries)
        problems = self._schedule_problems(schedule, stages, variant)
        result = torch.full((schedule.num_steps,), float("nan"), dtype=torch.float64)
        for stage, size in enumerate(self.spec.sizes_of(variant)):
            steps = [step for step in range(schedule.num_steps) if stages[step] == stage]
            past = {step: history_steps(schedule, step, size, self.spec.history) for step in steps}
            past = {step: entries for step, entries in past.items() if len(entries) == size}
            if past:
                result[list(past)], further = self._stage_alphas(schedule, sigmas, variant, stage, past)
                problems += further
        if problems:
            raise LesaError(f"schedule ({schedule}): " + "; ".join(problems))
        return result

    def _refuse_unserved(self, schedule: Schedule, sigmas: torch.Tensor, variant: Variant) -> None:
        """A number of steps that no full steps would make it serve."""
        low, high = self.spec.step_range
        if variant.is_relative and not low <= schedule.num_steps <= high:
            raise LesaError(f"num_inference_steps: got {schedule.num_steps}, the predictor serves {low} to {high}")
        if sigmas.shape != (schedule.num_steps + 1,):
            raise LesaError(
                f"schedule ({schedule}): needs {schedule.num_steps + 1} noise levels, got {list(sigmas.shape)}"
            )
        if self.spec.gate == "table" and schedule.num_steps != self.spec.num_steps:
            raise LesaError(
                f"schedule ({schedule}): the gate is a table of {self.spec.num_steps} steps and serves no other number"
            )

    def _schedule_problems(self, schedule: Schedule, stages: Sequence[int], variant: Variant) -> list[str]:
        """Histories that are too short for their experts, or full steps that the steps' weights were not made for."""
        spec = self.spec
        if spec.kind_of(variant) == "lesa":  # weights of each step use what history there is, without the expert
            return history_problems(schedule, spec.sizes_of(variant), stages, spec.history)
        if spec.is_trained_for(schedule) or not schedule.predicted_steps:
            return []
        known = "; ".join(f"{v.name}: {list(v.full_steps)}" for v in spec.variants)
        return [f"weights of each step serve the full steps they were trained for only ({known})"]

    def _stage_alphas(
        self,
        schedule: Schedule,
        sigmas: torch.Tensor,
        variant: Variant,
        stage: int,
        past: Mapping[int, Sequence[int]],  # step -> the steps it looks back on, newest first
    ) -> tuple[torch.Tensor, list[str]]:
        """Alphas [N] of one noise stage's steps, and what is wrong with those of predicted steps."""
        steps, problems = list(past), []
        tensors = {name: tensor.double() for name, tensor in self.expert(variant, stage, "gate").items()}
        dt = torch.stack([time_offsets(sigmas.double(), step, past[step]) for step in steps])
        alphas = evaluate_alpha(self.spec.gate, tensors, dt, steps)
        if variant.is_relative:
            alphas = alphas * linear_alpha(dt)
        predicted = torch.tensor([not schedule.is_full(step) for step in steps])
        untrained = (out_of_range(dt, tensors["low"], tensors["high"]) & predicted).tolist()
        if any(untrained):
            at = [step for step, outside in zip(steps, untrained, strict=True) if outside]
            problems.append(
                f"steps {at} of noise stage {stage} look back over noise-level offsets outside the range the "
                f"experts {variant.name!r} were trained on; use a budget of the bundle or train for this schedule"
            )
        damaged = (~alphas.isfinite() & predicted).tolist()
        if any(damaged):
            at = [step for step, bad in zip(steps, damaged, strict=True) if bad]
            problems.append(f"alpha of noise stage {stage} is not finite at steps {at}: the gate is damaged")
        return alphas, problems

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
        variant = self.spec.variant_for(schedule)
        stages, sizes = stage_of_steps(sigmas, self.spec.boundaries), self.spec.sizes_of(variant)
        parts = {stage: self.expert(variant, stage, "projection") for stage in sorted(set(stages))}
        by_step: dict[str, torch.Tensor] = {}
        if self.spec.kind == "per_step" and self.spec.is_trained_for(schedule):
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
            # Weights of each step predict from one feature on.
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
            scale = step_weights.to_difference_weights(experts[stage]["scale"].float())
            weight[step, : len(scale)] += alpha * scale
            bias[step] += alpha * experts[stage]["bias"].float()
    return {"weight": weight, "bias": bias}


@dataclass(frozen=True, kw_only=True)
class BoundPredictor:
    """A predictor on one schedule: a `lesa.predictor.rule.Rule`."""

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
        z = history.memo.get(("lesa z", stage))
        if z is None:
            for other in range(len(self.expert_sizes)):  # a run goes through each noise stage once
                history.memo.pop(("lesa z", other), None)
            z = projections.project_folded(history.features[: self.expert_sizes[stage]], self.experts[stage])
            history.memo["lesa z", stage] = z
        return z

    def _differences(self, history: History) -> list[torch.Tensor]:
        size = min(len(history.features), self.by_step["weight"].shape[1])
        keys = [("lesa difference", age) for age in range(size - 1)]
        if keys and keys[0] not in history.memo:
            history.memo |= zip(keys, step_weights.differences(history.features, size), strict=True)
        return [history.memo[key] for key in keys]

    @property
    def nbytes(self) -> int:
        tensors = [*self.by_step.values(), *(t for expert in self.experts.values() for t in expert.values())]
        return sum(t.numel() * t.element_size() for t in tensors)
