"""The published models this project is made for, as rows: architecture, size of picture, parts, where they are.

Configurations are the published models' own numbers. Text lengths reproduce the operations the papers print
for one transformer call: FLUX.1-dev 74.38 TFLOPs (4096 image and 512 text tokens), Qwen-Image 131.7 a
guidance branch (6889 and 128), HunyuanVideo 595.4 (20400 and 256). Parameters of the parts beside the transformer
are counted from their architectures; tests count them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lesa.families import published_model
from lesa.model_call import Grid

PIXELS_PER_TOKEN = 16  # autoencoder 8, patches of 2, in every family of the table
_FRAMES_PER_LATENT = 4
_T5_XXL, _CLIP_L, _LLAMA_3_8B, _QWEN_VL_7B = 4_762_310_656, 123_060_480, 7_505_186_816, 8_292_166_656


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One published model at the size of picture that its makers recommend."""

    name: str  # of lesa.families.published_model, and of its workload
    source: str | None  # hub id of its diffusers pipeline; None where there is none ready to load
    license: str  # in a word; what is binding is the model's own page
    transformer_class: str
    config: dict[str, Any]  # what differs from the class's defaults
    grid: Grid  # image tokens: latent frames, rows, columns
    text_tokens: int
    parts: dict[str, int]  # parameters of what the pipeline loads beside the transformer
    scheduler: dict[str, Any] = field(default_factory=dict)  # configuration of the flow-matching scheduler
    mu: float | None = None  # the shift at this size, where it is dynamic
    interval: int = 7  # LESA's default: 10 full steps of 50, half of a distilled model's few
    warmup_steps: int = 3

    @property
    def num_inference_steps(self) -> int:
        return published_model(self.name).num_inference_steps

    @property
    def branches(self) -> int:
        """Transformer calls a step."""
        return published_model(self.name).branches

    @property
    def size(self) -> str:
        frames, rows, columns = self.grid
        video = "" if frames == 1 else f", {(frames - 1) * _FRAMES_PER_LATENT + 1} frames"
        return f"{rows * PIXELS_PER_TOKEN}x{columns * PIXELS_PER_TOKEN}{video}"


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
            grid=(1, 64, 64),
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
            grid=(1, 64, 64),
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
            grid=(1, 83, 83),
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
            grid=(1, 83, 83),
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
            grid=(17, 30, 40),  # 65 frames of 480 x 640 pixels
            text_tokens=256,
            parts={"text_encoder": _LLAMA_3_8B, "text_encoder_2": _CLIP_L, "vae": 246_478_803},
            scheduler={"shift": 7.0},
        ),
    )
}
