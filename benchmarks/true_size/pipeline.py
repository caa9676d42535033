"""A FLUX pipeline folder with random weights at a preset's size: what `save_pretrained` writes of a real one."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmarks.true_size.models import build_transformer
from lesa.base_models.data_sets import DATA_SETS
from lesa.base_models.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from lesa.models.published import Preset

_HEAD = 16  # width of the text encoders' heads
_LEVELS = 4  # of the autoencoder: 8 pixels a latent, as FLUX.1-dev's


def write_flux_pipeline(folder: Path, preset: Preset, device: torch.device) -> int:
    """Write the folder in bfloat16; the transformer is made on `device` and gone afterwards.

    Text encoders and autoencoder have the classes and widths of FLUX.1-dev's and few layers; the tokenizers speak the
    language of the handwritten digits.

    Returns:
        The fewest text tokens a call may have.
    """
    language = DATA_SETS["flux-digits"]
    tokenizer, tokenizer_2 = build_clip_tokenizer(language, language.clip_length), build_t5_tokenizer(language)
    torch.manual_seed(0)
    pooled, width = preset.config["pooled_projection_dim"], preset.config["joint_attention_dim"]
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=pooled,
        intermediate_size=pooled,
        num_hidden_layers=1,
        num_attention_heads=pooled // _HEAD,
        max_position_embeddings=language.clip_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=width,
        d_kv=_HEAD,
        d_ff=width,
        num_layers=1,
        num_heads=width // _HEAD,
        dropout_rate=0.0,
        pad_token_id=tokenizer_2.pad_token_id,
        eos_token_id=tokenizer_2.eos_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * _LEVELS,
        up_block_types=("UpDecoderBlock2D",) * _LEVELS,
        block_out_channels=(16,) * _LEVELS,
        layers_per_block=1,
        latent_channels=preset.config["in_channels"] // 4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**preset.scheduler),
        vae=vae.bfloat16(),
        text_encoder=CLIPTextModel(clip).bfloat16(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).bfloat16(),
        tokenizer_2=tokenizer_2,
        transformer=build_transformer(preset, device, torch.bfloat16),
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return language.text_length
