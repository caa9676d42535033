"""Weights of their own for each step, beside the experts: the predictor kind `per_step`.

    h_hat_s = h_0 + alpha_s z + c_s h_0 + sum_i u_si (h_{i-1} - h_i) + b_s

with h_0, h_1, ... the cached features, newest first, and c, u, b per channel: a few multiply-adds an element, no
matrix. What noise stages share (the experts' low-rank projection) stays shared. Differences and not features are
weighted because features of neighbouring full steps nearly cancel, which low precision would not survive.
Shapes: B trajectories, S steps, L tokens, C channels, K history entries, R = K + 1 regressors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn


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


def in_differences(scale: torch.Tensor) -> torch.Tensor:
    """Weights [K, C] of h_0, h_1, ... as weights of h_0, h_0 - h_1, h_1 - h_2, ...: the same sum."""
    tails = scale.flip(0).cumsum(0).flip(0)  # tails[i] = sum of scale[i:]
    return torch.cat([tails[:1], -tails[1:]])


class StepWeights(nn.Module):
    """Trainable step weights in units of what they move.

    Every regressor of a step is scaled so that a parameter of one moves the prediction by the step's typical
    correction: one learning rate then suits loud and quiet channels, early and late steps.

    Args:
        units: [S, R, C] that scale; zero where nothing is to be learned (full steps, history that is not there).
    """

    units: torch.Tensor

    def __init__(self, units: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("units", units)
        self.values = nn.Parameter(torch.zeros_like(units))

    @classmethod
    def fitted(
        cls, num_steps: int, steps: Sequence[int], weights: torch.Tensor, units: torch.Tensor
    ) -> StepWeights:
        """From what `LeastSquares.solve` found, [n, R, C] each, for n of the steps; zero at all others."""
        everywhere = torch.zeros(num_steps, *weights.shape[1:], device=weights.device)
        full_weights, full_units = everywhere.clone(), everywhere
        full_weights[list(steps)], full_units[list(steps)] = weights, units
        made = cls(full_units)
        with torch.no_grad():
            made.values.copy_(torch.where(full_units > 0, full_weights / full_units.clamp_min(1e-30), 0.0))
        return made

    def forward(self, newest: torch.Tensor, changes: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """The correction [..., C] of one step."""
        scaled = self.values[step] * self.units[step]
        return correction(newest, changes, scaled[:-1], scaled[-1])

    def export(self) -> dict[str, torch.Tensor]:
        """Tensors named as `step_weight_shapes` names them."""
        scaled = (self.values * self.units).detach().cpu()
        return {"weight": scaled[:, :-1].clone(), "bias": scaled[:, -1].clone()}

    def load_export(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over exported tensors; exact up to the rounding of one division."""
        stacked = torch.cat([tensors["weight"], tensors["bias"][:, None]], dim=1)
        with torch.no_grad():
            self.values.copy_(torch.where(self.units > 0, stacked / self.units.clamp_min(1e-30), 0.0))

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One AdamW group; weight decay would pull towards the experts alone, which the ridge did already."""
        return [{"params": [self.values], "lr": learning_rate, "weight_decay": 0.0}]


class LeastSquares:
    """Sums of products of one regression a step and channel, gathered batch by batch.

    Args:
        num_steps: steps that are fitted.
        regressors: R.
        channels: C.
    """

    def __init__(self, num_steps: int, regressors: int, channels: int, device: torch.device) -> None:
        kind = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(num_steps, channels, regressors, regressors, **kind)
        self.moment = torch.zeros(num_steps, channels, regressors, **kind)
        self.power = torch.zeros(num_steps, channels, **kind)  # of the target
        self.count = 0

    def add(self, place: int, regressors: torch.Tensor, target: torch.Tensor) -> None:
        """Regressors [R, B, L, C] and target [B, L, C] of the step at `place`."""
        rows = regressors.flatten(1, 2).permute(2, 1, 0)  # [C, B L, R]
        wanted = target.flatten(0, 1).T[..., None]  # [C, B L, 1]
        self.gram[place] += (rows.transpose(1, 2) @ rows).double()
        self.moment[place] += (rows.transpose(1, 2) @ wanted)[..., 0].double()
        self.power[place] += wanted.square().sum(dim=(1, 2)).double()
        self.count = max(self.count, rows.shape[1])

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and units [steps, R, C]; a regressor that never varied from zero has neither.

        Args:
            ridge: added to the diagonal, relative to it.
        """
        energy = self.gram.diagonal(dim1=-2, dim2=-1)  # [steps, C, R]
        present = energy > 0
        diagonal = torch.where(present, energy * (1 + ridge), 1.0)
        system = self.gram - torch.diag_embed(energy) + torch.diag_embed(diagonal)
        weights = torch.linalg.solve(system, self.moment[..., None])[..., 0]
        units = torch.where(present, (self.power[..., None] / energy.clamp_min(1e-300)).sqrt(), 0.0)
        return (weights * present).transpose(1, 2).float(), units.transpose(1, 2).float()
