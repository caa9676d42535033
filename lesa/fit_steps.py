"""Closed form of the step weights: least squares on recorded trajectories, a regression a step and channel.

The target is what the expert leaves over, so the ridge pulls towards the expert alone (the paper's form).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lesa.schedule import Schedule
from lesa.step_weights import LeastSquares, StepWeights, differences
from lesa.trajectories import Trajectories

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
