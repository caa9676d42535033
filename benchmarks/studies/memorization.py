"""What a predictor has learned by heart: its training images beside held-out ones, and a rule that learns nothing.

Training prompts may be easier or harder than the held-out ones to any method, so two differences are told, each with
a 95% bootstrap interval over the prompts of both sides:
    gap   mean PSNR of training images minus that of held-out ones
    net   the same of the lead over the rule, sample by sample: what is left once the prompts' own difficulty is out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.intervals import unpaired_interval
from lesa.evaluation.bootstrap import Interval
from lesa.evaluation.compare import evaluate_methods
from lesa.evaluation.results import Results
from lesa.params import Workload
from lesa.peers.method import Method
from lesa.recording.dataset import Trajectories

CONTROL = "taylor1_ours"  # learns nothing


@dataclass(frozen=True, kw_only=True)
class ByHeart:
    """One method at one number of full steps; dB."""

    images: float  # mean PSNR on training prompts with the noise that was trained on
    prompts: float  # on the same prompts with fresh noise
    gap: Interval
    net: Interval | None  # None for the rule itself

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "prompts": self.prompts,
            "gap": self.gap._asdict(),
            "net": None if self.net is None else self.net._asdict(),
        }


def learned_by_heart(
    workload: Workload,
    pipe: Any,
    methods: Sequence[Method],
    train_set: Trajectories,
    held_out: Results,
    fresh_seed: int,
) -> dict[str, ByHeart]:
    """By `budget/method`, on every training prompt with the first of its recorded noises.

    Args:
        methods: with the rule named `CONTROL` at each of their budgets; all of them stand in `held_out`.
        train_set: the trajectories that they were trained on.
        held_out: of prompts that nothing was trained on.
        fresh_seed: the first noise of the same prompts that nothing was trained on.

    Raises:
        ValueError: a budget without the rule.
    """
    budgets = {method.budget for method in methods}
    if lacking := sorted(budgets - {method.budget for method in methods if method.name == CONTROL}):
        raise ValueError(f"no {CONTROL} at {', '.join(lacking)}: what is learned by heart is told beside it")
    recorded = first_noises(train_set)
    prompts, trained_noise = list(recorded), list(recorded.values())
    fresh_noise = list(range(fresh_seed, fresh_seed + len(prompts)))
    settings = dataclasses.replace(workload.evaluate, converged_fraction=0.0)
    images, fresh = (
        evaluate_methods(pipe, methods, prompts, seeds, call=workload.call, settings=settings, timing=False)
        for seeds in (trained_noise, fresh_noise)
    )
    return compared(images, fresh, held_out)


def first_noises(data: Trajectories) -> dict[str, int]:
    """The first noise of every recorded prompt."""
    found: dict[str, int] = {}
    for prompt, seed in zip(data.prompts, data.seeds, strict=True):
        found.setdefault(prompt, seed)
    return found


def compared(images: Results, fresh: Results, held_out: Results) -> dict[str, ByHeart]:
    """Every row of `images` beside the same of the other two."""
    found = {}
    for row in images.rows:
        budget, method = row.budget, row.method
        leads = [_lead(results, budget, method) for results in (images, held_out)]
        found[f"{budget}/{method}"] = ByHeart(
            images=row.psnr.mean,
            prompts=fresh.row(budget, method).psnr.mean,
            gap=_difference(images.values(budget, method), images, held_out.values(budget, method), held_out),
            net=None if method == CONTROL else _difference(leads[0], images, leads[1], held_out),
        )
    return found


def _lead(results: Results, budget: str, method: str) -> NDArray[np.float64]:
    return results.values(budget, method) - results.values(budget, CONTROL)


def _difference(a: NDArray[np.float64], of_a: Results, b: NDArray[np.float64], of_b: Results) -> Interval:
    return unpaired_interval(a, of_a.groups, b, of_b.groups, of_a.resamples)


def table(known: Mapping[str, ByHeart]) -> str:
    """Markdown, a row a method and number of full steps."""
    lines = [
        "| full steps | method | training images | same prompts, fresh noise | images minus held-out | "
        "the same of the lead over the rule |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, found in known.items():
        budget, method = key.split("/")
        net = "" if found.net is None else _told(found.net)
        lines.append(f"| {budget} | {method} | {found.images:.2f} | {found.prompts:.2f} | {_told(found.gap)} | {net} |")
    return "\n".join(lines)


def _told(value: Interval) -> str:
    return f"{value.mean:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"
