"""PSNR of two real bundles, sample by sample: what the simulation of the gate draws its samples from.

python -m benchmarks.studies.gate_recording CHAMPION CANDIDATE [--seeds 4] [--output FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.results_files import facts
from lesa.atomic import write_json
from lesa.bundle import load_bundle
from lesa.evaluation.compare import refuse_trained
from lesa.evaluation.measure import Part
from lesa.models.pipelines import pick_device
from lesa.params_file import load_params
from lesa.publishing.gate import CHAMPION
from lesa.publishing.judgement import GateJob, NamedBundle, measure_for_gate, paired_budgets
from lesa.recording.prompts import read_splits

FIRST_SEED = 1 << 31  # above the seeds of recording and evaluation, below the gate's


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("champion", type=Path, help="folder of a bundle")
    parser.add_argument("candidate", type=Path, help="folder of another bundle for the same call")
    parser.add_argument("--workload", default=None, help="section of params.yaml (default: its default_workload)")
    parser.add_argument("--seeds", type=int, default=4, help="noise seeds of each test prompt (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/judgement-WORKLOAD.json")
    arguments = parser.parse_args(argv)
    workload = load_params(workload=arguments.workload)
    champion, candidate = load_bundle(arguments.champion), load_bundle(arguments.candidate)
    test = read_splits(workload.paths.prompts)["test"]
    for bundle in (champion, candidate):
        refuse_trained(test, bundle.manifest.data["training"])
    groups = [index for index in range(len(test)) for _ in range(arguments.seeds)]
    size = workload.evaluate.batch_size
    paired = paired_budgets(candidate, champion)
    job = GateJob(
        wanted=dict.fromkeys(paired, (CHAMPION,)),
        candidate=NamedBundle.of(candidate),
        champion=NamedBundle.of(champion),
        paired=paired,
        caches=(),
        prompts=[test[group] for group in groups],
        seeds=[FIRST_SEED + index for index in range(len(groups))],
        part=Part(starts=tuple(range(0, len(groups), size)), timed=()),
    )
    psnr = measure_for_gate(workload, job, lambda done, values: print(f"{done} of {len(groups)} samples", flush=True))
    path = arguments.output or Path("benchmarks/results") / f"judgement-{workload.name}.json"
    rounded = {
        budget: {name: [round(value, 3) for value in values] for name, values in methods.items()}
        for budget, methods in psnr.items()
    }
    write_json(
        path,
        {
            **facts("benchmarks.studies.gate_recording", argv, pick_device(workload.resources.device)),
            "prompts": len(test),
            "seeds_per_prompt": arguments.seeds,
            "psnr": rounded,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
