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

LEAST_RIDGE = 1e-6  # of a basis: more than float32 products are rounded by, so that it always exists


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


def of_differences(weights: torch.Tensor) -> torch.Tensor:
    """Weights [K, ...] of h_0, h_0 - h_1, h_1 - h_2, ... as weights of h_0, h_1, ...: the same sum."""
    change = torch.cat([weights[1:], torch.zeros_like(weights[:1])])  # of each feature's difference to the older one
    return torch.cat([weights[:1] + change[:1], change[1:] - change[:-1]])


def in_differences(scale: torch.Tensor) -> torch.Tensor:
    """Weights [K, C] of h_0, h_1, ... as weights of h_0, h_0 - h_1, h_1 - h_2, ...: the same sum."""
    tails = scale.flip(0).cumsum(0).flip(0)  # tails[i] = sum of scale[i:]
    return torch.cat([tails[:1], -tails[1:]])


class StepWeights(nn.Module):
    """Trainable step weights, as a change from where they start in coordinates that make descent even.

    The newest feature, the differences and the constant are far from independent: an optimiser that moves each weight
    by itself goes slowly along what they have in common. Here a parameter moves a combination of regressors that is
    uncorrelated with the other parameters', and a value of one moves the prediction by the step's typical correction:
    one learning rate suits loud and quiet channels, early and late steps.

    Args:
        start: [S, R, C] weights to start from.
        basis: [S, C, R, R] whose columns are the combinations (`LeastSquares.basis`); zero where nothing is to be
            learned (full steps, history that is not there).
    """

    start: torch.Tensor
    basis: torch.Tensor

    def __init__(self, start: torch.Tensor, basis: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("basis", basis)
        self.values = nn.Parameter(torch.zeros(basis.shape[:-1], device=basis.device))  # [S, C, R]

    @classmethod
    def fitted(cls, num_steps: int, steps: Sequence[int], sums: LeastSquares, ridge: float) -> StepWeights:
        """The least-squares solution at the steps that `sums` is of; zero at all others."""
        weights = sums.solve(ridge)
        basis = sums.basis(ridge) * sums.power.sqrt()[..., None, None]  # in units of the target
        start = torch.zeros(num_steps, *weights.shape[1:], device=weights.device)
        directions = torch.zeros(num_steps, *basis.shape[1:], device=basis.device)
        start[list(steps)], directions[list(steps)] = weights, basis.float()
        return cls(start, directions)

    def forward(self, newest: torch.Tensor, changes: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """The correction [..., C] of one step."""
        moved = (self.basis[step] @ self.values[step][..., None])[..., 0].T
        weights = self.start[step] + moved
        return correction(newest, changes, weights[:-1], weights[-1])

    def export(self) -> dict[str, torch.Tensor]:
        """Tensors named as `step_weight_shapes` names them."""
        moved = (self.basis @ self.values[..., None])[..., 0].transpose(1, 2)
        weights = (self.start + moved).detach().cpu()
        return {"weight": weights[:, :-1].clone(), "bias": weights[:, -1].clone()}

    def load_export(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Start from exported tensors, exactly; what was learned since the old start is dropped."""
        with torch.no_grad():
            self.start.copy_(torch.cat([tensors["weight"], tensors["bias"][:, None]], dim=1))
            self.values.zero_()

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One AdamW group; weight decay would pull towards the start, which nothing speaks for."""
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

    def add(self, places: Sequence[int], regressors: torch.Tensor, targets: torch.Tensor) -> None:
        """Regressors [R, B, L, C] that the steps at `places` share, and their targets [n, B, L, C]."""
        number, columns = len(regressors), torch.cat([regressors, targets]).flatten(0, 2)
        # Two dimensions are transposed an order faster than a view of four is copied for the product.
        rows = columns.T.contiguous().unflatten(1, (number + len(targets), -1))  # [C, R + n, B L]
        inputs, wanted = rows[:, :number], rows[:, number:]
        self.gram[places] += (inputs @ inputs.transpose(1, 2)).double()
        self.moment[places] += (wanted @ inputs.transpose(1, 2)).transpose(0, 1).double()
        self.power[places] += wanted.square().sum(dim=2).T.double()

    def solve(self, ridge: float) -> torch.Tensor:
        """Weights [steps, R, C]; a regressor that never varied from zero has none.

        Args:
            ridge: added to the diagonal, relative to it.
        """
        system, present = self._system(ridge)
        weights = torch.linalg.solve(system, self.moment[..., None])[..., 0]
        return (weights * present).transpose(1, 2).float()

    def basis(self, ridge: float) -> torch.Tensor:
        """Uncorrelated combinations of regressors [steps, C, R, R], a column each, whose squares sum to one.

        With `L L'` the Cholesky decomposition of the system that `solve` solves they are the columns of `L'^-1`: a
        column holds no later regressor, and what never varied from zero is in none. The ridge keeps what hardly
        varies from weighing without bound; without one, as much of it as rounding needs is taken.
        """
        system, present = self._system(max(ridge, LEAST_RIDGE))
        factor = torch.linalg.cholesky(system)
        one = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
        columns = torch.linalg.solve_triangular(factor.transpose(-1, -2), one, upper=True)
        kept = present[..., :, None] & present[..., None, :]
        return columns * kept

    def pooled(self, shares: torch.Tensor) -> LeastSquares:
        """All steps as one regression, each counted by its share [steps]."""
        _, channels, regressors = self.moment.shape
        pooled = LeastSquares(1, regressors, channels, self.gram.device)
        pooled.gram += torch.einsum("s,scij->cij", shares, self.gram)
        pooled.moment += torch.einsum("s,sci->ci", shares, self.moment)
        pooled.power += torch.einsum("s,sc->c", shares, self.power)
        return pooled

    def _system(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The regularised system [steps, C, R, R], and which regressors [steps, C, R] there are."""
        energy = self.gram.diagonal(dim1=-2, dim2=-1)
        present = energy > 0
        diagonal = torch.where(present, energy * (1 + ridge), 1.0)
        return self.gram - torch.diag_embed(energy) + torch.diag_embed(diagonal), present
