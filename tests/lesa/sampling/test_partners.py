"""Other pipelines over the same parts: they reset hooks in mid-run, or call the transformer with steps of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import lesa
from lesa.bundle import Bundle
from lesa.errors import LesaError
from lesa.peers.rules import RULES
from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache
from lesa.schedule import Schedule
from tests.helpers import tiny_qwen_variants
from tests.helpers.images import NUM_STEPS, PictureCall
from tests.helpers.tiny_flux_variants import text_to_image

Callback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module", params=["flux", "qwen-image"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PictureCall, Bundle]:
    call = text_to_image() if request.param == "flux" else tiny_qwen_variants.text_to_image()
    return call, call.own_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def call(made: tuple[PictureCall, Bundle]) -> Iterator[PictureCall]:
    yield made[0]
    lesa.disable(made[0].pipe)


def after(step: int, act: Callable[[], object]) -> Callback:
    def callback(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            act()
        return tensors

    return callback


def full_steps(call: PictureCall) -> list[int]:
    return [record.step for record in lesa.summary(call.pipe).steps if record.kind == "full"]


def test_hooks_that_are_reset_in_mid_run_cost_full_steps(
    call: PictureCall, made: tuple[PictureCall, Bundle]
) -> None:
    lesa.enable(call.pipe, made[1])
    expected = call.run()
    scheduled = full_steps(call)
    assert scheduled == [0, 1, 2, 3, 6]
    other = type(call.pipe)(**call.pipe.components)
    steps = call.run(callback_on_step_end=after(3, other.maybe_free_model_hooks))
    statistics = lesa.summary(call.pipe)
    # Predictions look back on two full steps: 6 and 3 for step 7, of which 3 was forgotten.
    assert full_steps(call) == list(range(NUM_STEPS)) and statistics.num_fallbacks == 3
    assert statistics.notes["history"].startswith("missing at step 4; something reset the hooks in mid-run")
    assert "5  full*" in str(statistics) and torch.isfinite(steps).all()
    assert torch.equal(call.run(), expected)
    assert "history" not in lesa.summary(call.pipe).notes


@pytest.mark.parametrize("name", ["reuse", "taylor1", "hicache"])
def test_training_free_rules_wait_for_their_history_too(call: PictureCall, name: str) -> None:
    """Every step after the reset is plain until the rule has the features that the schedule gives it."""
    schedule = Schedule.explicit(NUM_STEPS, (0, 1, 2, 4, 5, 6))
    rule = RULES[name](schedule, torch.linspace(1, 0, NUM_STEPS + 1))
    config = LesaCacheConfig(schedule=schedule, rule=rule, scheduler=call.pipe.scheduler)
    apply_lesa_cache(call.pipe.transformer, config)
    other = type(call.pipe)(**call.pipe.components)
    call.run(callback_on_step_end=after(2, other.maybe_free_model_hooks))
    assert lesa.summary(call.pipe).num_fallbacks == 1  # step 3; for step 7 the history is back
    assert full_steps(call) == list(range(NUM_STEPS - 1))


def interleaved(call: PictureCall, other: PictureCall, step: int) -> None:
    call.run(callback_on_step_end=after(step, lambda: other.run(seed=1, output_type="latent")))


def partner_of(call: PictureCall) -> PictureCall:
    """A pipeline over the same parts with a scheduler of its own."""
    partner = copy.copy(call)
    parts = call.pipe.components | {"scheduler": copy.deepcopy(call.pipe.scheduler)}
    partner.pipe = type(call.pipe)(**parts)
    partner.pipe.set_progress_bar_config(disable=True)
    return partner


def test_a_pipeline_with_another_scheduler_is_told_apart(call: PictureCall, made: tuple[PictureCall, Bundle]) -> None:
    lesa.enable(call.pipe, made[1])
    expected = call.run()
    partner = partner_of(call)
    for _ in range(2):  # after a whole run of the first one
        with pytest.raises(LesaError, match=r"another pipeline is running on this transformer \(.* its last step\)"):
            partner.run()
        assert lesa.summary(call.pipe).steps == []
        assert lesa.summary(call.pipe).notes["refused"].startswith("another pipeline is running")
    with pytest.raises(LesaError, match=r"another pipeline is running on this transformer \(its timestep is"):
        interleaved(call, partner, 4)
    assert torch.equal(call.run(), expected)


def test_the_run_under_way_goes_on_when_another_pipeline_is_refused(
    call: PictureCall, made: tuple[PictureCall, Bundle]
) -> None:
    lesa.enable(call.pipe, made[1])
    expected = call.run()
    partner = partner_of(call)
    refused: list[str] = []

    def try_partner() -> None:
        try:
            partner.run()
        except LesaError as error:
            refused.append(str(error))

    images = call.run(callback_on_step_end=after(4, try_partner))
    assert len(refused) == 1 and refused[0].startswith("another pipeline is running on this transformer")
    assert torch.equal(images, expected) and lesa.summary(call.pipe).finished
