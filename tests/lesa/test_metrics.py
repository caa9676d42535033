from __future__ import annotations

import math

import pytest
import torch

from lesa.metrics import PSNR_CAP_DB, SSIM_WINDOW, mean_or_nan, psnr, relative_l1, ssim


def images(batch: int = 2, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_difference_is_known_by_hand() -> None:
    reference = torch.full((2, 3, 8, 8), 0.5)
    shifted = reference.clone()
    shifted[0] += 0.1
    shifted[1] -= 0.01
    assert psnr(shifted, reference).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_psnr_clamps_both_sides_and_never_rounds() -> None:
    reference = torch.full((1, 3, 8, 8), 1.0)
    assert psnr(reference + 5.0, reference).item() == PSNR_CAP_DB
    below_a_grey_level = psnr(reference - 1e-3, reference).item()
    assert below_a_grey_level == pytest.approx(60.0, abs=1e-3)  # 8-bit rounding would hide this


def test_psnr_is_capped_and_counts_broken_pictures_as_zero() -> None:
    reference = images()
    broken = reference.clone()
    broken[1, 0, 0, 0] = math.nan
    assert psnr(broken, reference).tolist() == [PSNR_CAP_DB, 0.0]


def test_psnr_of_a_video_is_over_all_its_frames() -> None:
    reference = torch.full((1, 2, 3, 8, 8), 0.5)
    video = reference.clone()
    video[0, 0] += 0.1
    assert psnr(video, reference).item() == pytest.approx(20.0 + 10 * math.log10(2), abs=1e-4)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_other_shapes_are_refused(measure) -> None:
    with pytest.raises(ValueError, match="shape"):
        measure(images(2), images(1))
    with pytest.raises(ValueError, match="shape"):
        measure(torch.rand(3, 8), torch.rand(3, 8))


def test_ssim_equals_the_definition_window_by_window() -> None:
    x, y = images(1, 9, seed=1).double(), images(1, 9, seed=2).double()
    values = []
    for channel in range(3):
        for top in range(9 - SSIM_WINDOW + 1):
            for left in range(9 - SSIM_WINDOW + 1):
                area = (0, channel, slice(top, top + SSIM_WINDOW), slice(left, left + SSIM_WINDOW))
                a, b = x[area].flatten(), y[area].flatten()
                covariance = float(torch.cov(torch.stack([a, b]))[0, 1])
                c1, c2 = 0.01**2, 0.03**2
                luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
                values.append(float(luminance * (2 * covariance + c2) / (a.var() + b.var() + c2)))
    assert ssim(x, y).item() == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_ssim_is_one_for_the_same_and_falls_with_noise() -> None:
    reference = images(1)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(3))
    near, far = (
        ssim(reference + 0.02 * noise, reference).item(),
        ssim(reference + 0.2 * noise, reference).item(),
    )
    assert ssim(reference, reference).item() == pytest.approx(1.0)
    assert 1.0 > near > far > 0.0


def test_ssim_needs_a_window_of_pixels() -> None:
    with pytest.raises(ValueError, match="at least 7 pixels"):
        ssim(images(1, 6), images(1, 6))


def test_relative_l1_by_hand() -> None:
    reference = torch.tensor([[[1.0, -3.0], [2.0, 2.0]]])
    assert relative_l1(reference * 1.5, reference).tolist() == pytest.approx([0.5])
    assert relative_l1(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).tolist() == [0.0]
    assert relative_l1(torch.ones(1, 2, 2), torch.zeros(1, 2, 2)).isinf().all()
    with pytest.raises(ValueError, match="shape"):
        relative_l1(reference, reference[..., :1])


def test_mean_of_what_is_there() -> None:
    assert mean_or_nan([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean_or_nan([math.nan]))
