"""Stage boundaries learned from recorded trajectories: where the paper (arXiv 2602.20497) sets them by hand.

Steps of one stage share weights. What sharing costs is known in closed form for weights a channel: for steps i .. j

    cost(i, j) = min over w of  sum_s in i..j (sigma_s - sigma_s+1)^2 || f_s - h_0 - alpha_s w [h_0 - h_1, h_0, 1] ||^2

with alpha_s of first-order extrapolation, which is what experts start from. A dynamic programme finds the stages with
the lowest sum. Shapes: B trajectories, S steps, L tokens, C channels, R regressors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lesa.predictor.alpha import linear_alpha, time_offsets
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule

_RIDGE = 1e-3  # relative, as the step weights'
_TRAJECTORIES = 64


def learned_boundaries(data: Trajectories, schedule: Schedule, num_stages: int) -> tuple[float, ...]:
    """Noise levels between the stages, for the steps that the schedule predicts.

    Raises:
        ValueError: fewer predicted steps with two full steps before them than stages.
    """
    steps = [step for step in schedule.predicted_steps if len(schedule.anchors(step, 2)) == 2]
    if len(steps) < num_stages:
        raise ValueError(f"schedule ({schedule}): has {len(steps)} steps to learn {num_stages} stages from")
    parts = _sums(data, schedule, steps)
    cost = [[0.0] * (len(steps) + 1) for _ in steps]
    for first in range(len(steps)):
        for end in range(first + 1, len(steps) + 1):
            cost[first][end] = _shared_cost(*(sums[first:end].sum(0) for sums in parts))
    starts = cheapest_parts(cost, num_stages)
    middle = [(float(data.sigmas[steps[s - 1]]) + float(data.sigmas[steps[s]])) / 2 for s in starts[1:]]
    return tuple(round(level, 4) for level in middle)


def cheapest_parts(cost: Sequence[Sequence[float]], parts: int) -> list[int]:
    """First places of `parts` neighbouring parts of `len(cost)` places; `cost[i][j]` is that of places i .. j - 1."""
    size = len(cost)
    best = [[math.inf] * (size + 1) for _ in range(parts + 1)]
    came = [[0] * (size + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for part in range(1, parts + 1):
        for end in range(part, size + 1):
            for start in range(part - 1, end):
                value = best[part - 1][start] + cost[start][end]
                if value < best[part][end]:
                    best[part][end], came[part][end] = value, start
    starts, end = [], size
    for part in range(parts, 0, -1):
        end = came[part][end]
        starts.append(end)
    return starts[::-1]


def _sums(
    data: Trajectories, schedule: Schedule, steps: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of products of each step: [S, C, R, R], [S, C, R], [S, C], in double precision."""
    indices = list(range(min(len(data), _TRAJECTORIES)))
    widths = data.sigmas[:-1] - data.sigmas[1:]
    grams, moments, powers = [], [], []
    for step in steps:
        past = schedule.anchors(step, 2)
        target, newest, older = data.feature_batch(indices, [step, *past]).double().flatten(2).unbind(1)
        channels = data.channels
        target, newest, older = (x.reshape(-1, channels) for x in (target, newest, older))
        weight = float(widths[step])
        alpha = float(linear_alpha(time_offsets(data.sigmas, step, past)[None])[0])
        rows = weight * alpha * torch.stack([newest - older, newest, torch.ones_like(newest)], dim=-1)  # [B L, C, R]
        wanted = weight * (target - newest)
        grams.append(torch.einsum("ncr,ncq->crq", rows, rows))
        moments.append(torch.einsum("ncr,nc->cr", rows, wanted))
        powers.append(wanted.square().sum(dim=0))
    return torch.stack(grams), torch.stack(moments), torch.stack(powers)


def _shared_cost(gram: torch.Tensor, moment: torch.Tensor, power: torch.Tensor) -> float:
    """What weights shared by all the steps summed up leave of the squared error."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    system = gram + torch.diag_embed(diagonal * _RIDGE + 1e-12)
    weights = torch.linalg.solve(system, moment[..., None])[..., 0]
    quadratic = torch.einsum("cr,crq,cq->c", weights, gram, weights)
    return float((power - 2 * (weights * moment).sum(-1) + quadratic).sum())
