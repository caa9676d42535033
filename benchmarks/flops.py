"""What 10 and 8 of 50 full steps save at the published models' true size, predictor and output head paid for.

python -m benchmarks.flops                 # all models; writes benchmarks/results/flops.json and flops.md
python -m benchmarks.flops --family flux-dev --out /tmp/flops

Counted, not timed: `torch.utils.flop_counter` on the meta device, the predictor in the default workload's form at the
model's width. The same for one model and any schedule: `lesa flops`.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.results_files import keep
from lesa.models.published import PRESETS, FamilyFlops, family_flops
from lesa.schedule import Schedule

OUT = Path("benchmarks/results/flops")
INTERVALS = (7, 10)  # 10 and 8 full steps of 50 after three warm-up steps
FEW_STEPS = 20  # models with fewer are counted on their own default schedule


def count(names: Sequence[str]) -> list[FamilyFlops]:
    """Every model on every schedule."""
    rows = []
    for name in names:
        steps = PRESETS[name].num_inference_steps
        if steps < FEW_STEPS:
            rows.append(family_flops(name))
        else:
            rows += [family_flops(name, Schedule.uniform(steps, interval)) for interval in INTERVALS]
    return rows


def table(rows: Sequence[FamilyFlops]) -> str:
    """Markdown, a row a model and schedule."""
    lines = [
        "| model | size | full steps | a full call | a predicted call | predictor, in full steps | plain | accelerated "
        "| FLOPs ratio | kept in bf16 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        found = row.to_dict()
        name = row.name if row.branches == 1 else f"{row.name}, {row.branches} branches"
        lines.append(
            f"| {name} | {row.size} | {row.schedule.num_full} of {row.schedule.num_steps} "
            f"| {found['full_call_tflops']:.2f} | {found['predicted_call_tflops']:.3f} "
            f"| {found['predictor_full_calls']:.4f} | {found['plain_tflops']:.1f} | {found['accelerated_tflops']:.1f} "
            f"| {row.ratio:.3f}x | {sum(row.bytes_kept.values()) / 1e9:.3f} GB |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=tuple(PRESETS), default=list(PRESETS))
    parser.add_argument("--out", type=Path, default=OUT, help="without ending; .json and .md are written")
    options = parser.parse_args(arguments)
    rows = count(options.family)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m benchmarks.flops",
        "counted_with": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "predictor": "weights of each step, history 3, low rank of a quarter of the width, three noise stages",
        "rows": [row.to_dict() for row in rows],
    }
    text = (
        "# Operations at true size\n\n"
        "TFLOPs (a multiply-add is two), counted on the meta device by `python -m benchmarks.flops`; no weights, "
        "no GPU, nothing timed. The predictor is the default workload's form at the model's width; its operations are "
        "part of what an accelerated run costs. Kept: features, what is derived from them, one budget's weights.\n\n"
        f"{table(rows)}\n"
    )
    keep(options.out.with_suffix(".json"), record, text)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
