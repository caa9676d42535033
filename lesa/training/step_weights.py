"""Weights of their own for each step, beside the experts: the predictor kind `per_step`.

    h_hat_s = h_0 + alpha_s z + c_s h_0 + sum_i u_si (h_{i-1} - h_i) + b_s

with h_0, h_1, ... the cached features, newest first, and c, u, b per channel: a few multiply-adds an element, no
matrix. What noise stages share (the experts' low-rank projection) stays shared. Differences and not features are
weighted because features of neighbouring full steps nearly cancel, which low precision would not survive.
Shapes: B trajectories, S steps, L tokens, C channels, K history entries, R = K + 1 regressors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lesa.predictor.predictor import BoundPredictor
from lesa.predictor.step_weights import correction, differences
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule

LEAST_RIDGE = 1e-6  # of a basis: more than float32 products are rounded by, so that it always exists


class StepWeights(nn.Module):
    """Trainable step weights, as a change from where they start, of whitened regressors, which make descent even.

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
        """One AdamW group; no weight decay: it would pull towards the start."""
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


BATCH = 16  # trajectories read at a time
# (features [B, L, C] of the history, newest first; n steps that have it) -> [n, B, L, C] without step weights
Prediction = Callable[[Sequence[torch.Tensor], Sequence[int]], torch.Tensor]


