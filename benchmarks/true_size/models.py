"""Published models with random weights in their real pipelines, at true size or small enough for a test.

A pipeline here has a transformer and a scheduler alone and is called with made-up text embeddings: the sampler's loop
is the pipeline's own, and text encoders and decoder, which no cache touches, take no memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import torch

from lesa.models.families import FAMILIES
from lesa.models.published import FRAMES_PER_LATENT, PIXELS_PER_TOKEN, PRESETS, Preset

FAMILY_NAMES = ("flux-dev", "qwen-image", "hunyuan-video")  # one of each architecture, 50 steps
RESERVE = 8 << 30  # bytes beside the weights that a run of one sample may need
_TEXT_WIDTH = 32
_SMALL: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": _TEXT_WIDTH,
        "pooled_projection_dim": _TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    },
    "QwenImageTransformer2DModel": {
        "num_layers": 3,
        "joint_attention_dim": _TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    },
    "HunyuanVideoTransformer3DModel": {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": _TEXT_WIDTH,
        "pooled_projection_dim": _TEXT_WIDTH,
        "rope_axes_dim": (4, 6, 6),
    },
}


def preset_at(name: str, scale: str) -> Preset:
    """The preset at `true` size, or `small`: same classes and scheduler, a width of 64 and a handful of tokens."""
    preset = PRESETS[name]
    if scale == "true":
        return preset
    num_frames = None if preset.call.num_frames is None else FRAMES_PER_LATENT + 1  # two latent frames
    side = 4 * PIXELS_PER_TOKEN
    return dataclasses.replace(
        preset,
        config=preset.config
        | _SMALL[preset.transformer_class]
        | {"attention_head_dim": 16, "num_attention_heads": 4},
        call=dataclasses.replace(preset.call, height=side, width=side, num_frames=num_frames),
        text_tokens=8,
    )


def build_transformer(preset: Preset, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer with default random weights, made on the device in `dtype`: no copy in float32 on the way.

    Raises:
        ValueError: the GPU has not the memory free that the weights and a run need.
    """
    model_class = getattr(diffusers, preset.transformer_class)
    if device.type == "cuda":
        with torch.device("meta"):
            numbers = sum(parameter.numel() for parameter in model_class(**preset.config).parameters())
        need, (free, _) = numbers * dtype.itemsize + RESERVE, torch.cuda.mem_get_info(device)
        if need > free:
            raise ValueError(
                f"{preset.name}: weights and a run need about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free "
                "on this GPU; end what else runs on it or take a larger one"
            )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = model_class(**preset.config)
    finally:
        torch.set_default_dtype(before)
    return transformer.eval().requires_grad_(False)


def build_pipeline(preset: Preset, device: torch.device, dtype: torch.dtype) -> Any:
    """The model's pipeline class around a random transformer; everything else but the scheduler is None."""
    family = next(row for row in FAMILIES.values() if row.transformer_class == preset.transformer_class)
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    parts = dict.fromkeys(pipeline_class._get_signature_types())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**preset.scheduler)
    transformer = build_transformer(preset, device, dtype)
    pipe = pipeline_class(**{**parts, "scheduler": scheduler, "transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(preset: Preset, pipe: Any) -> dict[str, Any]:
    """What the pipeline is called with: embeddings instead of prompts, latents instead of pictures."""
    frames, rows, columns = preset.grid
    config = pipe.transformer.config
    kind = {"device": pipe.transformer.device, "dtype": pipe.transformer.dtype}
    arguments: dict[str, Any] = {
        "height": rows * PIXELS_PER_TOKEN,
        "width": columns * PIXELS_PER_TOKEN,
        "num_inference_steps": preset.num_inference_steps,
        "output_type": "latent",
        "return_dict": False,
    }
    width = config.text_embed_dim if "text_embed_dim" in config else config.joint_attention_dim
    text = torch.randn(1, preset.text_tokens, width, **kind)
    if preset.transformer_class.startswith("Qwen"):
        mask = torch.ones(1, preset.text_tokens, device=kind["device"], dtype=torch.long)
        other = torch.randn_like(text)
        arguments |= {"prompt_embeds": text, "prompt_embeds_mask": mask, "true_cfg_scale": 4.0}
        return arguments | {"negative_prompt_embeds": other, "negative_prompt_embeds_mask": mask}
    pooled = torch.randn(1, config.pooled_projection_dim, **kind)
    arguments |= {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    if preset.transformer_class.startswith("Hunyuan"):
        arguments |= {"prompt_attention_mask": torch.ones(1, preset.text_tokens, **kind), "guidance_scale": 6.0}
        arguments |= {"num_frames": (frames - 1) * FRAMES_PER_LATENT + 1}
    else:
        arguments |= {"guidance_scale": 3.5}
    return arguments
