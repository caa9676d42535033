"""One function an objective. Shapes: B trajectories, S predicted steps, L tokens, C channels, O output channels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lesa.models.output_head import OutputHead

GroundTruthLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, OutputHead], torch.Tensor]


def feature_loss(
    predicted: torch.Tensor, target: torch.Tensor, temb: torch.Tensor, weights: torch.Tensor, head: OutputHead
) -> torch.Tensor:
    """Mean |h_hat - h|: the paper's L1 loss (LESA, arXiv 2602.20497, ground-truth guided step).

    Args:
        predicted: [B, S, L, C].
        target: [B, S, L, C].
        temb, weights, head: as `output_loss`; unused here.
    """
    return (predicted - target).abs().mean()


def normalised_feature_loss(
    predicted: torch.Tensor, target: torch.Tensor, temb: torch.Tensor, weights: torch.Tensor, head: OutputHead
) -> torch.Tensor:
    """`feature_loss` with each step divided by its own mean |h|, so that loud steps do not drown quiet ones."""
    scale = target.abs().mean(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
    return ((predicted - target).abs() / scale).mean()


def output_loss(
    predicted: torch.Tensor, target: torch.Tensor, temb: torch.Tensor, weights: torch.Tensor, head: OutputHead
) -> torch.Tensor:
    """Mean |dsigma (v_hat - v)|: what a predicted feature moves the latents by, after norm_out and proj_out.

    Args:
        temb: [B, S, D] conditioning of norm_out.
        weights: [S] |sigma_{s+1} - sigma_s|.
        head: the transformer's output head, frozen.
    """
    batch, steps, tokens, channels = predicted.shape
    both = torch.cat([predicted, target]).reshape(2 * batch * steps, tokens, channels)
    output = head(both, torch.cat([temb, temb]).reshape(2 * batch * steps, -1))
    error = (output[: batch * steps] - output[batch * steps :]).abs().reshape(batch, steps, -1)
    return (error.mean(dim=(0, 2)) * weights).sum() / weights.sum()


GROUND_TRUTH: dict[str, GroundTruthLoss] = {
    "feature": feature_loss,
    "normalised_feature": normalised_feature_loss,
    "output": output_loss,
}


def latents_loss(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the final latents [B, ...] against the unaccelerated run's."""
    return _squared_errors(latents, reference).mean()


def log_latents_loss(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean logarithm of each sample's squared error: decibels, so that no sample outweighs the others."""
    return log_squared_errors(latents, reference).mean()


def log_squared_errors(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[B] logarithm of each sample's mean squared error."""
    return _squared_errors(latents, reference).clamp_min(1e-12).log()


def _squared_errors(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    # Broadcasting would compare every sample with every other's reference.
    assert latents.shape == reference.shape, (latents.shape, reference.shape)
    return (latents - reference).square().flatten(1).mean(dim=1)


CLOSED_LOOP = {"latents": latents_loss, "log_latents": log_latents_loss}
