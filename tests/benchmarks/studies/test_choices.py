"""Rows of the ablation: each changes what it says, on the schedule it says; the paper's are those of its workload."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.results_files import changed
from benchmarks.studies.choices import DEFAULT, FIRST, LEARNED, LESA, PAPER, SETTINGS, UNIFORM, gathered, row_settings
from benchmarks.studies.learned_boundaries import cheapest_parts, learned_boundaries
from lesa.params_file import load_params
from lesa.schedule import Schedule, history_problems, stage_of_steps

ROOT = Path(__file__).parents[3]
SEARCHED, OWN = [0, 1, 4, 8, 12, 18, 25, 32, 40, 46], [0, 3, 8, 14, 19, 25, 33, 39, 45, 48]


class Recorded:
    """Trajectories whose features move as a parabola whose bend changes with the noise."""

    def __init__(self, turns: tuple[float, ...], steps: int = 50) -> None:
        random = torch.Generator().manual_seed(0)
        self.sigmas = torch.linspace(1, 0, steps + 1)
        self.channels = 4
        speed = torch.randn(6, 3, self.channels, generator=random)
        bend = [sum(float(s) < turn for turn in turns) for s in self.sigmas[:-1]]
        features, value = [], torch.randn(6, 3, self.channels, generator=random)
        for step in range(steps):
            features.append(value.clone())
            speed = speed * (1.0 + (-1) ** bend[step] * 0.08)
            value = value + 0.1 * speed
        self.features = torch.stack(features, dim=1)

    def __len__(self) -> int:
        return len(self.features)

    def feature_batch(self, indices, steps):
        return self.features[indices][:, list(steps)]


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The default workload in a folder where both searches have been made."""
    monkeypatch.chdir(tmp_path)
    found = load_params(ROOT / "params.yaml", "flux-digits")
    place = Path("data/benchmarks/flux-digits/lesa_schedules.json")
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"10": SEARCHED}))
    budgets = {name: b for name, b in found.schedule.budgets.items() if name == "5x"}
    found = changed(found, {"schedule": {"budgets": budgets}})
    found.paths.schedules.parent.mkdir(parents=True, exist_ok=True)
    return changed(found, {"schedule": {"budgets": {"5x": type(budgets["5x"])(full_steps=tuple(OWN))}}})


def test_every_row_can_be_trained_and_differs_from_the_first(workload) -> None:
    data = Recorded((0.7, 0.3))
    first = row_settings(workload, "5x", FIRST, 0, data)
    for name in SETTINGS:
        row = row_settings(workload, "5x", name, 0, data)
        schedule = row.budgets()["5x"]
        assert schedule.num_full == 10
        if row.predictor.kind == "lesa":
            stages = stage_of_steps(data.sigmas, row.predictor.boundaries)
            assert history_problems(schedule, row.predictor.history_sizes, stages, row.predictor.history) == [], name
        assert name in (FIRST, "ground-truth step alone") or row != first, name
    assert list(first.budgets()["5x"].full_steps) == SEARCHED
    assert list(row_settings(workload, "5x", DEFAULT, 0, data).budgets()["5x"].full_steps) == OWN
    for name in (UNIFORM, PAPER):
        assert row_settings(workload, "5x", name, 0, data).budgets()["5x"] == Schedule.uniform(50, 7)


def test_the_papers_row_is_the_papers_workload() -> None:
    ours, paper = (load_params(ROOT / "params.yaml", name) for name in ("flux-digits", "flux-digits-paper"))
    row = changed(changed(ours, LESA), SETTINGS[PAPER])
    assert (row.predictor, row.ground_truth, row.closed_loop) == (
        paper.predictor,
        paper.ground_truth,
        paper.closed_loop,
    )
    assert paper.schedule.budgets["5x"].interval == 7 and paper.prompts == ours.prompts
    assert (paper.model, paper.call, paper.evaluate) == (ours.model, ours.call, ours.evaluate)


def test_boundaries_are_found_where_the_features_turn(workload) -> None:
    schedule = Schedule.uniform(50, 3)
    low, high = sorted(learned_boundaries(Recorded((0.7, 0.3)), schedule, 3))
    assert abs(high - 0.7) < 0.06 and abs(low - 0.3) < 0.06
    assert row_settings(workload, "5x", LEARNED, 0, Recorded((0.7, 0.3))).predictor.boundaries != (0.8, 0.4)
    with pytest.raises(ValueError, match="has 2 steps to learn 3 stages from"):
        learned_boundaries(Recorded((0.5,), 5), Schedule.explicit(5, (0, 1, 3)), 3)


def test_parts_are_the_cheapest_of_all() -> None:
    values = [0.0, 0.1, 5.0, 5.2, 9.0, 9.1]

    def spread(start: int, end: int) -> float:
        part = torch.tensor(values[start:end])
        return float(((part - part.mean()) ** 2).sum())

    cost = [[spread(i, j) if j > i else 0.0 for j in range(7)] for i in range(6)]
    assert cheapest_parts(cost, 3) == [0, 2, 4]
    assert cheapest_parts(cost, 1) == [0]


def test_rows_are_gathered_once_all_are_there(tmp_path: Path) -> None:
    names, prompts = [FIRST, UNIFORM], ["a", "a", "b", "b"]
    values = {FIRST: [[50.0, 51, 52, 53], [52.0, 53, 54, 55]], UNIFORM: [[48.0, 49, 50, 51], [50.0, 51, 52, 53]]}
    for name in names:
        assert gathered(tmp_path, "5x", names, [0, 1], prompts) is None
        for seed in (0, 1):
            record = SimpleNamespace(name=name, psnr=values[name][seed], seconds=3.0).__dict__
            place = tmp_path / f"5x-{list(SETTINGS).index(name)}-{seed}.json"
            place.write_text(json.dumps(record))
    rows = gathered(tmp_path, "5x", names, [0, 1], prompts)
    assert rows is not None
    assert rows[FIRST]["psnr_mean"] == 52.5 and rows[UNIFORM]["by_seed"] == [49.5, 51.5]
    assert rows[UNIFORM]["minus_first"] == {"mean": -2.0, "low": -2.0, "high": -2.0}
