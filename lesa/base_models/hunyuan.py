"""A HunyuanVideo pipeline in miniature: every part is of the class HunyuanVideo has, only narrower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn
from transformers import LlamaConfig, LlamaModel

from lesa.base_models.clip import TEXT_WIDTH, build_clip
from lesa.base_models.data_sets import DataSet
from lesa.base_models.tokenizers import build_llama_tokenizer

_CLIP_LENGTH = 77  # the pipeline's own number
_NUM_LAYERS_SKIPPED = 2  # of the text encoder: the pipeline reads what enters the last but one
_SHIFT = 7.0
_THOUSAND = 1000.0  # the transformer is given timesteps and guidance in thousandths


class HunyuanVideo:
    """`lesa.base_models.architectures.Architecture` of HunyuanVideo: latent videos, distilled guidance."""

    promptless = ""
    has_guidance = True
    num_steps = 50
    guidance = 3.5

    def build(self, data_set: DataSet) -> HunyuanVideoPipeline:
        clip, clip_tokenizer = build_clip(data_set, _CLIP_LENGTH)
        tokenizer = build_llama_tokenizer(data_set, DEFAULT_PROMPT_TEMPLATE["template"])
        channels = data_set.autoencoder.latent_channels
        return HunyuanVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=_SHIFT),
            vae=AutoencoderKLHunyuanVideo(
                latent_channels=channels,
                down_block_types=("HunyuanVideoDownBlock3D",) * 3,
                up_block_types=("HunyuanVideoUpBlock3D",) * 3,
                block_out_channels=(16, 16, 16),
                layers_per_block=1,
                norm_num_groups=data_set.autoencoder.norm_groups,
                spatial_compression_ratio=2,
                temporal_compression_ratio=4,
                mid_block_add_attention=False,
                scaling_factor=1.0,  # measured once the autoencoder is trained
            ),
            text_encoder=LlamaModel(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=2 * TEXT_WIDTH,
                    num_hidden_layers=2 + _NUM_LAYERS_SKIPPED,
                    num_attention_heads=4,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            text_encoder_2=clip,
            tokenizer_2=clip_tokenizer,
            transformer=HunyuanVideoTransformer3DModel(
                in_channels=channels,
                out_channels=channels,
                num_attention_heads=4,
                attention_head_dim=32,
                num_layers=2,
                num_single_layers=4,
                num_refiner_layers=1,
                patch_size=2,
                patch_size_t=1,
                text_embed_dim=TEXT_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                rope_axes_dim=(8, 12, 12),
            ),
        )

    def load(self, folder: Path) -> HunyuanVideoPipeline:
        pipeline: HunyuanVideoPipeline = HunyuanVideoPipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True
        )
        return pipeline

    def latent_shape(self, data_set: DataSet) -> tuple[int, ...]:
        assert data_set.num_frames is not None
        frames = (data_set.num_frames - 1) // 4 + 1
        return data_set.autoencoder.latent_channels, frames, data_set.height // 2, data_set.width // 2

    def text_encoders(self, pipeline: HunyuanVideoPipeline) -> list[nn.Module]:
        return [pipeline.text_encoder_2, pipeline.text_encoder]

    def read(self, pipeline: HunyuanVideoPipeline, data_set: DataSet, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens, pooled, mask = pipeline.encode_prompt(
            texts, device=pipeline.text_encoder.device, max_sequence_length=data_set.text_length
        )
        return {
            "pooled_projections": pooled,
            "encoder_hidden_states": tokens,
            "encoder_attention_mask": mask,
        }

    def to_autoencoder(self, images: torch.Tensor) -> torch.Tensor:
        return images.transpose(1, 2)  # channels before frames

    def from_autoencoder(self, decoded: torch.Tensor) -> torch.Tensor:
        return decoded.transpose(1, 2)

    def calibrate(self, vae: AutoencoderKLHunyuanVideo, latents: torch.Tensor) -> None:
        vae.register_to_config(scaling_factor=float(1 / latents.std()))

    def to_transformer(self, pipeline: HunyuanVideoPipeline, latents: torch.Tensor) -> torch.Tensor:
        return latents * pipeline.vae.config.scaling_factor

    def velocity(
        self,
        pipeline: HunyuanVideoPipeline,
        data_set: DataSet,
        noisy: torch.Tensor,  # [B, C, F', h, w]
        sigma: torch.Tensor,
        guidance: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        predicted: torch.Tensor = pipeline.transformer(
            hidden_states=noisy,
            timestep=sigma * _THOUSAND,
            guidance=guidance * _THOUSAND,
            return_dict=False,
            **conditioning,
        )[0]
        return predicted

    def guided(
        self,
        pipeline: HunyuanVideoPipeline,
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
            "num_frames": data_set.num_frames,
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.guidance,
            "max_sequence_length": data_set.text_length,
        }
