"""Trains the autoencoder on drawn pictures and measures the scale of its latents.

Shape legend: B images, H = W pixels, h = w = H / 2 latents, c latent channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from lesa.reference.optim import Optimiser, Report, pick

LEARNING_RATE = 6e-3
KL_WEIGHT = 1e-5  # per latent value; keeps the latents bounded without blurring


def fit_vae(
    vae: AutoencoderKL,
    images: torch.Tensor,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    device: str,
    report: Report,
) -> None:
    """Train `vae` in place on `images` [B, 3, H, W] in [-1, 1]; sets its scaling and shift factors."""
    vae.to(device).train()
    optimiser = Optimiser(vae.parameters(), learning_rate=LEARNING_RATE, num_steps=num_steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        batch = images[pick(len(images), batch_size, generator)].to(device)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = F.mse_loss(decoded, batch) + 0.2 * F.l1_loss(decoded, batch)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimiser.step(error + KL_WEIGHT * kl)
        if step % 50 == 0 or step == num_steps - 1:
            report(step, {"vae_loss": float(error.detach()), "vae_kl": float(kl.detach())})
    vae.eval().requires_grad_(False)
    latents = encode(vae, images[:2048])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Posterior means [B, c, h, w] of `images`, on the CPU, not yet normalised."""
    parts = [vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in images.split(batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean PSNR in dB, on images taken to [0, 1], of decoding the posterior mean."""
    decoded = vae.decode(encode(vae, images).to(vae.device)).sample.cpu().clamp(-1, 1)
    mse = ((decoded - images) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-8)
    return float((-10 * mse.log10()).mean())
