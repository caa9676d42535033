"""Where the full steps should stand: a path cost from recorded trajectories, minimised by dynamic programming.

Between two full steps c < d every channel of the feature is fitted on the feature of c, its difference to the full
step before, b, and a constant: what weights of each step's own can express with a history of two. What that does to the
latents by step d, `|sum_s dsigma_s (v_hat_s - v_s)|^2` over the predicted steps between, is the cost of going from
(b, c) to d, and the cheapest path with a given number of full steps is found exactly. The form of the cost is
DPCache's (CVPR 2026), here with fitted predictions and errors after the transformer's output head. No forward pass of
the model is needed; `lesa.search.descent` goes on from here with true runs.
Shapes: B trajectories, S steps, L tokens, C channels, O output channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lesa.errors import LesaError
from lesa.models.output_head import OutputHead
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule, longest_run

MAX_GAP = 16  # steps between neighbouring full steps that are considered
TRAJECTORIES = 32  # that the cost is averaged over

NOTHING = -1  # the full step before step 0
RIDGE = 1e-3

Costs = dict[tuple[int, int], list[float]]  # of pairs of full steps in a row


def cheapest_schedules(
    data: Trajectories, head: OutputHead, num_full: Sequence[int], *, max_gap: int = MAX_GAP, leading: int = 1
) -> dict[int, Schedule]:
    """The cheapest schedule for each number of full steps.

    Args:
        data: training trajectories; validation and test ones have no say.
        head: the transformer's output head.
        num_full: numbers of full steps, each at least 2.
        max_gap: longest distance between neighbouring full steps.
        leading: full steps before the first predicted one, 1 or 2: predictors that need a history want 2.

    Raises:
        ValueError: numbers of full steps that no schedule of the run can have.
    """
    num_steps = len(data.sigmas) - 1
    impossible = [
        count
        for count in num_full
        if not 2 <= count <= num_steps or longest_run(count, max_gap, leading) < num_steps
    ]
    if impossible:
        raise LesaError(
            f"full steps {impossible} of {num_steps}: at least 2 and at most all, with gaps of at most {max_gap}"
        )
    costs = segment_costs(data, head, max_gap)
    schedules = {}
    for count in num_full:
        path = cheapest_path(costs, num_steps, count, leading)
        assert path is not None, "gaps that are long enough were checked above"
        schedules[count] = Schedule.explicit(num_steps, path)
    return schedules


@torch.no_grad()
def segment_costs(data: Trajectories, head: OutputHead, max_gap: int) -> Costs:
    """`costs[b, c][k]`: mean squared drift of the latents after predicting steps c+1 .. c+k from full steps b and c."""
    chosen = list(range(min(TRAJECTORIES, len(data))))
    num_steps = len(data.sigmas) - 1
    features = data.feature_batch(chosen, range(num_steps))
    temb = data.temb[chosen]
    output = torch.stack([head(features[:, s], temb[:, s]) for s in range(num_steps)], dim=1)
    dsigma = data.sigmas.diff()
    costs: Costs = {}
    for c in range(num_steps):
        ahead = list(range(c + 1, min(num_steps, c + max_gap)))
        for b in range(max(0, c - max_gap), c) if c else (NOTHING,):
            costs[b, c] = [0.0]
            if not ahead:
                continue
            newest = features[:, c]
            regressors = [newest, torch.ones_like(newest)]
            if b != NOTHING:
                regressors.append(newest - features[:, b])
            predicted = newest + _fitted(torch.stack(regressors), features[:, ahead] - newest[:, None])
            conditioning = torch.cat([temb[:, s] for s in ahead])
            velocities = head(predicted.flatten(0, 1), conditioning).unflatten(0, (len(ahead), len(chosen)))
            drift = torch.zeros_like(output[:, 0])
            for place, s in enumerate(ahead):
                drift = drift + dsigma[s] * (velocities[place] - output[:, s])
                costs[b, c].append(float(drift.square().mean()))
    return costs


def _fitted(regressors: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least-squares fits [n, B, L, C] of targets [B, n, L, C] on regressors [R, B, L, C], each channel by itself."""
    rows = regressors.flatten(1, 2).permute(2, 1, 0)  # [C, B L, R]
    gram = rows.transpose(1, 2) @ rows
    gram = gram + RIDGE * torch.diag_embed(gram.diagonal(dim1=1, dim2=2)) + 1e-9 * torch.eye(len(regressors))
    wanted = target.permute(3, 0, 2, 1).flatten(1, 2)  # [C, B L, n]
    weights = torch.linalg.solve(gram, rows.transpose(1, 2) @ wanted)
    predicted = (rows @ weights).unflatten(1, (target.shape[0], target.shape[2]))  # [C, B, L, n]
    return predicted.permute(3, 1, 2, 0)


def cheapest_path(costs: Costs, num_steps: int, num_full: int, leading: int = 1) -> tuple[int, ...] | None:
    """The `num_full` full steps, the first `leading` (1 or 2) ones in a row, with the lowest sum of costs.

    Args:
        costs: `costs[b, c][k]` of predicting steps c+1 .. c+k from full steps b and c, for every gap that is allowed;
            b is `NOTHING` before the first full step.
        num_steps: of the run.

    Returns:
        None where no path with such gaps is that long or short.
    """
    start = (NOTHING, 0) if leading == 1 else (0, 1)
    paths: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {start: (0.0, tuple(range(leading)))}
    for _ in range(num_full - leading):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (b, c), (cost, path) in paths.items():
            for skipped, added in enumerate(costs[b, c]):
                d = c + skipped + 1
                if (c, d) not in costs:
                    break
                if cost + added < longer.get((c, d), (math.inf, ()))[0]:
                    longer[c, d] = (cost + added, (*path, d))
        paths = longer
    complete = [
        (cost + costs[b, c][num_steps - 1 - c], path)
        for (b, c), (cost, path) in paths.items()
        if num_steps - 1 - c < len(costs[b, c])
    ]
    return min(complete)[1] if complete else None
