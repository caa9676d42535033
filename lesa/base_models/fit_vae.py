"""Trains the autoencoder on drawn images and measures the scale of its latents.

Shape legend: B samples, F frames, H, W pixels, C latent channels; `images` are [B, 3, H, W], or videos
[B, F, 3, H, W].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lesa.base_models.architectures import Architecture
from lesa.base_models.optim import Optimiser, Report, pick

LEARNING_RATE = 6e-3
KL_WEIGHT = 1e-5  # per latent value; keeps the latents bounded without blurring


def fit_vae(
    architecture: Architecture,
    vae: Any,
    images: torch.Tensor,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    device: str,
    report: Report,
) -> None:
    """Train `vae` in place on `images` in [-1, 1]; sets its scaling and shift factors."""
    vae.to(device).train()
    optimiser = Optimiser(vae.parameters(), learning_rate=LEARNING_RATE, num_steps=num_steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        batch = architecture.to_autoencoder(images[pick(len(images), batch_size, generator)]).to(device)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = F.mse_loss(decoded, batch) + 0.2 * F.l1_loss(decoded, batch)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimiser.step(error + KL_WEIGHT * kl)
        if step % 50 == 0 or step == num_steps - 1:
            report(step, {"vae_loss": float(error.detach()), "vae_kl": float(kl.detach())})
    vae.eval().requires_grad_(False)
    architecture.calibrate(vae, encode(architecture, vae, images[:2048]))


@torch.no_grad()
def encode(architecture: Architecture, vae: Any, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Posterior means [B, C, ...] of `images`, on the CPU, not yet normalised."""
    parts = []
    for part in images.split(batch_size):
        seen = architecture.to_autoencoder(part).to(vae.device)
        parts.append(vae.encode(seen).latent_dist.mean.cpu())
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_psnr(architecture: Architecture, vae: Any, images: torch.Tensor) -> float:
    """Mean PSNR in dB, on images taken to [0, 1], of decoding the posterior mean."""
    decoded = vae.decode(encode(architecture, vae, images).to(vae.device)).sample.cpu()
    error = (architecture.from_autoencoder(decoded).clamp(-1, 1) - images) / 2
    mse = error.square().flatten(1).mean(dim=1).clamp_min(1e-8)
    return float((-10 * mse.log10()).mean())
