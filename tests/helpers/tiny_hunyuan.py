"""HunyuanVideo pipelines of diffusers' real classes, small enough for a test; `tiny` says what that means."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import LlamaConfig, LlamaModel, LlamaTokenizerFast

from lesa.params import CallParams
from tests.helpers.images import NUM_STEPS, PictureCall, picture
from tests.helpers.tiny import SIZE, TEXT_LENGTH, TEXT_WIDTH, WORDS, byte_pair_merges, save_and_load, tiny_clip

_SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LATENT_CHANNELS = 4
CALL = {"height": SIZE, "width": SIZE, "num_frames": 5, "guidance_scale": 6.0, "max_sequence_length": TEXT_LENGTH}


def tiny_hunyuan(
    folder: str | Path | None = None,
    *,
    seed: int = 0,
    in_channels: int = _LATENT_CHANNELS,
    dtype: torch.dtype = torch.float32,
) -> HunyuanVideoPipeline:
    """A HunyuanVideoPipeline loaded from `folder` (written first; None: a temporary one), progress bar off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        clip, clip_tokenizer = tiny_clip(77)  # the pipeline's own number
        pipe = HunyuanVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            vae=_vae(),
            text_encoder=LlamaModel(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=2 * TEXT_WIDTH,
                    num_hidden_layers=2,  # the pipeline takes what enters the last but one
                    num_attention_heads=2,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            text_encoder_2=clip,
            tokenizer_2=clip_tokenizer,
            transformer=HunyuanVideoTransformer3DModel(
                in_channels=in_channels,
                out_channels=_LATENT_CHANNELS,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                patch_size=1,
                text_embed_dim=TEXT_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                rope_axes_dim=(4, 6, 6),
            ),
        )
    loaded = save_and_load(pipe, folder, dtype)
    assert isinstance(loaded, HunyuanVideoPipeline)
    return loaded


def _tokenizer() -> LlamaTokenizerFast:
    """Pairs that make every word one token; the pipeline cuts off the tokens of its own template by their number."""
    template = str(DEFAULT_PROMPT_TEMPLATE["template"])
    words = sorted({*re.findall(r"[A-Za-z]+", template), *(word for word in WORDS if word != ",")})
    merges = byte_pair_merges([[*word] for word in words] + [["▁", *word] for word in words])
    letters = sorted({letter for word in words for letter in word} | set(",.:()▁\n0123456789"))
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *_SPECIAL, *letters, *(first + second for first, second in merges)]
    return LlamaTokenizerFast(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        pad_token="<pad>",
        padding_side="right",
        additional_special_tokens=list(_SPECIAL),
        add_prefix_space=False,
    )


def _vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=_LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )


def text_to_video(true_cfg: bool = False) -> PictureCall:
    guided = {"true_cfg_scale": 3.0} if true_cfg else {}
    return PictureCall(
        pipe=tiny_hunyuan(),
        images={},
        call=CallParams(**(CALL | guided), num_inference_steps=NUM_STEPS),
        branches=("cond", "uncond") if true_cfg else ("denoise",),
        extra={"negative_prompt": "a dog"} if true_cfg else {},
    )


def image_to_video() -> PictureCall:
    """SkyReels: the first frame's latents beside the noise, true guidance, no cache context."""
    base = tiny_hunyuan(in_channels=2 * _LATENT_CHANNELS)
    pipe = save_and_load(HunyuanSkyreelsImageToVideoPipeline(**base.components), None, torch.float32)
    return PictureCall(
        pipe=pipe,
        images={"image": picture()},
        call=CallParams(**CALL, num_inference_steps=NUM_STEPS, true_cfg_scale=3.0),
        branches=("cond", "uncond"),
        extra={"negative_prompt": "a dog"},
    )


VARIANTS: dict[str, Callable[[], PictureCall]] = {
    "HunyuanVideoPipeline": text_to_video,
    "HunyuanVideoPipeline, guided": lambda: text_to_video(true_cfg=True),
    "HunyuanSkyreelsImageToVideoPipeline": image_to_video,
}
