"""Model families at their published sizes: what a schedule saves where it matters, without the weights.

Configurations are the published models' own numbers. Text lengths reproduce the operations the papers print
for one transformer call: FLUX.1-dev 74.38 TFLOPs (4096 image and 512 text tokens), Qwen-Image 131.7 a
guidance branch (6889 and 128), HunyuanVideo 595.4 (20400 and 256).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lesa.flops import ModelFlops, count_transformer, predictor_bytes, predictor_flops
from lesa.predictor import PredictorSpec, Variant
from lesa.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One published model at one size of picture."""

    name: str
    transformer_class: str
    config: dict[str, Any]  # what differs from the class's defaults
    inputs: Callable[[], dict[str, Any]]  # keyword arguments of one call, on the meta device
    num_inference_steps: int
    size: str
    text_tokens: int
    branches: int = 1  # transformer calls a step
    scheduler: dict[str, Any] = field(default_factory=dict)  # configuration of the flow-matching scheduler
    mu: float | None = None  # the shift at this size, where it is dynamic
    interval: int = 7  # LESA's default: 10 full steps of 50, half of a distilled model's few
    warmup_steps: int = 3


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
        schedule: which steps are full; None is LESA's default, interval 7 after three warm-up steps, or for
        models
            of fewer than 20 steps interval 3 after one.
        spec: the predictor, taken to the model's width (`at_true_width`). None is a dense one, history 3 in
            three stages.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"{name!r} is not one of the model families with a true size: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if schedule is None:
        schedule = Schedule.uniform(preset.num_inference_steps, preset.interval, preset.warmup_steps)
    import diffusers

    with torch.device("meta"):
        transformer = getattr(diffusers, preset.transformer_class)(**preset.config)
        model = count_transformer(transformer, (), preset.inputs())
    if spec is None:
        spec = dense_spec(model.channels, schedule)
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


def dense_spec(channels: int, schedule: Schedule) -> PredictorSpec:
    """The largest predictor in use here: dense W, history 3, three noise stages."""
    return PredictorSpec(
        channels=channels,
        num_steps=schedule.num_steps,
        boundaries=(0.8, 0.4),
        history_sizes=(3, 3, 3),
        variants=(Variant(name="default", full_steps=schedule.full_steps),),
    )


def preset_sigmas(preset: Preset, num_steps: int) -> torch.Tensor:
    """[S + 1] noise levels as the model's pipeline sets them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**preset.scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps).tolist(), mu=preset.mu)
    return scheduler.sigmas


def _flux_inputs(image_tokens: int, text_tokens: int, guidance: bool) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": _meta(1, image_tokens, 64),
            "encoder_hidden_states": _meta(1, text_tokens, 4096),
            "pooled_projections": _meta(1, 768),
            "timestep": _meta(1),
            "img_ids": _meta(image_tokens, 3),
            "txt_ids": _meta(text_tokens, 3),
            "guidance": _meta(1) if guidance else None,
        }

    return inputs


def _qwen_inputs(side: int, text_tokens: int) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": _meta(1, side * side, 64),
            "encoder_hidden_states": _meta(1, text_tokens, 3584),
            "timestep": _meta(1),
            "img_shapes": [[(1, side, side)]],
        }

    return inputs


def _hunyuan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _meta(1, 16, 17, 60, 80),  # 65 frames of 480 x 640 pixels
        "encoder_hidden_states": _meta(1, 256, 4096),
        "encoder_attention_mask": _meta(1, 256),
        "pooled_projections": _meta(1, 768),
        "timestep": _meta(1),
        "guidance": _meta(1),
    }


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def _flux_config(guidance: bool) -> dict[str, Any]:
    return {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": guidance,
        "axes_dims_rope": (16, 56, 56),
    }


_QWEN_CONFIG = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}
_HUNYUAN_CONFIG = {
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="flux-dev",
            transformer_class="FluxTransformer2DModel",
            config=_flux_config(guidance=True),
            inputs=_flux_inputs(4096, 512, guidance=True),
            num_inference_steps=50,
            size="1024x1024",
            text_tokens=512,
            scheduler={"use_dynamic_shifting": True, "shift": 3.0},
            mu=1.15,
        ),
        Preset(
            name="flux-schnell",
            transformer_class="FluxTransformer2DModel",
            config=_flux_config(guidance=False),
            inputs=_flux_inputs(4096, 256, guidance=False),
            num_inference_steps=4,
            size="1024x1024",
            text_tokens=256,
            scheduler={"shift": 1.0},
            interval=3,
            warmup_steps=0,
        ),
        Preset(
            name="qwen-image",
            transformer_class="QwenImageTransformer2DModel",
            config=_QWEN_CONFIG,
            inputs=_qwen_inputs(83, 128),
            num_inference_steps=50,
            size="1328x1328",
            text_tokens=128,
            branches=2,
            scheduler={"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02},
            mu=0.8343,
        ),
        Preset(
            name="qwen-image-lightning",
            transformer_class="QwenImageTransformer2DModel",
            config=_QWEN_CONFIG,
            inputs=_qwen_inputs(83, 128),
            num_inference_steps=8,
            size="1328x1328",
            text_tokens=128,
            scheduler={"use_dynamic_shifting": True},
            mu=1.0986,  # ln 3 at every size
            interval=3,
            warmup_steps=2,
        ),
        Preset(
            name="hunyuan-video",
            transformer_class="HunyuanVideoTransformer3DModel",
            config=_HUNYUAN_CONFIG,
            inputs=_hunyuan_inputs,
            num_inference_steps=50,
            size="480x640, 65 frames",
            text_tokens=256,
            scheduler={"shift": 7.0},
        ),
    )
}
