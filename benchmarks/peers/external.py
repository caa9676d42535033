"""Peers that are not ours: a row each, with the settings they are run at."""

from __future__ import annotations

import torch
from diffusers import TaylorSeerCacheConfig

from lesa.peers.caches import diffusers_cache_method
from lesa.peers.method import Method
from lesa.schedule import Schedule

BEFORE = 3  # diffusers' default number of leading full steps


def external_peers(budget: str, schedule: Schedule) -> list[Method]:
    """Every external peer at a budget; those that cannot run at as many full steps are left out."""
    return [
        method
        for order in (1, 2)
        if (method := taylorseer_lite(budget, schedule.num_steps, schedule.num_full, order)) is not None
    ]


def taylorseer_lite(budget: str, num_steps: int, num_full: int, order: int) -> Method | None:
    """diffusers' TaylorSeer on the transformer's output, its own full steps, factors in float32."""
    intervals = [n for n in range(1, num_steps) if len(taylorseer_steps(num_steps, n)) == num_full]
    if not intervals:
        return None
    interval = intervals[0]  # the smallest: its last full step is the latest
    return diffusers_cache_method(
        budget,
        num_steps,
        lambda: TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=BEFORE,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        ),
        name=f"diffusers_taylorseer_lite{order}",
        label=f"diffusers TaylorSeer lite, order {order}",
        settings={"cache_interval": interval, "max_order": order, "factors": "float32"},
    )


def taylorseer_steps(num_steps: int, interval: int) -> list[int]:
    """diffusers' full steps: the first three, then where `(step - 3 - 1) % interval == 0`."""
    return [step for step in range(num_steps) if step < BEFORE or (step - BEFORE - 1) % interval == 0]
