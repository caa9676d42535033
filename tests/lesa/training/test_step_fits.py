"""Sums made once give the weights that a pass over the trajectories gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule
from lesa.training.step_weights import StepFits, fit_step_weights
from tests.lesa.training.test_closed_loop import Place, place  # noqa: F401 - fixtures


def both(data: Trajectories, schedule: Schedule, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    indices = list(range(len(data) - 1))
    fits = StepFits(data, indices, 3, ridge, torch.device("cpu"))
    slow = fit_step_weights(
        data, schedule, schedule.predicted_steps, lambda history, _: history[0],
        history_size=3, ridge=ridge, indices=indices,
    )  # fmt: skip
    fast, exported = fits.weights(schedule).export(), slow.export()
    rule = fits.rule(schedule)
    assert torch.equal(rule.by_step["weight"], fast["weight"]) and rule.history_size == 3
    joined = [torch.cat([found["weight"], found["bias"][:, None]], dim=1) for found in (fast, exported)]
    return joined[0], joined[1]


@pytest.mark.parametrize("steps", [(0, 1, 2, 5), (0, 3, 5), (0, 7)])
def test_the_same_weights_as_a_pass_over_the_trajectories(place: Place, steps: tuple[int, ...]) -> None:  # noqa: F811
    schedule = Schedule.explicit(8, steps)
    fast, slow = both(place.train, schedule, 1e-3)
    assert slow.abs().max() > 0.05
    assert torch.allclose(fast, slow, rtol=1e-2, atol=2e-3 * float(slow.abs().max()))
    for step in schedule.full_steps:
        assert not fast[step].any()
    for step in schedule.predicted_steps:  # a history that is not there has no weights
        held = min(3, len(schedule.anchors(step, 3)))
        assert not fast[step, held:3].any() and fast[step, :held].any()


def test_a_channel_that_never_changes_gets_no_weights_from_rounding(place: Place) -> None:  # noqa: F811
    """Its differences are zero; sums of products give them as a small remainder."""
    data = place.train
    features = data.feature_batch(range(len(data)), range(8)).to(torch.bfloat16)
    features[..., 0] = features[:, :1, :, 0]
    fast, slow = both(dataclasses.replace(data, features=features), Schedule.explicit(8, (0, 2, 4)), 1e-6)
    assert not slow[:, 1:3, 0].any() and not fast[:, 1:3, 0].any()
    assert fast[3, 1:3, 1:].any()


def test_a_schedule_without_predicted_steps_has_no_weights(place: Place) -> None:  # noqa: F811
    fits = StepFits(place.train, [0, 1], 3, 1e-3, torch.device("cpu"))
    weights = fits.weights(Schedule.uniform(8, 1))
    assert not any(tensor.any() for tensor in weights.export().values())
