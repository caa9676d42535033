"""Objectives by hand numbers."""

from __future__ import annotations

import math

import pytest
import torch

from lesa.training import losses
from tests.helpers.training_set import head

B, S, L = 2, 2, 1
TARGET = torch.tensor([[[[1.0, 1.0, 1.0, 1.0]], [[4.0, 4.0, 4.0, 4.0]]]]).expand(B, S, L, 4)
# Step 0 is off by 1 in the first channel, step 1 by 2 in the last, in the first trajectory alone.
OFF = torch.tensor(
    [[[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 2.0]]], [[[0.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]]]
)
TEMB = torch.arange(float(B * S * 4)).reshape(B, S, 4)
WEIGHTS = torch.tensor([0.1, 0.3])


def test_feature_loss() -> None:
    assert float(losses.feature_loss(TARGET + OFF, TARGET, TEMB, WEIGHTS, head())) == pytest.approx(3 / 16)


def test_normalised_feature_loss_divides_each_step_by_its_size() -> None:
    loss = losses.normalised_feature_loss(TARGET + OFF, TARGET, TEMB, WEIGHTS, head())
    assert float(loss) == pytest.approx((1 / 1 + 2 / 4) / 16)
    zero = torch.zeros(1, 1, 1, 4)
    assert math.isfinite(float(losses.normalised_feature_loss(zero, zero, TEMB, WEIGHTS, head())))


def test_output_loss_is_what_reaches_the_latents() -> None:
    # proj_out: channel 0 moves the outputs by (1, 0), channel 3 by (2, -1); temb cancels.
    step_0 = (1 * 1 + 0) / 2  # mean over two outputs of the first trajectory
    step_1 = (2 * 2 + 2 * 1) / 2
    expected = (step_0 / B * 0.1 + step_1 / B * 0.3) / 0.4
    loss = losses.output_loss(TARGET + OFF, TARGET, TEMB, WEIGHTS, head())
    assert float(loss) == pytest.approx(expected)


def test_each_feature_meets_its_own_temb() -> None:
    """A norm_out that multiplies by temb shows which one it was given."""
    made = head()
    made.norm_out.forward = lambda feature, temb: feature * temb[:, None]  # type: ignore[method-assign]
    temb = torch.zeros(B, S, 4)
    temb[0, 1] = 1.0
    loss = losses.output_loss(TARGET + OFF, TARGET, temb, WEIGHTS, made)
    assert float(loss) == pytest.approx((2 * 2 + 2 * 1) / 2 / B * 0.3 / 0.4)


def test_latents_losses() -> None:
    reference = torch.zeros(2, 3, 2)
    latents = torch.tensor([0.1, 0.2])[:, None, None].expand(2, 3, 2)
    assert float(losses.latents_loss(latents, reference)) == pytest.approx((0.01 + 0.04) / 2)
    expected = (math.log(0.01) + math.log(0.04)) / 2
    assert float(losses.log_latents_loss(latents, reference)) == pytest.approx(expected)
    assert float(losses.log_latents_loss(reference, reference)) == pytest.approx(math.log(1e-12))
    for loss in losses.CLOSED_LOOP.values():  # no broadcasting of one sample over the others
        with pytest.raises(AssertionError):
            loss(latents, reference[:, None])


def test_the_tables_are_what_the_parameters_may_name() -> None:
    assert set(losses.GROUND_TRUTH) == {"feature", "normalised_feature", "output"}
    assert set(losses.CLOSED_LOOP) == {"latents", "log_latents"}
    for loss in losses.GROUND_TRUTH.values():
        predicted = (TARGET + OFF).requires_grad_()
        loss(predicted, TARGET, TEMB, WEIGHTS, head()).backward()
        assert predicted.grad is not None and predicted.grad.abs().sum() > 0
