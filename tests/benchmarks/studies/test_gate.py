"""The simulation of the gate plants what it says, and the gate finds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import gate
from benchmarks.studies.gate import DIFFERENCES, TAILS, Plan, Population, one_run, rates, worst

RNG = np.random.default_rng(0)
CHAMPION = 50 + RNG.normal(0, 1.5, (40, 1)) + RNG.normal(0, 1, (40, 4))
CANDIDATE = CHAMPION + RNG.normal(0, 0.5, (40, 1)) + RNG.normal(0, 0.5, (40, 4))
PLAN = Plan(prompts=40, seeds=2, first=40, most=160, tolerance_db=0.5)


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("tail", TAILS.values())
def test_mean_and_worst_fifth_are_as_planted(difference: float, tail: float) -> None:
    planted = Population.planted(CHAMPION, CANDIDATE, difference, tail)
    assert planted.candidate.mean() - planted.champion.mean() == pytest.approx(difference)
    assert worst(planted.candidate) - worst(planted.champion) == pytest.approx(tail, abs=1e-3)


def test_what_cannot_be_planted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\+9 dB from the champion's cannot be planted"):
        Population.planted(CHAMPION, CANDIDATE, 0.0, 9.0)


def test_far_better_and_far_worse_candidates_are_told_apart() -> None:
    for difference, tail, promoted in ((3.0, 2.0, 1.0), (-3.0, -3.0, 0.0)):
        population = Population.planted(CHAMPION, CANDIDATE, difference, tail)
        found = rates([one_run(population, PLAN, seed) for seed in range(5)])
        assert found["promoted"] == promoted and found["samples_most"] == 40


def test_the_study_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "DIFFERENCES", (3.0,))
    monkeypatch.setattr(gate, "TAILS", {"equal": 2.0})
    recorded = {"prompts": 40, "seeds_per_prompt": 4}
    recorded["psnr"] = {"5x": {"champion": CHAMPION.ravel().tolist(), "lesa": CANDIDATE.ravel().tolist()}}
    (tmp_path / "judgement-x.json").write_text(json.dumps(recorded))
    options = ["--runs", "2", "--processes", "1", "--output", str(tmp_path / "out")]
    gate.main([str(tmp_path / "judgement-x.json"), *options])
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["rows"][0]["promoted"] == 1.0 and "| +3.0 | equal | 100.0% |" in (tmp_path / "out.md").read_text()
