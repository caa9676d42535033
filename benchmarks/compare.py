"""A bundle against every peer, external ones included; same table and JSON as `lesa compare`.

python -m benchmarks.compare data/bundles/flux-digits --seeds 2 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import external_peers
from lesa.bundle import load_bundle
from lesa.evaluate import TUNING_SAMPLES, compare, load_scorer
from lesa.params import load_params
from lesa.pipelines import load_pipeline
from lesa.prompts import read_prompts
from lesa.table import format_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--workload", help="section of the parameter file; default: the bundle's")
    parser.add_argument("--prompts", type=int, default=64, help="test prompts, from the first")
    parser.add_argument("--seeds", type=int, default=2, help="noise seeds a prompt")
    parser.add_argument("--seed", type=int, default=50_000, help="the first of them")
    parser.add_argument("--no-tuning", action="store_true", help="leave the threshold caches out")
    parser.add_argument("--json", action="store_true", help="print every number as JSON")
    options = parser.parse_args(arguments)
    try:
        bundle = load_bundle(options.bundle)
        workload = load_params(options.params, options.workload or bundle.manifest.workload)
        test = read_prompts(workload.paths.prompts, "test")
        if not 1 <= options.prompts <= len(test):
            raise ValueError(f"--prompts must be from 1 to {len(test)}, got {options.prompts}")
        train = read_prompts(workload.paths.prompts, "train")
        settings = dataclasses.replace(
            workload.evaluate, prompts=max(2, options.prompts), seeds_per_prompt=options.seeds
        )
        further = [
            method
            for name, budget in bundle.manifest.budgets.items()
            for method in external_peers(name, budget.schedule)
        ]
        results = compare(
            bundle,
            load_pipeline(workload),
            test[: options.prompts],
            options.seeds,
            options.seed,
            tuning_prompts=[] if options.no_tuning else train[:TUNING_SAMPLES],
            further=further,
            settings=settings,
            scorer=load_scorer(workload),
            report=lambda step, values: print(step, values, file=sys.stderr, flush=True),
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(results.to_json(), indent=2) if options.json else format_table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
