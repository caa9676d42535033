"""Calibrates the choice by need on training runs: their first features, and what each budget makes of them.

It is the pictures that are compared. The error of the final latents says less (r = 0.92 to 0.95 with PSNR on
flux-photos), and a choice made by it lifted the 5th percentile by half as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lesa.by_need import levels, menu
from lesa.difficulty import Difficulty, fit, pooled
from lesa.error_bounds import accelerated_runs
from lesa.metrics import psnr
from lesa.moving_rule import MovingRule
from lesa.params import Workload
from lesa.pipelines import sample
from lesa.predictor import Predictor
from lesa.trajectories import Trajectories

FEWEST_SAMPLES = 8  # below that nothing is fitted
_FEWEST_BUDGETS = 3  # one that is asked for, one faster and one slower
_HIGHEST = 150.0  # dB; of a run that was reproduced to the bit


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a bundle says of it."""

    difficulty: Difficulty
    names: tuple[str, ...]  # budgets, fewest full steps first
    levels: Mapping[str, float]  # dB, of the budgets that may be asked for
    samples: int
    errors: Mapping[str, Mapping[int, list[float]]]  # of the meter in these runs, by budget and full step
    correlation: tuple[float, ...]  # of each budget's quality with what is said of it, samples left out

    def to_dict(self) -> dict[str, Any]:
        """The manifest's entry; rounded, so that last bits do not make another bundle."""
        return {
            "budgets": list(self.names),
            "levels": {name: round(level, 3) for name, level in self.levels.items()},
            "samples": self.samples,
            "correlation": [round(value, 3) for value in self.correlation],
        }


def fit_difficulty(
    pipe: Any,
    workload: Workload,
    predictor: Predictor,
    train: Trajectories,
    quality: Mapping[str, float],
    say: Callable[[str], object] = lambda _: None,
) -> Calibrated | None:
    """The calibration on `publish.need_samples` training runs; None where there is nothing to choose from.

    Args:
        pipe: the workload's pipeline.
        predictor: of the bundle.
        train: recorded training runs, spread evenly over which the samples are.
        quality: mean PSNR of each budget that was measured, dB: of two with as many full steps the better one counts.
        say: told of each budget before its runs.
    """
    schedules = workload.budgets()
    names = menu(schedules, quality)
    runs = [row for row, branch in enumerate(train.branch) if branch == 0]
    count = min(workload.publish.need_samples, len(runs))
    if count < FEWEST_SAMPLES or len(names) < _FEWEST_BUDGETS:
        return None
    rows = [runs[i] for i in torch.linspace(0, len(runs) - 1, count).round().long().tolist()]
    say(f"full steps by need: plain runs of {count} training prompts")
    prompts, seeds = [train.prompts[row] for row in rows], [train.seeds[row] for row in rows]
    plain = sample(pipe, prompts, seeds, workload.call, batch_size=workload.evaluate.batch_size)
    columns: list[torch.Tensor] = []
    errors: dict[str, Mapping[int, list[float]]] = {}
    for name in names:
        say(f"full steps by need: the same runs at budget {name}")
        rule = MovingRule(predictor, schedules[name], train.sigmas)
        made = accelerated_runs(pipe, workload, schedules[name], rule, train, rows)
        columns.append(psnr(made.pictures, plain).clamp(max=_HIGHEST))
        errors[name] = made.errors
    measured = torch.stack(columns, dim=1)
    difficulty, expected = fit(first_features(train, rows), measured)
    found = levels(expected, names, [schedules[name].num_full for name in names])
    correlation = tuple(map(_correlation, expected.unbind(dim=1), measured.unbind(dim=1)))
    return Calibrated(difficulty, names, found, count, errors, correlation)


def first_features(data: Trajectories, rows: list[int]) -> torch.Tensor:
    """`pooled` of step 0 [N, 2 C], of all guidance branches of the runs whose first branch stands in `rows`."""
    known = {place: row for row, place in enumerate(zip(data.keys, data.branch, strict=True))}
    branches = max(data.branch) + 1
    found = []
    for row in rows:
        of_run = [known[data.keys[row], branch] for branch in range(branches)]
        found.append(pooled(data.feature_batch(of_run, [0]).unbind(dim=0)))
    return torch.cat(found)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    if float(a.std()) == 0 or float(b.std()) == 0:
        return 0.0
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
