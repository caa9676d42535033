"""Weights of their own for each step, beside the experts: the predictor kind `per_step`.

    h_hat_s = h_0 + alpha_s z + c_s h_0 + sum_i u_si (h_{i-1} - h_i) + b_s

with h_0, h_1, ... the cached features, newest first, and c, u, b per channel: a few multiply-adds an element, no
matrix. What noise stages share (the experts' low-rank projection) stays shared. Differences and not features are
weighted because features of neighbouring full steps nearly cancel, which low precision would not survive.
Shapes: B trajectories, S steps, L tokens, C channels, K history entries, R = K + 1 regressors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch


def step_weight_shapes(num_steps: int, history_size: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a variant's step weights: c and u stacked, and b."""
    return {"weight": (num_steps, history_size, channels), "bias": (num_steps, channels)}


def differences(features: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
    """`h_{i-1} - h_i` of the newest `size` features that there are."""
    held = features[:size]
    return [newer - older for newer, older in pairwise(held)]


def correction(
    newest: torch.Tensor, changes: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`c h_0 + sum_i u_i (h_{i-1} - h_i) + b`: [..., C] for weights [K, C] and bias [C]."""
    result = torch.addcmul(bias, newest, weight[0])
    for change, factor in zip(changes, weight[1:], strict=False):
        result = torch.addcmul(result, change, factor)
    return result


def to_feature_weights(weights: torch.Tensor) -> torch.Tensor:
    """Weights [K, ...] of h_0, h_0 - h_1, h_1 - h_2, ... as weights of h_0, h_1, ...: the same sum."""
    change = torch.cat([weights[1:], torch.zeros_like(weights[:1])])  # of each feature's difference to the older one
    return torch.cat([weights[:1] + change[:1], change[1:] - change[:-1]])


def to_difference_weights(scale: torch.Tensor) -> torch.Tensor:
    """Weights [K, C] of h_0, h_1, ... as weights of h_0, h_0 - h_1, h_1 - h_2, ...: the same sum."""
    tails = scale.flip(0).cumsum(0).flip(0)  # tails[i] = sum of scale[i:]
    return torch.cat([tails[:1], -tails[1:]])
