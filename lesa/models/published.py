"""The published models this project is made for, as rows, and what a schedule saves at their size without weights."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lesa.errors import LesaError
from lesa.models.flops import Grid, ModelFlops, call_inputs, count_transformer, predictor_bytes, predictor_flops
from lesa.params import CallParams
from lesa.predictor.spec import PredictorSpec, Variant
from lesa.schedule import Schedule

PIXELS_PER_TOKEN = 16  # autoencoder 8, patches of 2, in every family of the table
FRAMES_PER_LATENT = 4  # of HunyuanVideo's autoencoder
_T5_XXL, _CLIP_L, _LLAMA_3_8B, _QWEN_VL_7B = 4_762_310_656, 123_060_480, 7_505_186_816, 8_292_166_656


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One published model, with the call that its makers recommend."""

    name: str  # of its workload too
    source: str | None  # hub id of its diffusers pipeline; None where there is none ready to load
    license: str  # in a word; what is binding is the model's own page
    transformer_class: str
    config: dict[str, Any]  # what differs from the class's defaults
    call: CallParams
    text_tokens: int  # that a call is counted with; fewer than its most where prompts are not padded to it
    parts: dict[str, int]  # parameters of what the pipeline loads beside the transformer
    scheduler: dict[str, Any] = field(default_factory=dict)  # configuration of the flow-matching scheduler
    mu: float | None = None  # the shift at this size, where it is dynamic
    interval: int = 7  # LESA's default: 10 full steps of 50, half of a distilled model's few
    warmup_steps: int = 3

    @property
    def num_inference_steps(self) -> int:
        return self.call.num_inference_steps

    @property
    def branches(self) -> int:
        """Transformer calls a step: two with classifier-free guidance."""
        return 2 if (self.call.true_cfg_scale or 0.0) > 1.0 else 1

    @property
    def grid(self) -> Grid:
        """Image tokens: latent frames, rows, columns."""
        frames = 1 if self.call.num_frames is None else (self.call.num_frames - 1) // FRAMES_PER_LATENT + 1
        return frames, self.call.height // PIXELS_PER_TOKEN, self.call.width // PIXELS_PER_TOKEN

    @property
    def size(self) -> str:
        video = "" if self.call.num_frames is None else f", {self.call.num_frames} frames"
        return f"{self.call.height}x{self.call.width}{video}"


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


_FLUX_PARTS = {"text_encoder": _CLIP_L, "text_encoder_2": _T5_XXL, "vae": 83_819_683}
_QWEN_PARTS = {"text_encoder": _QWEN_VL_7B, "vae": 126_892_531}
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
            source="black-forest-labs/FLUX.1-dev",
            license="FLUX.1 [dev] non-commercial",
            transformer_class="FluxTransformer2DModel",
            config=_flux_config(guidance=True),
            call=CallParams(
                num_inference_steps=50, height=1024, width=1024, guidance_scale=3.5, max_sequence_length=512
            ),
            text_tokens=512,
            parts=_FLUX_PARTS,
            scheduler={"use_dynamic_shifting": True, "shift": 3.0},
            mu=1.15,
        ),
        Preset(
            name="flux-schnell",
            source="black-forest-labs/FLUX.1-schnell",
            license="Apache-2.0",
            transformer_class="FluxTransformer2DModel",
            config=_flux_config(guidance=False),
            call=CallParams(num_inference_steps=4, height=1024, width=1024, max_sequence_length=256),
            text_tokens=256,
            parts=_FLUX_PARTS,
            scheduler={"shift": 1.0},
            interval=3,
            warmup_steps=0,
        ),
        Preset(
            name="qwen-image",
            source="Qwen/Qwen-Image",
            license="Apache-2.0",
            transformer_class="QwenImageTransformer2DModel",
            config=_QWEN_CONFIG,
            call=CallParams(
                num_inference_steps=50, height=1328, width=1328, true_cfg_scale=4.0, max_sequence_length=512
            ),
            text_tokens=128,
            parts=_QWEN_PARTS,
            scheduler={"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02},
            mu=0.8343,
        ),
        Preset(
            name="qwen-image-lightning",
            source=None,  # published as an adapter of Qwen-Image
            license="Apache-2.0",
            transformer_class="QwenImageTransformer2DModel",
            config=_QWEN_CONFIG,
            call=CallParams(
                num_inference_steps=8, height=1328, width=1328, true_cfg_scale=1.0, max_sequence_length=512
            ),
            text_tokens=128,
            parts=_QWEN_PARTS,
            scheduler={"use_dynamic_shifting": True},
            mu=1.0986,  # ln 3 at every size
            interval=3,
            warmup_steps=2,
        ),
        Preset(
            name="hunyuan-video",
            source="hunyuanvideo-community/HunyuanVideo",
            license="Tencent Hunyuan community licence",
            transformer_class="HunyuanVideoTransformer3DModel",
            config=_HUNYUAN_CONFIG,
            call=CallParams(
                num_inference_steps=50,
                height=480,
                width=640,
                num_frames=65,
                guidance_scale=6.0,
                max_sequence_length=256,
            ),
            text_tokens=256,
            parts={"text_encoder": _LLAMA_3_8B, "text_encoder_2": _CLIP_L, "vae": 246_478_803},
            scheduler={"shift": 7.0},
        ),
    )
}


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
    accelerated: float  # full steps, output head of predicted steps, predictor
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
            "predicted_call_tflops": self.model.head / 1e12,
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
                f"  predicted call   {self.model.head / 1e12:10.2f} TFLOPs",
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
        raise LesaError(f"{name!r} is not one of the model families with a true size: {', '.join(PRESETS)}")
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
        accelerated=preset.branches * (full * model.total + predicted * model.head) + predictor,
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
    """Operations of one call with so many image and text tokens."""
    return count_transformer(transformer, (), call_inputs(transformer, grid, text_tokens))


def preset_sigmas(preset: Preset, num_steps: int) -> torch.Tensor:
    """[S + 1] noise levels as the model's pipeline sets them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**preset.scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps).tolist(), mu=preset.mu)
    return scheduler.sigmas
