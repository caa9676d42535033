"""What `lesa.enable(..., adaptive=True)` takes from a bundle: the bounds of a budget and how far it may go."""

from __future__ import annotations

from typing import Any

import torch

from lesa.bundle import Bundle
from lesa.fallback import Fallback
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
    slower = [name for name, b in manifest.budgets.items() if b.schedule.num_full > budget.schedule.num_full]
    if not slower:
        raise ValueError(f"adaptive: {chosen} is the slowest budget of this bundle, with none to change over to")
    if not any(budget.error_bounds):
        raise ValueError(
            f"adaptive: budget {chosen!r} of this bundle has no error bounds; publish the bundle again, with at least "
            "two validation trajectories"
        )
    name = min(slower, key=lambda other: manifest.budgets[other].schedule.num_full)
    schedule = manifest.budgets[name].schedule
    return Fallback(
        budget.schedule,
        {s: b for s, b in zip(budget.schedule.full_steps, budget.error_bounds, strict=True) if b is not None},
        schedule,
        MovingRule(bundle.predictor, schedule, torch.tensor(manifest.sigmas)),
        name,
    )


def adaptive_problems(scheduler: Any, schedule: Schedule) -> list[str]:
    """What keeps a run from being adaptive: bounds are known for the bundle's own number of steps."""
    steps = getattr(scheduler, "num_inference_steps", None)
    if steps is None or steps == schedule.num_steps:
        return []
    return [f"adaptive: error bounds are known for {schedule.num_steps} steps; for other numbers enable without it"]
