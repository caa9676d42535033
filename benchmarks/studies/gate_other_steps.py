"""The gate on two candidates whose full steps are not the champion's, made of the champion of a workload that was run:

moved        the champion's own weights with one full step of the default budget moved
closed form  step weights in closed form on even steps, no training in the loop

Both are worse by construction. Champion and candidate are cut down to the default budget, which decides.

python -m benchmarks.studies.gate_other_steps [--workload NAME]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_files import changed, facts, keep
from lesa.bundle import Bundle, load_bundle, write_bundle
from lesa.bundle.format import WRITTEN
from lesa.models.pipelines import pick_device
from lesa.params import BudgetParams, Workload
from lesa.params_file import load_params
from lesa.predictor.predictor import Predictor
from lesa.publishing.build import with_budgets
from lesa.publishing.gate import CHAMPION, Decision
from lesa.publishing.judgement import judge_candidate
from lesa.search.jobs import even_schedule
from lesa.training.experts import assemble
from lesa.training.jobs import expert_design, list_ground_truth_jobs, run_ground_truth_job

RESULTS = Path("benchmarks/results")


def moved(steps: Sequence[int]) -> tuple[int, ...]:
    """The steps with the middle one a step later, or where a full step stands there the next one that has room."""
    for place in (*range(len(steps) // 2, len(steps) - 1), *range(1, len(steps) // 2)):
        if steps[place] + 1 < steps[place + 1]:
            return (*steps[:place], steps[place] + 1, *steps[place + 1 :])
    raise ValueError(f"no step of {list(steps)} can be moved")


def candidate(champion: Bundle, predictor: Predictor, full_steps: Sequence[int], folder: Path) -> Bundle:
    """A bundle like the champion's with other full steps at its only budget, and perhaps another predictor."""
    data = {key: value for key, value in champion.manifest.data.items() if key not in WRITTEN}
    ((name, budget),) = data["budgets"].items()
    budget = budget | {"full_steps": list(full_steps), "interval": None, "error_bounds": [None] * len(full_steps)}
    return write_bundle(folder, {**data, "budgets": {name: budget}}, predictor)


def on_steps(predictor: Predictor, budget: str, full_steps: Sequence[int]) -> Predictor:
    """The predictor with a budget's weights as those of other full steps."""
    spec = predictor.spec
    variants = tuple(
        dataclasses.replace(variant, full_steps=tuple(full_steps)) if variant.name == budget else variant
        for variant in spec.variants
    )
    return Predictor(dataclasses.replace(spec, variants=variants), predictor.tensors)


def closed_form(workload: Workload, budget: str, full_steps: Sequence[int]) -> Predictor:
    """What the first training step begins with, on these steps."""
    explicit = {budget: BudgetParams(full_steps=tuple(full_steps))}
    alone = changed(
        workload,
        {
            "schedule": {"budgets": explicit, "default_budget": budget},
            "record": {"step_counts": ()},
            "ground_truth": {"iterations": 0},
        },
    )
    trained = [run_ground_truth_job(alone, job, lambda step, values: None) for job in list_ground_truth_jobs(alone)]
    channels = next(iter(trained[0].experts.values()))["projection.bias"].shape[0]
    return assemble(expert_design(alone), channels, trained)


def row(decision: Decision, bundle: Bundle, measured: Mapping[str, Any]) -> dict[str, Any]:
    ((name, budget),) = bundle.manifest.budgets.items()
    return {
        "full_steps": list(budget.schedule.full_steps),
        "promoted": decision.promote,
        "against_champion": decision.numbers.get(CHAMPION, {}).get(name, {}),
        "reasons": list(decision.reasons),
        "samples": measured["samples"],
        "prompts": measured["prompts"],
    }


def page(document: Mapping[str, Any]) -> str:
    lines = [
        f"# The gate on candidates with other full steps, {document['budget']} of {document['workload']}",
        "",
        f"Champion: full steps {document['champion']}. Command: `{document['command']}`.",
        "",
        "| candidate | full steps | promoted | mean, dB, less the champion's | worst fifth, likewise | samples |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, found in document["candidates"].items():
        numbers = [found["against_champion"].get(about) for about in ("mean", "tail")]
        told = [f"{n['difference']:+.2f} [{n['low']:+.2f}, {n['high']:+.2f}]" if n else "not measured" for n in numbers]
        steps, promoted = " ".join(map(str, found["full_steps"])), "yes" if found["promoted"] else "no"
        lines.append(f"| {name} | {steps} | {promoted} | {' | '.join(told)} | {found['samples']} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default=None, help="section of params.yaml (default: its default_workload)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    workload = load_params(workload=arguments.workload)
    whole = load_bundle(workload.paths.bundle)
    budget = whole.manifest.default_budget
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        champion = with_budgets(whole, [budget], {}, folder / "champion")
        steps = champion.manifest.budgets[budget].schedule.full_steps
        even = even_schedule(workload.call.num_inference_steps, len(steps), 2).full_steps
        candidates = {
            "moved": candidate(
                champion, on_steps(champion.predictor, budget, moved(steps)), moved(steps), folder / "moved"
            ),
            "closed form": candidate(champion, closed_form(workload, budget, even), even, folder / "closed_form"),
        }
        found = {}
        for name, bundle in candidates.items():
            decision, measured = judge_candidate(
                workload, bundle, champion, log=lambda line, name=name: print(f"{name}: {line}", flush=True)
            )
            found[name] = row(decision, bundle, measured)
    document = {
        **facts("benchmarks.studies.gate_other_steps", argv, pick_device(workload.resources.device)),
        "workload": workload.name,
        "budget": budget,
        "champion": " ".join(map(str, steps)),
        "candidates": found,
    }
    keep(arguments.output / f"gate-other-steps-{workload.name}.json", document, page(document))
    print(page(document))


if __name__ == "__main__":
    main()
