"""Candidates with other full steps, made of a champion, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies.gate_other_steps import candidate, moved, on_steps, page, row
from lesa.publishing.build import with_budgets
from lesa.publishing.gate import Decision
from tests.helpers.bundles import make_bundle
from tests.helpers.tiny import tiny_flux


def test_one_step_moves_where_there_is_room() -> None:
    assert moved((0, 1, 5, 9)) == (0, 1, 6, 9)
    assert moved((0, 1, 2, 3, 5)) == (0, 1, 2, 4, 5)
    assert moved((0, 1, 5, 6)) == (0, 2, 5, 6)
    with pytest.raises(ValueError, match="no step"):
        moved((0, 1, 2))


def test_a_candidate_is_the_champion_but_for_its_steps(tmp_path: Path) -> None:
    whole = make_bundle(tiny_flux(), tmp_path / "whole")
    budget = whole.manifest.default_budget
    champion = with_budgets(whole, [budget], {}, tmp_path / "champion")
    steps = champion.manifest.budgets[budget].schedule.full_steps
    predictor = on_steps(champion.predictor, budget, moved(steps))
    assert [v.full_steps for v in predictor.spec.variants if v.name == budget] == [moved(steps)]
    made = candidate(champion, predictor, moved(steps), tmp_path / "made")
    (name,) = made.manifest.budgets
    assert name == budget and made.manifest.budgets[name].schedule.full_steps == moved(steps) != steps
    assert made.manifest.call == champion.manifest.call and made.digest != champion.digest
    finding = {"difference": -5.0, "low": -6.0, "high": -4.0}
    decision = Decision(promote=False, reasons=("worse",), numbers={"champion": {budget: {"mean": finding}}})
    told = page(
        {
            "budget": budget,
            "workload": "tiny",
            "champion": " ".join(map(str, steps)),
            "command": "python",
            "candidates": {"moved": row(decision, made, {"samples": 8, "prompts": 4})},
        }
    )
    assert f"| moved | {' '.join(map(str, moved(steps)))} | no | -5.00 [-6.00, -4.00] | not measured | 8 |" in told
