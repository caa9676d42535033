"""Trainable experts: how they start, what they leave alone, and that an export says all of it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lesa.params import PredictorParams
from lesa.predictor.alpha import history_steps, linear_alpha, time_offsets
from lesa.predictor.predictor import Predictor
from lesa.predictor.spec import PROJECTIONS, PredictorSpec, Variant
from lesa.schedule import Schedule
from lesa.training.expert import Expert
from tests.helpers.training_set import sigmas

S, C, K = 50, 3, 3
SIGMAS = sigmas(S)
SCHEDULE = Schedule.uniform(S, 7)
STEPS = [step for step in range(S) if len(SCHEDULE.anchors(step, K)) == K]
OFFSETS = torch.stack([time_offsets(SIGMAS, step, SCHEDULE.anchors(step, K)) for step in STEPS])


def new(seed: int = 0, part: slice = slice(0, 12), **params: Any) -> Expert:
    return Expert(
        PredictorParams(**{"rank": 2, **params}),
        channels=C,
        history_size=K,
        offsets=OFFSETS[part],
        steps=STEPS[part],
        num_steps=S,
        seed=seed,
    )


def train_a_little(expert: Expert) -> None:
    """Every trainable number moves."""
    optimizer = torch.optim.Adam(expert.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        features = torch.randn(K, 4, C, generator=generator).unbind()
        optimizer.zero_grad()
        (
            expert.project(features).square().mean() + expert.alpha(OFFSETS[:12], STEPS[:12]).square().mean()
        ).backward()
        optimizer.step()


@pytest.mark.parametrize(("gate", "tolerance"), [("kan", 1e-3), ("table", 1e-6), ("mlp", 2e-2)])
@pytest.mark.parametrize("part", [slice(0, 12), slice(12, 30), slice(30, None)])
def test_the_start_is_first_order_extrapolation(gate: str, tolerance: float, part: slice) -> None:
    expert = new(gate=gate, part=part)
    with torch.no_grad():
        alphas = expert.alpha(OFFSETS[part], STEPS[part])
    torch.testing.assert_close(alphas, linear_alpha(OFFSETS[part]), rtol=0, atol=tolerance)
    features = torch.randn(K, 4, C).unbind()
    torch.testing.assert_close(expert.project(features), features[0] - features[1])


def test_a_gate_too_small_to_start_so_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predictor.start: the gate \(kan\) misses.*raise predictor.hidden"):
        new(gate="kan", hidden=1, grid=1, part=slice(0, None))


@pytest.mark.parametrize("gate", ["kan", "mlp", "table"])
def test_construction_is_seeded_and_touches_nothing(
    gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first = new(seed=5, gate=gate)
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.manual_seed(99)
    second = new(seed=5, gate=gate)
    assert list(tmp_path.iterdir()) == []  # pykan would have written ./model
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    if gate != "table":
        other = new(seed=6, gate=gate).export()
        assert any(not torch.equal(value, other[name]) for name, value in first.export().items())


@pytest.mark.parametrize(("projection", "gate"), list(itertools.product(PROJECTIONS, ["kan", "mlp", "table"])))
def test_an_export_holds_every_number(projection: str, gate: str) -> None:
    trained = new(projection=projection, gate=gate, start="random")
    train_a_little(trained)
    exported = trained.export()
    names = [name.split(".", 1) for name in exported]
    assert {part for part, _ in names} == {"projection", "gate"}
    fresh = new(seed=77, part=slice(12, 20), projection=projection, gate=gate, start="random")
    parts = {
        part: {
            name.removeprefix(f"{part}."): t for name, t in exported.items() if name.startswith(f"{part}.")
        }
        for part in ("projection", "gate")
    }
    fresh.load_export(parts["projection"], parts["gate"])
    for name, value in fresh.export().items():
        assert torch.equal(value, exported[name]), name
    features = torch.randn(K, 4, C).unbind()
    with torch.no_grad():
        assert torch.equal(fresh.project(features), trained.project(features))
        again, before = fresh.alpha(OFFSETS[:12], STEPS[:12]), trained.alpha(OFFSETS[:12], STEPS[:12])
    assert torch.equal(again, before)
    train_a_little(fresh)  # what was imported can be trained further, like what it came from
    train_a_little(trained)
    for name, value in fresh.export().items():  # from other starts: sums are rounded differently
        torch.testing.assert_close(value, trained.export()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["kan", "mlp", "table"])
def test_the_predictor_says_what_the_trained_module_says(gate: str) -> None:
    expert = new(gate=gate, part=slice(0, None), start="random")
    train_a_little(expert)
    spec = PredictorSpec(
        channels=C,
        num_steps=S,
        boundaries=(),
        history_sizes=(K,),
        variants=(Variant(name="5x", full_steps=tuple(range(10))),),
        gate=gate,
        rank=2,
    )
    predictor = Predictor(spec, {f"5x/0/{name}": tensor for name, tensor in expert.export().items()})
    alphas = predictor.alphas(SCHEDULE, SIGMAS)[STEPS]
    with torch.no_grad():
        trained = expert.alpha(OFFSETS, STEPS)
    torch.testing.assert_close(alphas.float(), trained, rtol=1e-4, atol=1e-4)


def test_equal_offsets_survive_the_export() -> None:
    """Even noise levels and a history of steps: all offsets are the same but for rounding."""
    line = torch.linspace(1, 0, 51)
    schedule = Schedule.uniform(50, 7)
    steps = list(range(3, 50))
    dt = torch.stack([time_offsets(line, s, history_steps(schedule, s, 3, "steps")) for s in steps])
    params = PredictorParams(start="extrapolation", history="steps")
    expert = Expert(params, channels=C, history_size=3, offsets=dt, steps=steps, num_steps=50, seed=0)
    train_a_little(expert)
    spec = PredictorSpec(
        channels=C,
        num_steps=50,
        boundaries=(),
        history_sizes=(3,),
        variants=(Variant(name="5x", full_steps=tuple(range(10))),),
        history="steps",
    )
    predictor = Predictor(spec, {f"5x/0/{name}": tensor for name, tensor in expert.export().items()})
    with torch.no_grad():
        trained = expert.alpha(dt, steps)
    torch.testing.assert_close(predictor.alphas(schedule, line)[steps].float(), trained, rtol=1e-5, atol=1e-5)


def test_projection_and_gate_have_their_own_rates() -> None:
    for gate in ("kan", "mlp", "table"):
        expert = new(gate=gate, start="random")
        projection, of_gate = expert.parameter_groups(0.1, 0.2)
        assert (projection["lr"], of_gate["lr"], of_gate["weight_decay"]) == (0.1, 0.2, 0.0)
        grouped = {id(p) for group in (projection, of_gate) for p in group["params"]}
        assert grouped == {id(p) for p in expert.parameters() if p.requires_grad}
