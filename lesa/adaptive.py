"""What `lesa.enable(..., adaptive=True)` takes from a bundle: the bounds of a budget and how far it may go."""

from __future__ import annotations

from typing import Any

import torch

from lesa.bundle import Bundle
from lesa.fallback import Fallback
from lesa.manifest import Manifest
from lesa.moving_rule import MovingRule
from lesa.schedule import Schedule


def fallback_of(bundle: Bundle, chosen: str) -> Fallback:
    """The fallback of a budget: its error bounds, and the next slower budget to change over to.

    Raises:
        ValueError: what was chosen is no budget, is the slowest, or has no bounds.
    """
    manifest = bundle.manifest
    if chosen not in manifest.budgets:
        raise ValueError(f"adaptive: {chosen} has no error bounds; choose a budget: {', '.join(manifest.budgets)}")
    budget = manifest.budgets[chosen]
    name = slower_budget(manifest, chosen)
    if not budget.bounds:
        raise ValueError(
            f"adaptive: budget {chosen!r} of this bundle has no error bounds: they were calibrated on fewer than two "
            "runs, or with errors that were no numbers; publish the bundle again"
        )
    schedule = manifest.budgets[name].schedule
    return Fallback(
        budget.schedule,
        budget.bounds,
        schedule,
        MovingRule(bundle.predictor, schedule, torch.tensor(manifest.sigmas)),
        name,
    )


def slower_budget(manifest: Manifest, name: str) -> str:
    """The next slower budget; `ValueError` for the slowest one and for none."""
    if name not in manifest.budgets:
        raise ValueError(f"budget: {name!r} is not one of {', '.join(manifest.budgets)}")
    full = {other: budget.schedule.num_full for other, budget in manifest.budgets.items()}
    slower = [other for other, count in full.items() if count > full[name]]
    if not slower:
        raise ValueError(f"adaptive: {name} is the slowest budget of this bundle, with none to change over to")
    return min(slower, key=full.__getitem__)


def adaptive_problems(scheduler: Any, schedule: Schedule) -> list[str]:
    """What keeps a run from being adaptive: bounds are known for the bundle's own number of steps."""
    steps = getattr(scheduler, "num_inference_steps", None)
    if steps is None or steps == schedule.num_steps:
        return []
    return [f"adaptive: error bounds are known for {schedule.num_steps} steps; for other numbers enable without it"]
