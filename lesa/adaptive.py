"""What `lesa.enable(..., adaptive=True)` takes from a bundle: full steps by need, and what happens at an alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lesa.bundle import Bundle
from lesa.by_need import ByNeed, Path
from lesa.fallback import Fallback
from lesa.forecast import Rule
from lesa.manifest import Manifest
from lesa.moving_rule import MovingRule
from lesa.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Adaptive:
    """What an adaptive run may do, at least one of two."""

    fallback: Fallback | None  # of the budget that was asked for
    by_need: ByNeed | None

    @property
    def promise(self) -> str:
        """For the summary."""
        return "; ".join(part.promise for part in (self.by_need, self.fallback) if part is not None)


def adaptive_of(bundle: Bundle, chosen: str) -> Adaptive:
    """What a bundle offers for a budget.

    Raises:
        ValueError: what was chosen is no budget, is the slowest, or the bundle has neither bounds nor levels for it.
    """
    manifest = bundle.manifest
    if chosen not in manifest.budgets:
        raise ValueError(f"adaptive: {chosen} has no error bounds; choose a budget: {', '.join(manifest.budgets)}")
    slower_budget(manifest, chosen)

    @cache  # a slower budget's serves the runs that change over to it and those that begin on it
    def rule(name: str) -> MovingRule:
        return MovingRule(bundle.predictor, manifest.budgets[name].schedule, torch.tensor(manifest.sigmas))

    found = Adaptive(_fallback(manifest, chosen, rule), _by_need(bundle, chosen, rule))
    if found.fallback is None and found.by_need is None:
        raise ValueError(
            f"adaptive: budget {chosen!r} of this bundle has no error bounds; publish the bundle again, with at least "
            "two validation trajectories"
        )
    return found


def _fallback(manifest: Manifest, name: str, rule: Callable[[str], Rule]) -> Fallback | None:
    """To the next slower budget; None for the slowest and for one without bounds."""
    budget = manifest.budgets[name]
    slower = _next_slower(manifest, name)
    if slower is None or not budget.bounds:
        return None
    return Fallback(budget.schedule, budget.bounds, manifest.budgets[slower].schedule, rule(slower), slower)


def _by_need(bundle: Bundle, asked: str, rule: Callable[[str], Rule]) -> ByNeed | None:
    """None where the bundle has no level for the budget: it is the fastest of them, or nothing was calibrated."""
    entry = bundle.manifest.difficulty
    if entry is None or bundle.difficulty is None or asked not in entry.levels:
        return None
    budgets = bundle.manifest.budgets
    paths = {
        name: Path(
            schedule=budgets[name].schedule,
            rule=rule(name),
            bounds=budgets[name].bounds,
            fallback=_fallback(bundle.manifest, name, rule),
        )
        for name in entry.budgets
    }
    return ByNeed(
        difficulty=bundle.difficulty, names=entry.budgets, paths=paths, level=entry.levels[asked], asked=asked
    )


def slower_budget(manifest: Manifest, name: str) -> str:
    """The next slower budget; `ValueError` for the slowest one and for none."""
    if name not in manifest.budgets:
        raise ValueError(f"budget: {name!r} is not one of {', '.join(manifest.budgets)}")
    slower = _next_slower(manifest, name)
    if slower is None:
        raise ValueError(f"adaptive: {name} is the slowest budget of this bundle, with none to change over to")
    return slower


def _next_slower(manifest: Manifest, name: str) -> str | None:
    full = {other: budget.schedule.num_full for other, budget in manifest.budgets.items()}
    slower = [other for other, count in full.items() if count > full[name]]
    return min(slower, key=full.__getitem__) if slower else None


def adaptive_problems(scheduler: Any, schedule: Schedule) -> list[str]:
    """What keeps a run from being adaptive: bounds are known for the bundle's own number of steps."""
    steps = getattr(scheduler, "num_inference_steps", None)
    if steps is None or steps == schedule.num_steps:
        return []
    return [f"adaptive: error bounds are known for {schedule.num_steps} steps; for other numbers enable without it"]
