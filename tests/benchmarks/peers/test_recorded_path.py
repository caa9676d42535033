from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.peers.recorded_path import RecordedPath, decibels
from lesa.peers.rules import RULES
from lesa.peers.solvers import SOLVERS
from lesa.schedule import Schedule
from lesa.search.path import cheapest_path
from tests.helpers import training_set

STEPS = training_set.STEPS


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> RecordedPath:
    data, _ = training_set.splits(Path(tmp_path_factory.mktemp("store")) / "t.zarr")
    return RecordedPath.of(data, training_set.head(), range(4))


def test_the_latents_follow_the_recorded_velocities(path: RecordedPath) -> None:
    assert path.num_steps == STEPS and len(path.latents) == STEPS + 1
    for step in range(STEPS):
        moved = path.latents[step] + (path.sigmas[step + 1] - path.sigmas[step]) * path.velocities[step]
        torch.testing.assert_close(moved, path.latents[step + 1], atol=1e-5, rtol=1e-5)
    first = path.head(path.features[:, 3], path.temb[:, 3])
    assert torch.equal(path.velocities[3], first)


def test_the_plain_run_has_no_drift_and_coarser_grids_have_more(path: RecordedPath) -> None:
    everything = path.solver_drift("euler", range(STEPS), STEPS)
    fine, coarse = (path.solver_drift("euler", grid, len(grid)) for grid in (range(0, STEPS, 2), (0, 6)))
    assert everything < -90 and everything < fine < coarse


def test_euler_drift_by_hand(path: RecordedPath) -> None:
    grid, sigmas = (0, 5), path.sigmas
    by_hand = path.latents[0] + (sigmas[5] - sigmas[0]) * path.velocities[0]
    by_hand = by_hand + (sigmas[-1] - sigmas[5]) * path.velocities[5]
    assert path.solver_drift("euler", grid, 2) == pytest.approx(decibels(by_hand - path.latents[-1]), abs=1e-3)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_solver_has_a_guess(path: RecordedPath, name: str) -> None:
    size = SOLVERS[name].grid_size(6)
    assert path.solver_drift(name, range(size), 6) < 60


def test_rules_without_predictions_have_no_drift(path: RecordedPath) -> None:
    assert path.rule_drift(RULES["taylor1"], range(STEPS)) == pytest.approx(-120.0)
    assert path.rule_drift(RULES["reuse"], (0, 1, 6)) > path.rule_drift(RULES["reuse"], (0, 2, 4, 6, 8, 10))


def test_a_segments_cost_by_hand(path: RecordedPath) -> None:
    costs = path.segment_costs(RULES["taylor1"], max_gap=6)
    b, c = 2, 4
    drift = torch.zeros_like(path.velocities[0])
    for ahead, step in enumerate((5, 6, 7), start=1):
        feature = path.features[:, c] + (step - c) / (c - b) * (path.features[:, c] - path.features[:, b])
        error = path.head(feature, path.temb[:, step]) - path.velocities[step]
        drift = drift + (path.sigmas[step + 1] - path.sigmas[step]) * error
        assert costs[b, c][ahead] == pytest.approx(float(drift.square().mean()), rel=1e-3)
    assert costs[b, c][0] == 0.0 and len(costs[b, c]) == 6


def test_the_cheapest_path_is_the_cheapest_of_all() -> None:
    from itertools import combinations, pairwise

    generator = torch.Generator().manual_seed(0)
    steps = 8
    costs = {
        (b, c): [0.0, *torch.rand(steps - 1 - c, generator=generator).tolist()]
        for c in range(1, steps)
        for b in range(c)
    }

    def total(path: tuple[int, ...]) -> float:
        gaps = list(pairwise(path))
        ends = [*path[2:], steps]
        return sum(costs[pair][end - pair[1] - 1] for pair, end in zip(gaps, ends, strict=True))

    for count in (3, 4, 5):
        paths = [(0, 1, *rest) for rest in combinations(range(2, steps), count - 2)]
        found = cheapest_path(costs, steps, count, leading=2)
        assert found == min(paths, key=total)
    assert cheapest_path({pair: [0.0] for pair in costs}, steps, 3, leading=2) is None


def test_a_path_is_a_schedule_any_rule_takes(path: RecordedPath) -> None:
    factory = partial(RULES["hicache"], contraction=0.6)
    found = cheapest_path(path.segment_costs(factory), STEPS, 5, leading=2)
    assert found is not None and Schedule.explicit(STEPS, found).num_full == 5
    assert path.rule_drift(factory, found) < path.rule_drift(factory, (0, 1, 2, 3, 4))
