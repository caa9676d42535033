"""A Qwen-Image pipeline in miniature: every part is of the class Qwen-Image has, only narrower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from lesa.base_models.data_sets import DataSet
from lesa.base_models.tokenizers import build_qwen_tokenizer

_TEXT_WIDTH = 64


class QwenImage:
    """`lesa.base_models.architectures.Architecture` of Qwen-Image: two calls a step, combined by the pipeline."""

    promptless = " "  # what the pipeline is given as its negative prompt
    has_guidance = False
    num_steps = 50
    guidance = 4.0

    def build(self, data_set: DataSet) -> QwenImagePipeline:
        channels = data_set.autoencoder.latent_channels
        tokenizer = build_qwen_tokenizer(data_set, _template())
        return QwenImagePipeline(
            scheduler=_scheduler(),
            vae=AutoencoderKLQwenImage(
                base_dim=12,
                z_dim=channels,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[0.0] * channels,  # both measured once the autoencoder is trained
                latents_std=[1.0] * channels,
            ),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * channels,  # 2 x 2 latents packed into a token
                out_channels=channels,
                num_layers=4,
                attention_head_dim=32,
                num_attention_heads=4,
                joint_attention_dim=_TEXT_WIDTH,
                axes_dims_rope=(8, 12, 12),
            ),
        )

    def load(self, folder: Path) -> QwenImagePipeline:
        pipeline: QwenImagePipeline = QwenImagePipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True
        )
        return pipeline

    def latent_shape(self, data_set: DataSet) -> tuple[int, ...]:
        return (data_set.height // 4) * (data_set.width // 4), 4 * data_set.autoencoder.latent_channels

    def text_encoders(self, pipeline: QwenImagePipeline) -> list[nn.Module]:
        return [pipeline.text_encoder]

    def read(self, pipeline: QwenImagePipeline, data_set: DataSet, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens, mask = pipeline.encode_prompt(
            texts, device=pipeline.text_encoder.device, max_sequence_length=data_set.text_length
        )
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        return {"encoder_hidden_states": tokens, "encoder_hidden_states_mask": mask}

    def to_autoencoder(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, None]  # a video of one frame

    def from_autoencoder(self, decoded: torch.Tensor) -> torch.Tensor:
        return decoded[:, :, 0]

    def calibrate(self, vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> None:
        by_channel = latents.transpose(0, 1).flatten(1)
        vae.register_to_config(latents_mean=by_channel.mean(dim=1).tolist(), latents_std=by_channel.std(dim=1).tolist())

    def to_transformer(self, pipeline: QwenImagePipeline, latents: torch.Tensor) -> torch.Tensor:
        config = pipeline.vae.config
        mean, std = (torch.tensor(v)[:, None, None, None] for v in (config.latents_mean, config.latents_std))
        normalised = ((latents - mean) / std)[:, :, 0]
        packed: torch.Tensor = QwenImagePipeline._pack_latents(normalised, *normalised.shape)
        return packed

    def velocity(
        self,
        pipeline: QwenImagePipeline,
        data_set: DataSet,
        noisy: torch.Tensor,  # [B, L, 4 C]
        sigma: torch.Tensor,
        guidance: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        predicted: torch.Tensor = pipeline.transformer(
            hidden_states=noisy,
            timestep=sigma,
            img_shapes=[[(1, data_set.height // 4, data_set.width // 4)]] * len(noisy),
            return_dict=False,
            **conditioning,
        )[0]
        return predicted

    def guided(
        self,
        pipeline: QwenImagePipeline,
        data_set: DataSet,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        promptless: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        prompted, without = (
            self.velocity(pipeline, data_set, noisy, sigma, sigma, given) for given in (conditioning, promptless)
        )
        mixed = without + self.guidance * (prompted - without)
        # As QwenImagePipeline does: guidance turns a token's velocity, and does not lengthen it.
        return mixed * (prompted.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))

    def call(self, data_set: DataSet) -> dict[str, Any]:
        return {
            "height": data_set.height,
            "width": data_set.width,
            "num_inference_steps": self.num_steps,
            "true_cfg_scale": self.guidance,
            "max_sequence_length": data_set.text_length,
        }


def _template() -> str:
    """What the pipeline puts around a prompt; it is known to the pipeline alone."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "transformer"))
    template: str = QwenImagePipeline(scheduler=_scheduler(), **parts).prompt_template_encode
    return template


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's scheduler configuration."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A reader of text; its part that reads images is there, as small as can be, and never called."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": _TEXT_WIDTH,
            "intermediate_size": 2 * _TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": _TEXT_WIDTH,
            "patch_size": 14,
        },
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)
