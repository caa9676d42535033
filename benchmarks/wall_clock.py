"""How much faster a whole pipeline call is with a bundle: text encoders, sampler and decoder, by batch size.

python -m benchmarks.wall_clock data/bundles/flux-digits --batch 16 32 64 128

Plain and accelerated calls take turns in one process, with the same prompts and noise; the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lesa
from lesa.atomic import write_json
from lesa.bundle import Bundle, load_bundle
from lesa.models.pipelines import load_pipeline, timed_sample
from lesa.params_file import load_params
from lesa.recording.prompts import read_prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write `benchmarks/results/wall_clock.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wall_clock", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64, 128], help="samples a call")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of calls a batch size, after one for warming up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/wall_clock.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    bundle = load_bundle(options.bundle)
    workload = load_params(workload=bundle.manifest.workload)
    pipe = load_pipeline(workload.model, workload.resources.device)
    prompts = read_prompts(workload.paths.prompts, "test")
    rows = [
        {"budget": budget, "batch": batch, **measure(pipe, bundle, budget, prompts, batch, options.pairs)}
        for budget in bundle.manifest.budgets
        for batch in options.batch
    ]
    device = torch.cuda.get_device_name() if pipe.transformer.device.type == "cuda" else "CPU"
    result = {"bundle": bundle.digest, "device": device, "torch_threads": options.threads, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result, sort_keys=False)
    print(json.dumps(result, indent=2))
    return 0


def measure(
    pipe: Any, bundle: Bundle, budget: str, prompts: Sequence[str], batch: int, pairs: int
) -> dict[str, float]:
    """Median, lowest and highest ratio of `pairs` pairs of calls, and their median seconds."""
    texts = [prompts[i % len(prompts)] for i in range(batch)]
    seeds = list(range(batch))

    def seconds() -> float:
        return timed_sample(pipe, texts, seeds, bundle.manifest.call, batch)[1]

    plain, fast = [], []
    for _ in range(pairs + 1):
        plain.append(seconds())
        lesa.enable(pipe, bundle, budget=budget, measure=False)
        try:
            fast.append(seconds())
        finally:
            lesa.disable(pipe)
    ratios = [a / b for a, b in zip(plain[1:], fast[1:], strict=True)]
    return {
        "step_ratio": bundle.manifest.budgets[budget].schedule.ratio,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "plain_s": round(statistics.median(plain[1:]), 4),
        "accelerated_s": round(statistics.median(fast[1:]), 4),
    }


if __name__ == "__main__":
    raise SystemExit(main())
