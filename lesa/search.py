"""Where the full steps should stand: a path cost from recorded trajectories, minimised by dynamic programming.

Between two full steps c < d the feature is extrapolated from the two newest full steps b < c, every channel along its
own least-squares slope. What that does to the latents by step d, `|sum_s dsigma_s (v_hat_s - v_s)|^2` over the
predicted steps between, is the cost of going from (b, c) to d, and the cheapest path with a given number of full steps
is found exactly. The form of the cost is DPCache's (CVPR 2026), here with fitted slopes and errors after the
transformer's ends. No forward pass of the model is needed; `lesa.search_loop` goes on from here with true runs.
Shapes: B trajectories, S steps, L tokens, C channels, O output channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lesa.ends import Ends
from lesa.schedule import Schedule
from lesa.trajectories import Trajectories

MAX_GAP = 16  # steps between neighbouring full steps that are considered
TRAJECTORIES = 32  # that the cost is averaged over

Costs = dict[tuple[int, int], list[float]]


def cheapest_schedules(
    data: Trajectories, ends: Ends, num_full: Sequence[int], *, max_gap: int = MAX_GAP
) -> dict[int, Schedule]:
    """The cheapest schedule for each number of full steps.

    Args:
        data: training trajectories; validation and test ones have no say.
        ends: the transformer's ends.
        num_full: numbers of full steps, each at least 2.
        max_gap: longest distance between neighbouring full steps.

    Raises:
        ValueError: numbers of full steps that no schedule of the run can have.
    """
    num_steps = len(data.sigmas) - 1
    impossible = [count for count in num_full if not 2 <= count <= num_steps or 1 + (count - 1) * max_gap < num_steps]
    if impossible:
        raise ValueError(
            f"full steps {impossible} of {num_steps}: at least 2 and at most all, with gaps of at most {max_gap}"
        )
    costs = segment_costs(data, ends, max_gap)
    return {count: cheapest_path(costs, num_steps, count) for count in num_full}


@torch.no_grad()
def segment_costs(data: Trajectories, ends: Ends, max_gap: int) -> Costs:
    """`costs[b, c][k]`: mean squared drift of the latents after predicting steps c+1 .. c+k from full steps b and c."""
    chosen = list(range(min(TRAJECTORIES, len(data))))
    num_steps = len(data.sigmas) - 1
    features = data.feature_batch(chosen, range(num_steps))
    temb = data.temb[chosen]
    output = torch.stack([ends(features[:, s], temb[:, s]) for s in range(num_steps)], dim=1)
    dsigma = data.sigmas.diff()
    costs: Costs = {}
    for c in range(1, num_steps):
        ahead = range(c + 1, min(num_steps, c + max_gap))
        for b in range(max(0, c - max_gap), c):
            costs[b, c] = [0.0]
            if not ahead:
                continue
            slope = features[:, c] - features[:, b]
            energy = slope.square().mean(dim=(0, 1)) + 1e-12
            predicted = [
                features[:, c] + ((features[:, s] - features[:, c]) * slope).mean(dim=(0, 1)) / energy * slope
                for s in ahead
            ]
            conditioning = torch.cat([temb[:, s] for s in ahead])
            said = ends(torch.cat(predicted), conditioning).unflatten(0, (len(ahead), len(chosen)))
            drift = torch.zeros_like(output[:, 0])
            for place, s in enumerate(ahead):
                drift = drift + dsigma[s] * (said[place] - output[:, s])
                costs[b, c].append(float(drift.square().mean()))
    return costs


def cheapest_path(costs: Costs, num_steps: int, num_full: int) -> Schedule:
    """The schedule of `num_full` full steps, 0 and 1 among them, with the lowest sum of costs."""
    paths: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 1): (0.0, (0, 1))}
    for _ in range(num_full - 2):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (b, c), (cost, path) in paths.items():
            for skipped, added in enumerate(costs[b, c]):
                d = c + skipped + 1
                if (c, d) not in costs:
                    break
                if cost + added < longer.get((c, d), (math.inf, ()))[0]:
                    longer[c, d] = (cost + added, (*path, d))
        paths = longer
    ends_at = {
        path: cost + costs[b, c][num_steps - 1 - c]
        for (b, c), (cost, path) in paths.items()
        if num_steps - 1 - c < len(costs[b, c])
    }
    if not ends_at:
        raise ValueError(f"no schedule of {num_full} full steps reaches step {num_steps - 1}: allow longer gaps")
    _, best = min((cost, path) for path, cost in ends_at.items())
    return Schedule.explicit(num_steps, best)
