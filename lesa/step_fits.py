"""Step weights in closed form for any schedule, from sums that are made once.

What a regression of one step on a history needs of the recorded trajectories is which features multiply to what: for
each channel a matrix of inner products between all steps, and with a constant. Once these are known, the weights of a
schedule are a few small systems of equations, and the trajectories are not read again.
Shapes: B trajectories, S steps, L tokens, C channels, K history entries, R = K + 1 regressors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lesa.predictor import BoundPredictor
from lesa.schedule import Schedule
from lesa.step_weights import LeastSquares, StepWeights
from lesa.trajectories import Trajectories

ROUNDING = 1e-12  # of a feature's energy: what a difference has less of is rounding
CHUNK = 1 << 28  # bytes of float64 features at a time


class StepFits:
    """Least-squares step weights for any schedule: the same as `lesa.fit_steps` finds without experts.

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
