"""Distances between what two runs of one sampler made: PSNR and SSIM of pictures, relative L1 of features.

Shapes: B samples, F frames, C channels, H and W pixels, S steps, L tokens, D feature channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lesa.errors import LesaError

PSNR_CAP_DB = 80.0  # identical pictures would be infinite, and one of them would swallow a mean
OUTLIER_DB = 30.0  # a run further than this from the plain one drew another picture
SSIM_WINDOW = 7  # pixels a side; small enough for 16 x 16 pictures
_K1, _K2 = 0.01, 0.03  # stabilisers of Wang et al. 2004, for a data range of 1


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of every sample in decibels.

    Both sides are clamped to [0, 1] first and never rounded; data range 1; capped at 80 dB.

    Args:
        images: [B, C, H, W] or [B, F, C, H, W], floats.
        reference: of the same shape.

    Returns:
        [B] float64. A sample with a value that is not finite gets 0 dB: a broken picture must not vanish
        from a mean.

    Raises:
        ValueError: for different shapes.
    """
    images, reference = _pair(images, reference)
    error = (images - reference).square().flatten(1).mean(dim=1)
    floor = 10.0 ** (-PSNR_CAP_DB / 10.0)
    decibels = -10.0 * torch.log10(error.clamp_min(floor))
    return torch.where(torch.isfinite(decibels), decibels, torch.zeros_like(decibels))


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every sample (Wang et al. 2004), uniform 7 x 7 window, data range 1.

    Windows lie wholly inside the picture; covariances are unbiased; channels and frames are averaged.

    Args:
        images: [B, C, H, W] or [B, F, C, H, W], floats; clamped to [0, 1].
        reference: of the same shape.

    Returns:
        [B] float64, 1 for identical pictures; 0 where a value is not finite.

    Raises:
        ValueError: for different shapes, or pictures smaller than the window.
    """
    images, reference = _pair(images, reference)
    batch, height, width = images.shape[0], images.shape[-2], images.shape[-1]
    if min(height, width) < SSIM_WINDOW:
        raise LesaError(
            f"ssim needs pictures of at least {SSIM_WINDOW} pixels a side, got {height} x {width}"
        )
    x, y = (t.reshape(-1, 1, height, width) for t in (images, reference))
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    count = SSIM_WINDOW**2
    unbiased = count / (count - 1)
    variance_x = unbiased * (_window_mean(x * x) - mean_x**2)
    variance_y = unbiased * (_window_mean(y * y) - mean_y**2)
    covariance = unbiased * (_window_mean(x * y) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + _K1**2) / (mean_x**2 + mean_y**2 + _K1**2)
    structure = (2 * covariance + _K2**2) / (variance_x + variance_y + _K2**2)
    values = (luminance * structure).reshape(batch, -1).mean(dim=1)
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values))


def relative_l1(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Relative L1 error of features: `mean |h - h_ref| / mean |h_ref|` over tokens and channels.

    In float64, for figures that are kept. The sampler has a measure of its own, in float32 and without copies
    (`lesa.sampling.run`), for which a mean of zero counts as the smallest float32; here it divides as it is.

    Args:
        features: [..., L, D].
        reference: of the same shape.

    Returns:
        [...] float64; infinite where the reference is zero and the feature is not.

    Raises:
        ValueError: for different shapes.
    """
    if features.shape != reference.shape:
        raise LesaError(
            f"features of shape {tuple(features.shape)} and reference of {tuple(reference.shape)}"
        )
    difference = (features.double() - reference.double()).abs().mean(dim=(-2, -1))
    scale = reference.double().abs().mean(dim=(-2, -1))
    return torch.where(difference == 0, torch.zeros_like(scale), difference / scale)


def mean_or_nan(values: list[float]) -> float:
    """Mean of the numbers that are there; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _pair(images: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if images.shape != reference.shape or images.ndim not in (4, 5):
        raise LesaError(
            f"pictures of shape {tuple(images.shape)} and reference of {tuple(reference.shape)}: "
            "both must be [B, C, H, W] or [B, F, C, H, W]"
        )
    # float64: at 80 dB the squared errors are below float32's resolution of the squares.
    return images.detach().cpu().double().clamp(0, 1), reference.detach().cpu().double().clamp(0, 1)


def _window_mean(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images, SSIM_WINDOW, stride=1)
