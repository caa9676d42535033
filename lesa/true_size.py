"""What a schedule saves at a published model's size, where it matters, without the weights (`lesa.presets`)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lesa.flops import ModelFlops, count_transformer, predictor_bytes, predictor_flops
from lesa.model_call import Grid, call_inputs
from lesa.predictor import PredictorSpec, Variant
from lesa.presets import PRESETS, Preset
from lesa.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFlops:
    """Operations of one image or video, all branches."""

    name: str
    size: str
    text_tokens: int
    branches: int
    schedule: Schedule
    model: ModelFlops  # one transformer call
    predictor: float  # the predictor in the whole run
    plain: float  # every step full
    accelerated: float  # full steps, ends of predicted steps, predictor
    bytes_kept: dict[str, int]  # of the predictor in bfloat16, all branches: features, derived, weights

    @property
    def ratio(self) -> float:
        return self.plain / self.accelerated

    def to_dict(self) -> dict[str, Any]:
        """Plain values; operations in TFLOPs."""
        return {
            "family": self.name,
            "size": self.size,
            "text_tokens": self.text_tokens,
            "branches": self.branches,
            "schedule": self.schedule.to_dict(),
            "step_ratio": self.schedule.ratio,
            "full_call_tflops": self.model.total / 1e12,
            "predicted_call_tflops": self.model.ends / 1e12,
            "predictor_tflops": self.predictor / 1e12,
            "plain_tflops": self.plain / 1e12,
            "accelerated_tflops": self.accelerated / 1e12,
            "flops_ratio": self.ratio,
            "predictor_full_calls": self.predictor / (self.branches * self.model.total),
            "bytes_kept": self.bytes_kept,
        }

    def __str__(self) -> str:
        calls = "" if self.branches == 1 else f", {self.branches} guidance branches"
        return "\n".join(
            (
                f"{self.name}, {self.size}, {self.text_tokens} text tokens{calls}",
                f"  full call        {self.model.total / 1e12:10.2f} TFLOPs",
                f"  predicted call   {self.model.ends / 1e12:10.2f} TFLOPs",
                f"  predictor        {self.predictor / 1e12:10.2f} TFLOPs in the whole run, "
                f"{self.predictor / (self.branches * self.model.total):.3f} full steps",
                f"  bytes kept       {sum(self.bytes_kept.values()) / 1e9:10.3f} GB in bfloat16: "
                + ", ".join(f"{name} {size / 1e9:.3f}" for name, size in self.bytes_kept.items()),
                f"  plain            {self.plain / 1e12:10.1f} TFLOPs for {self.schedule.num_steps} steps",
                f"  accelerated      {self.accelerated / 1e12:10.1f} TFLOPs ({self.schedule})",
                f"  FLOPs ratio      {self.ratio:10.2f}x",
            )
        )


def family_flops(
    name: str, schedule: Schedule | None = None, spec: PredictorSpec | None = None
) -> FamilyFlops:
    """Operations of a published model under a schedule.

    Args:
        name: key of `PRESETS`.
        schedule: which steps are full; None is the model's default: 10 of 50, half of a distilled model's few.
        spec: the predictor, taken to the model's width (`at_true_width`). None is the default workload's form.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"{name!r} is not one of the model families with a true size: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if schedule is None:
        schedule = Schedule.uniform(preset.num_inference_steps, preset.interval, preset.warmup_steps)
    model = call_flops(meta_transformer(name), preset.grid, preset.text_tokens)
    if spec is None:
        spec = default_spec(model.channels, schedule.num_steps)
    elif spec.channels != model.channels:
        spec = at_true_width(spec, model.channels, schedule.num_steps)
    sigmas = preset_sigmas(preset, schedule.num_steps)
    predictor = preset.branches * predictor_flops(spec, schedule, sigmas, tokens=model.tokens)
    full, predicted = schedule.num_full, len(schedule.predicted_steps)
    held = predictor_bytes(spec, tokens=model.tokens)
    copies = {"features": preset.branches, "derived": preset.branches, "weights": 1}
    return FamilyFlops(
        name=name,
        size=preset.size,
        text_tokens=preset.text_tokens,
        branches=preset.branches,
        schedule=schedule,
        model=model,
        predictor=predictor,
        plain=preset.branches * schedule.num_steps * model.total,
        accelerated=preset.branches * (full * model.total + predicted * model.ends) + predictor,
        bytes_kept={part: size * copies[part] for part, size in held.items()},
    )


def at_true_width(spec: PredictorSpec, channels: int, num_steps: int) -> PredictorSpec:
    """A bundle's predictor at another model's width: same kind, history and stages, rank in proportion.

    Its variants are one that is never run: only widths are counted.
    """
    return dataclasses.replace(
        spec,
        channels=channels,
        num_steps=num_steps,
        rank=max(1, round(spec.rank * channels / spec.channels)),
        variants=(Variant(name="counted", full_steps=(0,)),),
        step_counts=(),
    )


def default_spec(channels: int, num_steps: int) -> PredictorSpec:
    """The default workload's predictor at a model's width: weights of each step, low rank of a quarter."""
    return PredictorSpec(
        channels=channels,
        num_steps=num_steps,
        boundaries=(0.8, 0.4),
        history_sizes=(2, 2, 2),
        variants=(Variant(name="counted", full_steps=(0,)),),
        kind="per_step",
        step_history=3,
        projection="low_rank",
        rank=channels // 4,
    )


@functools.cache
def meta_transformer(name: str) -> torch.nn.Module:
    """The transformer of a published model without memory for its weights."""
    import diffusers

    preset = PRESETS[name]
    with torch.device("meta"):
        return getattr(diffusers, preset.transformer_class)(**preset.config)


@functools.lru_cache(maxsize=32)
def call_flops(transformer: torch.nn.Module, grid: Grid, text_tokens: int) -> ModelFlops:
    """Operations of one call at a size of picture."""
    return count_transformer(transformer, (), call_inputs(transformer, grid, text_tokens))


def preset_sigmas(preset: Preset, num_steps: int) -> torch.Tensor:
    """[S + 1] noise levels as the model's pipeline sets them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**preset.scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps).tolist(), mu=preset.mu)
    return scheduler.sigmas
