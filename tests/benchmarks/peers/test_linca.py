from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.peers.linca import Decomposition, LinCa, forecast, linca_flops, linca_method, stage_of, train_linca
from lesa.models.flops import ModelFlops
from lesa.models.pipelines import sample
from lesa.models.probe import probe
from lesa.peers.rules import RULES
from lesa.predictor.rule import History
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule
from tests.helpers import training_set
from tests.helpers.bundles import CALL, NUM_STEPS
from tests.helpers.evaluation import pipeline, sigmas

STEPS = training_set.STEPS
SCHEDULE = Schedule.uniform(STEPS, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return training_set.splits(Path(tmp_path_factory.mktemp("store")) / "t.zarr")[0]


def shaken(channels: int, by: float = 0.2) -> Decomposition:
    generator = torch.Generator().manual_seed(0)
    made = Decomposition(channels, hidden=8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return made


def test_the_map_goes_back_exactly() -> None:
    made, h = shaken(12), torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = made(h)
        assert [part.shape[-1] for part in parts] == [8, 2, 2]
        assert not torch.allclose(torch.cat(parts, dim=-1), h, atol=0.1)
        torch.testing.assert_close(made.inverse(parts), h, atol=1e-4, rtol=1e-4)
        start = Decomposition(12)
        torch.testing.assert_close(torch.cat(start(h), dim=-1), h)


def test_sizes_are_those_of_the_released_networks() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in Decomposition(3072, blocks=3, hidden=256).parameters())
        larger = sum(p.numel() for p in Decomposition(3072, blocks=6, hidden=512).parameters())
    assert count == pytest.approx(33.4e6, rel=0.002) and larger == pytest.approx(78.7e6, rel=0.002)


def test_parts_go_on_at_their_own_order() -> None:
    parts = [tuple(torch.full((1, 1, 1), float(value)) for _ in range(3)) for value in (16.0, 4.0, 0.0)]
    still, first, second = (float(part) for part in forecast(parts, (4, 2, 0), 6))
    assert still == 16.0
    history = History(3)
    for step, value in ((0, 0.0), (2, 4.0), (4, 16.0)):
        history.push(step, torch.full((1, 1, 1), value))
    for order, said in ((1, first), (2, second)):
        rule = RULES["hicache"](SCHEDULE, torch.empty(0), order=order, contraction=0.71)
        assert said == pytest.approx(float(rule(history, 6)))


def test_training_makes_better_predictions(data: Trajectories) -> None:
    def error(rule: LinCa) -> float:
        total = 0.0
        for step in SCHEDULE.predicted_steps:
            history = History(3)
            for full in reversed(SCHEDULE.anchors(step, 3)):
                history.push(full, data.feature_batch(range(len(data)), [full])[:, 0])
            total += float((rule(history, step) - data.feature_batch(range(len(data)), [step])[:, 0]).square().mean())
        return total

    seen: list[float] = []
    before = train_linca(data, SCHEDULE, iterations=0)
    after = train_linca(data, SCHEDULE, iterations=100, report=lambda step, values: seen.append(values["linca_loss"]))
    assert error(after) < 0.7 * error(before)
    assert len(seen) == len({stage_of(step, STEPS) for step in SCHEDULE.predicted_steps})
    again = train_linca(data, SCHEDULE, iterations=100)
    assert error(again) == error(after)


def test_through_the_pipeline_at_equal_full_steps() -> None:
    pipe, schedule = pipeline(), Schedule.uniform(NUM_STEPS, 3)
    rule = LinCa([shaken(32, by=0.02) for _ in range(3)], NUM_STEPS)
    method = linca_method("b", schedule, rule)
    with method.using(pipe, sigmas()), probe(pipe) as trace:
        drawn = sample(pipe, ["a dog", "a cat"], [0, 1], CALL, "latent")
    assert trace.computed == schedule.num_full and torch.isfinite(drawn).all()


def test_its_cost_counts_splits_and_joins() -> None:
    model = ModelFlops(total=1e9, head=0.0, blocks=(), tokens=10, channels=8)
    schedule = Schedule.explicit(6, (0, 1, 3))  # predicted: 2 (stage 1; past 0 1), 4 5 (stage 2; past 0 1 3)
    network = 4 * 16 * 2 + 16 * 16
    once = 2 * 2 * (64 + 2 * network) * 10
    assert linca_flops(schedule, model, blocks=2, hidden=16) == once * (2 + 3 + 3)
