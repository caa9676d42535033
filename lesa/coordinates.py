"""Coordinates for an expert's projection, from what it is to predict on recorded trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lesa.expert import Expert
from lesa.loop import TrainingError
from lesa.step_weights import LeastSquares, differences, of_differences
from lesa.trajectories import Trajectories
from lesa.windows import Windows

SAMPLES = 64  # trajectories of each case: directions and sizes need no more


@torch.no_grad()
def learn_in_coordinates(
    expert: Expert, cases: Sequence[tuple[Trajectories, Windows]], *, ridge: float, batch_size: int
) -> None:
    """Let the expert's projection learn in uncorrelated inputs and in units of what its predictions lack.

    Args:
        cases: trajectories and the steps that are predicted on them; each counts alike, however far off it is.
        ridge: relative to the regressors' energy; keeps what hardly varies from weighing without bound.
        batch_size: trajectories read at a time.

    Raises:
        TrainingError: a recorded feature is not finite.
    """
    cases = [(data, windows) for data, windows in cases if windows.steps]
    if not cases:
        return
    size = len(expert.low)
    channels, device = expert.projection.start_of("bias").numel(), expert.low.device
    sums = LeastSquares(len(cases), size + 1, channels, device)
    counts = torch.zeros(len(cases), dtype=torch.float64, device=device)
    for place, (data, windows) in enumerate(cases):
        chosen = torch.linspace(0, len(data) - 1, min(SAMPLES, len(data))).round().long()
        for batch in chosen.split(batch_size):
            features = data.feature_batch(batch.tolist(), windows.needed).to(device)
            found = windows.predict(expert, features)  # [B, n, L, C]
            alphas = expert.alpha(windows.offsets.to(device), windows.steps)
            at = {step: index for index, step in enumerate(windows.needed)}
            for index, (step, past) in enumerate(zip(windows.steps, windows.past, strict=True)):
                history = [features[:, at[earlier]] for earlier in past]
                newest = history[0]
                regressors = torch.stack([newest, *differences(history, size), torch.ones_like(newest)])
                sums.add([place], alphas[index] * regressors, (features[:, at[step]] - found[:, index])[None])
                counts[place] += newest[..., 0].numel()
    if not sums.power.isfinite().all():
        raise TrainingError("recorded features are not finite: look for a bad trajectory with `lesa store verify`")
    shares = torch.where(sums.power.sum(dim=1) > 0, 1.0 / sums.power.sum(dim=1), 0.0)
    if not shares.any():
        return  # nothing is lacking
    pooled, count = sums.pooled(shares), (shares * counts).sum()
    inputs = (pooled.basis(ridge)[0] * count.sqrt()).permute(1, 0, 2)  # [R, C, R], the first of differences
    inputs = torch.cat([of_differences(inputs[:-1]), inputs[-1:]]).permute(1, 0, 2)
    expert.projection.learn_in(inputs.float(), (pooled.power[0] / count).sqrt().float())
