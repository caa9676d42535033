"""How the gate shares its budgets out."""

from __future__ import annotations

from lesa.publishing.bounds import shared_out

FULL_STEPS = {"8x": 6.0, "5x": 10.0, "3x": 16.0, "6.25x": 8.0}


def test_every_budget_is_in_one_part_and_the_parts_cost_about_the_same() -> None:
    assert shared_out(FULL_STEPS, 1) == [("3x", "5x", "6.25x", "8x")]
    assert shared_out(FULL_STEPS, 2) == [("3x", "8x"), ("5x", "6.25x")]  # 22 and 18 full steps
    assert shared_out(FULL_STEPS, 9) == [("3x",), ("5x",), ("6.25x",), ("8x",)]
    assert shared_out({"5x": 10.0}, 2) == [("5x",)]
