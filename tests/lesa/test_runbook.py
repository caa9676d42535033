"""The runbook's figures are what the code computes, and its commands exist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.true_size.runbook import readme, rows, runbook
from lesa.doctor.estimate import PEAK_FLOPS, UTILISATION, estimate_costs
from lesa.models.published import PRESETS
from lesa.params_file import load_params

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")


ESTIMATES = {name: estimate_costs(load_params(ROOT / "params.yaml", name)) for name in PRESETS}


def test_both_pages_are_what_is_computed() -> None:
    """`python -m benchmarks.true_size.runbook` writes them."""
    assert runbook(TEXT, ESTIMATES) == TEXT
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme(text, ESTIMATES["flux-dev"]) == text


def test_a_figure_of_another_day_is_found() -> None:
    dearer = {name: dataclasses.replace(costs, store=2 * costs.store) for name, costs in ESTIMATES.items()}
    assert runbook(TEXT, dearer) != TEXT and rows("flux-dev", dearer["flux-dev"])[0] not in TEXT


def test_every_published_model_runs_its_closed_loop_within_a_gpu_of_80_gb() -> None:
    for name in PRESETS:
        needs = ESTIMATES[name]
        assert 0 < needs.closed_loop < needs.closed_loop + needs.loop_weights < (40e9 if name == "flux-dev" else 80e9)


def test_the_rate_is_stated() -> None:
    assert f"{UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s" in TEXT


def test_files_named_exist() -> None:
    for name in ("docs/workloads.md", "lesa/doctor/estimate.py", "benchmarks/results/flops.md"):
        assert name.removeprefix("docs/") in TEXT and (ROOT / name).exists()
