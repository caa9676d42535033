"""The cheapest path on features whose best full steps are known."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

from lesa.recording.dataset import Trajectories, load_trajectories
from lesa.recording.store import Trajectory, TrajectoryStore
from lesa.schedule import Schedule
from lesa.search.path import NOTHING, _fitted, cheapest_path, cheapest_schedules, segment_costs
from tests.helpers.training_set import CHANNELS, STEPS, TOKENS, head, sigmas

KINK = 7


@pytest.fixture
def kinked(tmp_path: Path) -> Trajectories:
    """Features that run straight, and straight on in another direction from step KINK."""
    store = TrajectoryStore.create(tmp_path / "set.zarr")
    levels = sigmas()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        start, first, second = torch.randn(3, 1, TOKENS, CHANNELS, generator=generator)
        at = torch.arange(STEPS, dtype=torch.float32)[:, None, None, None]
        features = start + first * at.clamp(max=KINK) + second * (at - KINK).clamp(min=0)
        context = {"temb": torch.randn(STEPS, 1, CHANNELS), "latents_final": torch.randn(1, TOKENS, 2)}
        store.commit(
            Trajectory(
                identity={"prompt": "p", "seed": seed},
                prompt="p",
                seed=seed,
                features=features.bfloat16(),
                sigmas=levels,
                timesteps=levels[:-1] * 1000,
                context=context,
            )
        )
    return load_trajectories(store.path, ["p"])


def test_full_steps_stand_where_the_direction_changes(kinked: Trajectories) -> None:
    found = cheapest_schedules(kinked, head(), [4], leading=2)[4]
    # A straight line is told by two of its steps, which either side of the kink needs.
    assert found.full_steps in ((0, 1, KINK, KINK + 1), (0, 1, KINK + 1, KINK + 2))


def test_the_path_is_the_cheapest_of_all(kinked: Trajectories) -> None:
    costs = segment_costs(kinked, head(), STEPS)

    def price(steps: tuple[int, ...]) -> float:
        path = [(NOTHING, 0), *pairwise(steps)]
        skipped = [later - step - 1 for step, later in zip(steps, [*steps[1:], STEPS], strict=True)]
        return sum(costs[pair][count] for pair, count in zip(path, skipped, strict=True))

    everything = [(0, *rest) for rest in combinations(range(1, STEPS), 4)]
    for leading in (1, 2):
        path = cheapest_path(costs, STEPS, 5, leading)
        allowed = [steps for steps in everything if steps[:leading] == tuple(range(leading))]
        assert path is not None and Schedule.explicit(STEPS, path).num_full == 5
        assert price(path) == pytest.approx(min(map(price, allowed)))


def test_impossible_numbers_are_refused(kinked: Trajectories) -> None:
    with pytest.raises(ValueError, match=r"full steps \[1, 13\] of 12"):
        cheapest_schedules(kinked, head(), [1, 4, 13])
    with pytest.raises(ValueError, match="gaps of at most 2"):
        cheapest_schedules(kinked, head(), [3], max_gap=2)
    for leading, max_gap in ((1, 3), (2, 4)):  # the longest gaps that are accepted reach the end, and no shorter ones
        found = cheapest_schedules(kinked, head(), [4], max_gap=max_gap, leading=leading)[4]
        assert found.num_full == 4
        with pytest.raises(ValueError, match=f"gaps of at most {max_gap - 1}"):
            cheapest_schedules(kinked, head(), [4], max_gap=max_gap - 1, leading=leading)


def test_a_drift_weighs_every_step_by_how_far_it_moves_the_latents(kinked: Trajectories) -> None:
    """From a full step, reusing it: the drift is the sum over the steps of dsigma times what the head is off by."""
    costs = segment_costs(kinked, head(), STEPS)
    dsigma = kinked.sigmas.diff()
    rows, made = list(range(len(kinked))), head()
    features = kinked.feature_batch(rows, range(STEPS))
    c, ahead = 4, [5, 6]
    newest, before = features[:, c], features[:, c - 1]
    regressors = torch.stack([newest, torch.ones_like(newest), newest - before])
    predicted = newest + _fitted(regressors, features[:, ahead] - newest[:, None])
    drift = torch.zeros(())
    for place, step in enumerate(ahead):
        off = made(predicted[place], kinked.temb[rows][:, step]) - made(features[:, step], kinked.temb[rows][:, step])
        drift = drift + dsigma[step] * off
    assert costs[c - 1, c][2] == pytest.approx(float(drift.square().mean()), rel=1e-3)
