"""The runbook's figures are what the code computes, and its commands exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesa.doctor.estimate import PEAK_FLOPS, UTILISATION, estimate_costs
from lesa.models.published import PRESETS
from lesa.params_file import load_params

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_tables_are_what_is_computed(name: str) -> None:
    needs = estimate_costs(load_params(ROOT / "params.yaml", name))
    weights = sum(needs.weights.values())
    download = gb(needs.download) if needs.download else "-"
    disk = [download, str(needs.trajectories), gb(needs.store), gb(needs.store_all_tokens), gb(needs.training)]
    closed_loop = gb(needs.loop_weights + needs.closed_loop) if needs.closed_loop else "not run"
    memory = [gb(weights), gb(weights + max(needs.sampling, needs.fitting)), closed_loop]
    hours = [f"{needs.hours(stage):.1f}" for stage in needs.flops] + [f"{needs.hours():.1f}"]
    for row in (disk, memory, hours):
        assert f"| `{name}` | {' | '.join(row)} |" in TEXT


def test_every_published_model_runs_its_closed_loop_within_a_gpu_of_80_gb() -> None:
    for name in PRESETS:
        needs = estimate_costs(load_params(ROOT / "params.yaml", name))
        assert 0 < needs.closed_loop < needs.closed_loop + needs.loop_weights < (40e9 if name == "flux-dev" else 80e9)


def test_the_rate_is_stated() -> None:
    assert f"{UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s" in TEXT


def test_files_named_exist() -> None:
    for name in ("docs/workloads.md", "lesa/doctor/estimate.py", "benchmarks/results/flops.md"):
        assert name.removeprefix("docs/") in TEXT and (ROOT / name).exists()


def test_the_readme_states_what_the_runbook_does() -> None:
    costs = estimate_costs(load_params(ROOT / "params.yaml", "flux-dev"))
    weights = sum(costs.weights.values())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sampling = gb(weights + max(costs.sampling, costs.fitting))
    assert f"{costs.hours():.1f} GPU hours" in readme
    assert f"{sampling} of GPU memory" in readme
    assert f"{gb(costs.store)} of recorded features beside the model's {gb(weights)}" in readme
