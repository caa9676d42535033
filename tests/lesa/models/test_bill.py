"""Every pass through a transformer is on the bill, once: plain and accelerated runs, gradients, what is made again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from lesa.models.bill import Bill, charge, counted
from lesa.models.pipelines import sample
from lesa.params import Workload
from lesa.peers.rules import rule_method
from lesa.schedule import Schedule
from lesa.training.rollout import accelerated_latents, freeze_pipeline
from tests.helpers.model_kinds import KINDS, prepare
from tests.helpers.recording import record
from tests.lesa.training.test_closed_loop import Place, place, rule_of  # noqa: F401 - fixture

NAMES = ("flux-dev", "qwen-image", "hunyuan-video")


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workload, Any]]:
    root = tmp_path_factory.mktemp("bill")
    with contextlib.chdir(root):
        yield prepare(root, request.param)


def test_a_run_costs_its_full_steps_in_every_branch(made: tuple[Workload, Any]) -> None:
    workload, pipe = made
    kind = KINDS[workload.name]
    seeds = [1, 2] if len(kind.branches) == 1 else [1]
    prompts, branches = ["a thin seven", "the blue cat"][: len(seeds)], len(kind.branches)
    steps = workload.call.num_inference_steps
    with counted() as plain:
        sample(pipe, prompts, seeds, workload.call)
    assert plain.forwards == pytest.approx(len(seeds) * steps * branches) and plain.backwards == 0
    schedule = Schedule.explicit(steps, kind.full_steps)
    method = rule_method("taylor1", "fast", schedule)
    with counted() as accelerated, method.using(pipe, pipe.scheduler.sigmas):
        sample(pipe, prompts, seeds, workload.call)
    assert accelerated.forwards == pytest.approx(len(seeds) * schedule.num_full * branches)


def test_recording_is_on_the_bill_and_what_is_there_costs_nothing(made: tuple[Workload, Any]) -> None:
    workload, pipe = made
    branches = len(KINDS[workload.name].branches)
    runs = workload.record.train_prompts + workload.record.validation_prompts
    with counted() as first:
        record(workload, pipe)
    planned = runs * workload.call.num_inference_steps * branches
    assert planned <= first.forwards < 1.5 * planned  # and a few short runs that tell sizes
    with counted() as second:
        record(workload, pipe)
    assert second.forwards == pytest.approx(first.forwards - planned)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_gradient_costs_a_backward_of_each_full_step_that_it_passes(place: Place, recomputed: bool) -> None:  # noqa: F811
    freeze_pipeline(place.pipe)
    rule = rule_of(place)
    full, predicted = rule.schedule.full_steps, rule.schedule.predicted_steps
    passed = sum(step > predicted[0] for step in full)  # those before know nothing of any prediction
    with counted() as forward:
        latents = accelerated_latents(
            place.pipe, place.workload.call, rule.schedule, rule, place.train, [0, 2], recomputed
        )
    assert forward.forwards == pytest.approx(2 * len(full)) and forward.backwards == 0
    with counted() as backward:
        latents.square().sum().backward()
    assert backward.backwards == pytest.approx(2 * passed)
    # A call is run again, and in it each block once more.
    assert backward.forwards == pytest.approx(2 * 2 * passed if recomputed else 0)


def test_nothing_is_counted_outside_and_every_open_bill_gets_its_share(made: tuple[Workload, Any]) -> None:
    workload, pipe = made
    short = dataclasses.replace(workload.call, num_inference_steps=2)
    branches = len(KINDS[workload.name].branches)
    with counted() as outer:
        charge(Bill(forwards=5, backwards=2))  # another process's
        with counted() as inner:
            sample(pipe, ["the cat"], [0], short)
    sample(pipe, ["the cat"], [0], short)
    assert inner.forwards == pytest.approx(2 * branches)
    assert outer.forwards == pytest.approx(5 + 2 * branches) and outer.backwards == 2
    assert outer.to_dict() == {"forwards": 5 + 2 * branches, "backwards": 2}
