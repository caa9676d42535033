"""Writes what `lesa doctor` estimates of the published models into docs/runbook.md and README.md.

python -m benchmarks.true_size.runbook
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lesa.atomic import write_bytes
from lesa.doctor.estimate import CostEstimate, estimate_costs
from lesa.models.published import PRESETS
from lesa.params_file import load_params

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("disk", "memory", "hours")  # of the runbook, in its order


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def rows(name: str, costs: CostEstimate) -> list[str]:
    """One line of each of `TABLES`."""
    weights = sum(costs.weights.values())
    download = gb(costs.download) if costs.download else "-"
    closed_loop = gb(costs.loop_weights + costs.closed_loop) if costs.closed_loop else "not run"
    disk = [download, str(costs.trajectories), gb(costs.store), gb(costs.store_all_tokens), gb(costs.training)]
    memory = [gb(weights), gb(weights + max(costs.sampling, costs.fitting)), closed_loop]
    hours = [f"{costs.hours(stage):.1f}" for stage in costs.flops] + [f"{costs.hours():.1f}"]
    return [f"| `{name}` | {' | '.join(row)} |" for row in (disk, memory, hours)]


def runbook(text: str, estimates: dict[str, CostEstimate]) -> str:
    """The page with each model's lines in the places of those that it has."""
    for name, costs in estimates.items():
        parts = re.split(rf"^\| `{re.escape(name)}` \|.*\|$", text, flags=re.M)
        assert len(parts) == 1 + len(TABLES), name
        first, *others = parts
        text = first + "".join(new + part for new, part in zip(rows(name, costs), others, strict=True))
    return text


def readme(text: str, costs: CostEstimate) -> str:
    """The page with what FLUX.1-dev takes."""
    weights = sum(costs.weights.values())
    sampling, loop = gb(weights + max(costs.sampling, costs.fitting)), gb(costs.loop_weights + costs.closed_loop)
    store = f"{gb(costs.store)} of recorded features beside the model's {gb(weights)}"
    changes = {
        r"not run:\s[\d.]+ GPU hours": f"not run: {costs.hours():.1f} GPU hours",
        r"[\d.]+ GB of GPU memory \([\d.]+ GB in": f"{sampling} of GPU memory ({loop} in",
        r"[\d.]+ GB of recorded features beside the model's [\d.]+ GB": store,
    }
    for pattern, words in changes.items():
        text, found = re.subn(pattern, words, text)
        assert found == 1, pattern
    return text


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.true_size.runbook", description=(__doc__ or "").splitlines()[0]
    ).parse_args(argv)
    estimates = {name: estimate_costs(load_params(ROOT / "params.yaml", name)) for name in PRESETS}
    pages = {
        ROOT / "docs/runbook.md": lambda text: runbook(text, estimates),
        ROOT / "README.md": lambda text: readme(text, estimates["flux-dev"]),
    }
    for path, change in pages.items():
        write_bytes(path, change(path.read_text(encoding="utf-8")).encode())
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
