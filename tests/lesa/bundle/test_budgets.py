"""Which budget serves a wish for quality."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from lesa.bundle.budgets import choose_schedule, slower_budget
from lesa.bundle.manifest import Manifest
from lesa.schedule import Schedule
from tests.helpers.bundles import make_bundle
from tests.helpers.tiny import tiny_flux


def test_the_fastest_budget_that_seldom_gives_another_picture_is_chosen(tmp_path: Path) -> None:
    bundle = make_bundle(tiny_flux(), tmp_path / "bundle")

    def measured(shares: dict[str, float]) -> Manifest:
        budgets = {
            name: dataclasses.replace(known, quality={"outlier_share_high": shares[name]} if name in shares else {})
            for name, known in bundle.manifest.budgets.items()
        }
        return dataclasses.replace(bundle.manifest, budgets=budgets)

    known = measured({"1.67x": 0.05, "1.43x": 0.01})
    assert choose_schedule(known, max_outlier_share=0.05)[1] == "1.67x"
    assert choose_schedule(known, max_outlier_share=0.02)[1] == "1.43x"
    with pytest.raises(ValueError, match=r"within 0.5% \(1.43x: up to 1.0%, 1.67x: up to 5.0%\)"):
        choose_schedule(known, max_outlier_share=0.005)
    with pytest.raises(ValueError, match="does not say how often"):
        choose_schedule(measured({}), max_outlier_share=0.1)
    with pytest.raises(ValueError, match="from 0 to 1, got 5"):
        choose_schedule(known, max_outlier_share=5)


BUDGETS = {"slow": (0, 1, 2, 4, 6, 8), "fast": (0, 1, 5), "middle": (0, 1, 4, 7)}


def manifest(**psnr: float) -> Manifest:
    """What a choice reads of a manifest."""
    budgets = {
        name: SimpleNamespace(
            schedule=Schedule.explicit(10, steps), interval=None, quality={"psnr_mean": psnr[name]} if psnr else {}
        )
        for name, steps in BUDGETS.items()
    }
    return cast(Manifest, SimpleNamespace(budgets=budgets, sigmas=(0.0,) * 11, default_budget="middle"))


def test_the_fastest_budget_that_is_good_enough_is_chosen() -> None:
    known = manifest(slow=40.0, middle=35.0, fast=30.0)
    assert [choose_schedule(known, min_psnr=wanted)[1] for wanted in (30, 31, 36)] == ["fast", "middle", "slow"]
    assert [choose_schedule(known, max_loss_db=loss)[1] for loss in (0, 5, 12)] == ["slow", "middle", "fast"]
    with pytest.raises(ValueError, match="no budget measured 41.00 dB"):
        choose_schedule(known, min_psnr=41)


def test_the_slower_budget_is_the_next_one() -> None:
    assert slower_budget(manifest(), "fast") == "middle" and slower_budget(manifest(), "middle") == "slow"
    with pytest.raises(ValueError, match="slow is the slowest budget"):
        slower_budget(manifest(), "slow")


def test_a_budget_carried_to_a_short_run_keeps_the_fastest_one_s_full_steps() -> None:
    known = cast(Manifest, SimpleNamespace(**{**vars(manifest()), "budgets": {
        name: budget for name, budget in manifest().budgets.items() if name != "fast"
    }}))  # fmt: skip
    assert choose_schedule(known, budget="slow", num_steps=5)[0].num_full == 4
    assert choose_schedule(known, budget="slow")[0].full_steps == BUDGETS["slow"]
