"""Which budget serves a wish for quality."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lesa.bundle.budgets import choose_schedule
from lesa.bundle.manifest import Manifest
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
