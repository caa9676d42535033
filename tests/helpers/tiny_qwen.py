"""Qwen-Image pipelines of diffusers' real classes, small enough for a test; `tiny` says what that means."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.helpers.tiny import SIZE, TEXT_LENGTH, WORDS, byte_pair_merges, save_and_load

# Every word of the pipelines' own templates is one token, as with the real tokenizer: they cut off as many as that.
_TEMPLATES = (
    "system Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background: user assistant Describe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate. Picture"
)
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_WIDTH = 16  # of the text encoder
_LATENT_CHANNELS = 4
CALL = {"height": SIZE, "width": SIZE, "max_sequence_length": TEXT_LENGTH}
_SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
_LIGHTNING = {"use_dynamic_shifting": True, "base_shift": 1.0986, "max_shift": 1.0986}  # ln 3 at every size


def tiny_qwen(
    folder: str | Path | None = None,
    *,
    seed: int = 0,
    num_layers: int = 2,
    lightning: bool = False,
    dtype: torch.dtype = torch.float32,
) -> QwenImagePipeline:
    """A QwenImagePipeline loaded from `folder` (written first; None: a temporary one), progress bar off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        pipe = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**(_LIGHTNING if lightning else _SCHEDULER)),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * _LATENT_CHANNELS,  # 2 x 2 latents packed into a token
                out_channels=_LATENT_CHANNELS,
                num_layers=num_layers,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=_WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    loaded = save_and_load(pipe, folder, dtype)
    assert isinstance(loaded, QwenImagePipeline)
    return loaded


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level pairs that make every word of the templates and of `tests.helpers.tiny.WORDS` one token."""
    words = sorted({*re.findall(r"[A-Za-z]+", _TEMPLATES), *(word for word in WORDS if word != ",")})
    merges = byte_pair_merges([[*word] for word in words] + [["Ġ", *word] for word in words])
    letters = sorted({letter for word in words for letter in word} | set(",.:()'Ġ?!-0123456789Ċ"))
    tokens = ["<|endoftext|>", *_SPECIAL, *letters, *(first + second for first, second in merges)]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        additional_special_tokens=list(_SPECIAL),
    )


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 1,
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_heads": 2,
            "out_hidden_size": _WIDTH,
            "patch_size": 14,
        },
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=_LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * _LATENT_CHANNELS,
        latents_std=[1.0] * _LATENT_CHANNELS,
    )
