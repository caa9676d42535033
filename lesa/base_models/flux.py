"""A FLUX pipeline in miniature: every part is of the class FLUX.1-dev has, only narrower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel

from lesa.base_models.clip import TEXT_WIDTH, build_clip
from lesa.base_models.data_sets import DataSet
from lesa.base_models.tokenizers import build_t5_tokenizer


class Flux:
    """`lesa.base_models.architectures.Architecture` of FLUX: latents packed into tokens, distilled guidance."""

    promptless = ""
    has_guidance = True
    num_steps = 50
    guidance = 3.5

    def build(self, data_set: DataSet) -> FluxPipeline:
        text_encoder, tokenizer = build_clip(data_set, data_set.clip_length)
        tokenizer_2 = build_t5_tokenizer(data_set)
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=TEXT_WIDTH,
                d_kv=16,
                d_ff=2 * TEXT_WIDTH,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=tokenizer_2.pad_token_id,
                eos_token_id=tokenizer_2.eos_token_id,
            )
        )
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * data_set.autoencoder.latent_channels,  # 2 x 2 latents packed into a token
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 16),
            layers_per_block=1,
            latent_channels=data_set.autoencoder.latent_channels,
            norm_num_groups=data_set.autoencoder.norm_groups,
            sample_size=data_set.height,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            scaling_factor=1.0,  # both measured once the autoencoder is trained
            shift_factor=0.0,
        )
        return FluxPipeline(
            scheduler=_scheduler(),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )

    def load(self, folder: Path) -> FluxPipeline:
        pipeline: FluxPipeline = FluxPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        return pipeline

    def latent_shape(self, data_set: DataSet) -> tuple[int, ...]:
        return (data_set.height // 4) * (data_set.width // 4), 4 * data_set.autoencoder.latent_channels

    def text_encoders(self, pipeline: FluxPipeline) -> list[nn.Module]:
        return [pipeline.text_encoder, pipeline.text_encoder_2]

    def read(self, pipeline: FluxPipeline, data_set: DataSet, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens, pooled, _ = pipeline.encode_prompt(
            texts, None, device=pipeline.text_encoder.device, max_sequence_length=data_set.text_length
        )
        return {"pooled_projections": pooled, "encoder_hidden_states": tokens}

    def to_autoencoder(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def from_autoencoder(self, decoded: torch.Tensor) -> torch.Tensor:
        return decoded

    def calibrate(self, vae: AutoencoderKL, latents: torch.Tensor) -> None:
        vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))

    def to_transformer(self, pipeline: FluxPipeline, latents: torch.Tensor) -> torch.Tensor:
        config = pipeline.vae.config
        normalised = (latents - config.shift_factor) * config.scaling_factor
        packed: torch.Tensor = FluxPipeline._pack_latents(normalised, *normalised.shape)
        return packed

    def velocity(
        self,
        pipeline: FluxPipeline,
        data_set: DataSet,
        noisy: torch.Tensor,  # [B, L, 4 C]
        sigma: torch.Tensor,
        guidance: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        transformer = pipeline.transformer
        kind = {"device": noisy.device, "dtype": noisy.dtype}
        ids = FluxPipeline._prepare_latent_image_ids(1, data_set.height // 4, data_set.width // 4, **kind)
        predicted: torch.Tensor = transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance if transformer.config.guidance_embeds else None,
            txt_ids=torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, **kind),
            img_ids=ids,
            return_dict=False,
            **conditioning,
        )[0]
        return predicted

    def guided(
        self,
        pipeline: FluxPipeline,
        data_set: DataSet,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        promptless: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        guidance = torch.full_like(sigma, self.guidance)
        return self.velocity(pipeline, data_set, noisy, sigma, guidance, conditioning)

    def call(self, data_set: DataSet) -> dict[str, Any]:
        return {
            "height": data_set.height,
            "width": data_set.width,
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.guidance,
            "max_sequence_length": data_set.text_length,
        }


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler configuration."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