@torch.no_grad()
def fit_step_weights(
    data: Trajectories,
    schedule: Schedule,
    steps: Sequence[int],
    predict: Prediction,
    *,
    history_size: int,
    ridge: float,
    indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> StepWeights:
    """Step weights that bring `predict` closest to the recorded features.

    Args:
        data: training trajectories.
        schedule: which steps are full; step weights are good for no other.
        steps: predicted steps to fit; at all others the weights are zero.
        predict: the prediction they correct.
        history_size: K; early steps use what there is.
        ridge: relative weight of the pull to zero.
        indices: trajectories to use; None uses all.
    """
    chosen = list(range(len(data))) if indices is None else list(indices)
    needed = sorted({*steps}.union(*(schedule.anchors(step, history_size) for step in steps))) if steps else [0]
    at = {step: index for index, step in enumerate(needed)}
    rows_by_past: dict[tuple[int, ...], list[int]] = {}  # steps between two full ones have one history
    for row, step in enumerate(steps):
        rows_by_past.setdefault(tuple(schedule.anchors(step, history_size)), []).append(row)
    sums: LeastSquares | None = None
    for start in range(0, len(chosen), BATCH):
        features = data.feature_batch(chosen[start : start + BATCH], needed).to(device)
        if sums is None:
            sums = LeastSquares(len(steps), history_size + 1, features.shape[-1], features.device)
        for past, rows in rows_by_past.items():
            history, here = [features[:, at[step]] for step in past], [steps[row] for row in rows]
            regressors = torch.zeros(history_size + 1, *history[0].shape, device=features.device)
            regressors[0] = history[0]
            for index, change in enumerate(differences(history, history_size), start=1):
                regressors[index] = change
            regressors[-1] = 1.0
            true = features[:, [at[step] for step in here]].transpose(0, 1)
            sums.add(rows, regressors, true - predict(history, here))
    assert sums is not None, "no trajectories"
    return StepWeights.fitted(schedule.num_steps, steps, sums, ridge)


ROUNDING = 1e-12  # of a feature's energy: what a difference has less of is rounding
CHUNK = 1 << 28  # bytes of float64 features at a time


class StepFits:
    """Least-squares step weights for any schedule: the same as `lesa.training.step_weights` finds without experts.

    Args:
        data: trajectories.
        indices: which of them are fitted.
        history_size: K.
        ridge: relative to the regressors' energy.
        device: where the sums are made and the weights stay.
    """

    def __init__(
        self, data: Trajectories, indices: Sequence[int], history_size: int, ridge: float, device: torch.device
    ) -> None:
        self._size, self._ridge = history_size, ridge
        self._products = _products(data, indices, device)  # [S + 1, S + 1, C]; the last row is the constant's

    def weights(self, schedule: Schedule) -> StepWeights:
        """Fitted at every predicted step of `schedule`, zero elsewhere."""
        steps = list(schedule.predicted_steps)
        sums = self._sums(schedule, steps)
        return StepWeights.fitted(schedule.num_steps, steps, sums, self._ridge)

    def _sums(self, schedule: Schedule, steps: Sequence[int]) -> LeastSquares:
        """What `LeastSquares` would have gathered at n steps, taken from the products of all."""
        products, size = self._products, self._size
        sums = LeastSquares(len(steps), size + 1, products.shape[-1], products.device)
        if not steps:
            return sums
        anchors = [schedule.anchors(step, size) for step in steps]
        constant = len(products) - 1
        chosen = [[*past, *[past[0]] * (size - len(past)), constant] for past in anchors]
        made = torch.stack([_regressors(size, len(past)) for past in anchors]).to(products.device)[:, None]
        index = torch.tensor(chosen, device=products.device)  # [n, R]
        target, newest = torch.tensor(steps, device=products.device), index[:, 0]
        between = products[index[:, :, None], index[:, None, :]].permute(0, 3, 1, 2)  # [n, C, R, R]
        wanted = products[index, target[:, None]] - products[index, newest[:, None]]  # [n, R, C]
        gram = made @ between @ made.transpose(2, 3)
        energy = between.diagonal(dim1=2, dim2=3)[..., :-1].amax(dim=-1, keepdim=True)  # of the loudest feature
        quiet = gram.diagonal(dim1=2, dim2=3) <= ROUNDING * energy
        sums.gram = gram.masked_fill(quiet[..., None] | quiet[..., None, :], 0.0)
        sums.moment = (made @ wanted.transpose(1, 2)[..., None])[..., 0]
        power = products[target, target] - 2 * products[target, newest] + products[newest, newest]
        sums.power = power.clamp_min(0)
        return sums

    def rule(self, schedule: Schedule) -> BoundPredictor:
        """The fitted predictor on `schedule`: step weights alone, no experts."""
        steps = list(schedule.predicted_steps)
        solved = self._sums(schedule, steps).solve(self._ridge)
        table = torch.zeros(schedule.num_steps, *solved.shape[1:], device=solved.device)
        table[steps] = solved
        return BoundPredictor(
            name="least squares",
            history_size=self._size,
            keeps_predictions=False,
            alphas=(math.nan,) * schedule.num_steps,
            stages=(0,) * schedule.num_steps,
            sizes=(1,),
            expert_sizes=(1,),
            experts={0: {}},
            by_step={"weight": table[:, :-1], "bias": table[:, -1]},
        )


def _regressors(size: int, held: int) -> torch.Tensor:
    """[R, R], what regressors are made of: the newest feature, `held - 1` differences, and a constant."""
    rows = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    rows[0, 0] = rows[-1, -1] = 1.0
    for place in range(1, held):
        rows[place, place - 1], rows[place, place] = 1.0, -1.0
    return rows


@torch.no_grad()
def _products(data: Trajectories, indices: Sequence[int], device: torch.device) -> torch.Tensor:
    """Inner products [S + 1, S + 1, C] of the channels' features at all steps, and with a constant of one.

    Float64: a difference of neighbouring steps is a small part of either.
    """
    steps = range(len(data.sigmas) - 1)
    some = data.feature_batch(indices[:1], steps)
    size = max(1, CHUNK // (8 * some.numel()))
    total = torch.zeros(some.shape[-1], len(steps) + 1, len(steps) + 1, dtype=torch.float64, device=device)
    for start in range(0, len(indices), size):
        features = data.feature_batch(indices[start : start + size], steps).to(device, torch.float64)
        rows = features.permute(3, 1, 0, 2).flatten(2)  # [C, S, B L]
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        total += rows @ rows.transpose(1, 2)
    return total.permute(1, 2, 0).contiguous()
