"""Our Taylor rule against diffusers' TaylorSeer, where both do the same: its schedule, its place, its
precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import TaylorSeerCacheConfig

from lesa.models.pipelines import sample
from lesa.peers.rules import RULES
from lesa.predictor.rule import History
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL
from tests.helpers.evaluation import pipeline
from tests.helpers.tiny import PROMPTS

NUM_STEPS, BEFORE = 20, 3


def diffusers_schedule(interval: int) -> Schedule:
    """Full before step 3, then where `(step - 3 - 1) % interval == 0`."""
    steps = [s for s in range(NUM_STEPS) if s < BEFORE or (s - BEFORE - 1) % interval == 0]
    return Schedule.explicit(NUM_STEPS, steps)


@contextmanager
def taylor_at_output(pipe: Any, order: int, schedule: Schedule) -> Iterator[list[int]]:
    """Our rule on what `proj_out` returns; yields the steps that it predicted."""
    rule = RULES[f"taylor{order}"](schedule, torch.empty(0))
    history, predicted = History(rule.history_size), list[int]()
    step = -1

    def replace(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal step
        step = (step + 1) % NUM_STEPS
        if step == 0:
            history.reset()
        if schedule.is_full(step):
            history.push(step, output)
            return output
        predicted.append(step)
        return rule(history, step)

    handle = pipe.transformer.proj_out.register_forward_hook(replace)
    try:
        yield predicted
    finally:
        handle.remove()


@pytest.mark.parametrize(("order", "interval"), [(1, 5), (2, 3)])
def test_equal_to_diffusers_taylorseer_in_lite_mode(order: int, interval: int) -> None:
    pipe = pipeline()
    call = dataclasses.replace(CALL, num_inference_steps=NUM_STEPS)
    arguments = (PROMPTS[:2], [5, 6], call, "latent")
    schedule = diffusers_schedule(interval)
    with taylor_at_output(pipe, order, schedule) as predicted:
        ours = sample(pipe, *arguments)
    assert tuple(predicted) == schedule.predicted_steps
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=BEFORE,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )
    )
    theirs = sample(pipe, *arguments)
    pipe.transformer.disable_cache()
    plain = sample(pipe, *arguments)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - plain).abs().max() > 1e-3  # and it is not simply the plain run


def test_their_schedule_is_none_of_ours() -> None:
    assert diffusers_schedule(6).full_steps == (0, 1, 2, 4, 10, 16)
    assert diffusers_schedule(6) != Schedule.uniform(NUM_STEPS, 6)
