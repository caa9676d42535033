"""What differs between the families when a small model of one is trained here, a row of `ARCHITECTURES` each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lesa.base_models.data_sets import DataSet
from lesa.base_models.flux import Flux
from lesa.base_models.hunyuan import HunyuanVideo
from lesa.base_models.qwen import QwenImage

# Arguments of the transformer that carry the prompt, one row a text: pooled vectors [B, P], tokens [B, T, P] and, where
# texts are of different lengths, their mask [B, T].
Conditioning = dict[str, torch.Tensor]


class Architecture(Protocol):
    """How a family's pipeline is built, and how its parts are called outside of a sampler run.

    Shape legend: B samples, T text tokens, C latent channels, F frames, H, W pixels, h, w latents.
    """

    promptless: str  # the prompt that guidance steers away from
    has_guidance: bool  # the transformer is told how much guidance to apply, and applies it itself
    num_steps: int  # of a full sample
    guidance: float  # of a full sample

    def build(self, data_set: DataSet) -> Any:
        """An untrained pipeline in fp32 on the CPU; initial weights follow torch's global generator."""
        ...

    def load(self, folder: Path) -> Any:
        """A pipeline saved in `folder`, in fp32 on the CPU. Raises OSError where there is none."""
        ...

    def latent_shape(self, data_set: DataSet) -> tuple[int, ...]:
        """Of one sample, as `to_transformer` gives it."""
        ...

    def text_encoders(self, pipeline: Any) -> list[nn.Module]:
        """Everything that reads prompts."""
        ...

    def read(self, pipeline: Any, data_set: DataSet, texts: list[str]) -> Conditioning:
        """What the transformer is given for each text; carries gradients to the encoders."""
        ...

    def to_autoencoder(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] or [B, F, 3, H, W] as the autoencoder takes them."""
        ...

    def from_autoencoder(self, decoded: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_autoencoder`."""
        ...

    def calibrate(self, vae: Any, latents: torch.Tensor) -> None:
        """Write the scale of the posterior means `latents` [B, C, ...] into the autoencoder's configuration."""
        ...

    def to_transformer(self, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        """Posterior means [B, C, ...] normalised, and packed where the transformer takes tokens."""
        ...

    def velocity(
        self,
        pipeline: Any,
        data_set: DataSet,
        noisy: torch.Tensor,  # [B, ...], as `to_transformer` gives them
        sigma: torch.Tensor,  # [B], noise level in (0, 1]
        guidance: torch.Tensor,  # [B]; not used by a transformer that has none
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """The transformer called as its pipeline calls it."""
        ...

    def guided(
        self,
        pipeline: Any,
        data_set: DataSet,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: Conditioning,
        promptless: Conditioning,
    ) -> torch.Tensor:
        """The velocity that a full sample follows: guided by `guidance`, in one call or two."""
        ...

    def call(self, data_set: DataSet) -> dict[str, Any]:
        """Keyword arguments of the pipeline for a full sample."""
        ...


ARCHITECTURES: dict[str, Architecture] = {
    "flux": Flux(),
    "qwen-image": QwenImage(),
    "hunyuan-video": HunyuanVideo(),
}


def architecture_of(data_set: DataSet) -> Architecture:
    """The row of the data set's family."""
    return ARCHITECTURES[data_set.family]
