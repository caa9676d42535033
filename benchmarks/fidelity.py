"""The predictor's forms against every peer at the same number of full steps, on uniform and searched schedules.

python -m benchmarks.fidelity train --part 0/2        # both parts may run side by side
python -m benchmarks.fidelity measure --counts 10     # writes benchmarks/results/fidelity-<workload>-10.{json,md}

`train` trains every form on recorded trajectories (kept under data/benchmarks/); `measure` samples held-out prompts
with fresh noise, every method on the same ones. Searched schedules are those of the search stage; the peers' searched
grids come from `python -m benchmarks.peers.search_peers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.cache_dit import masked_methods, reported_missing
from benchmarks.peers.learned import learned_peers
from benchmarks.results_files import changed, keep, warned
from benchmarks.studies.choices import trained
from benchmarks.studies.lesa_schedules import lesa_schedules
from benchmarks.studies.memorization import CONTROL, learned_by_heart
from benchmarks.studies.memorization import table as heart_table
from lesa.evaluation.compare import evaluate_methods, load_scorer, refuse_trained
from lesa.evaluation.measure import samples
from lesa.evaluation.results import Results
from lesa.models.fingerprint import fingerprint
from lesa.models.pipelines import load_pipeline
from lesa.params import BudgetParams, Workload
from lesa.params_file import load_params
from lesa.peers.lineup import fixed_peers, load_searched
from lesa.peers.method import Method, lesa_method
from lesa.peers.rules import rule_method
from lesa.peers.tuning import TUNING_SAMPLES
from lesa.recording.dataset import recorded_splits
from lesa.recording.prompts import prompt_digests, read_splits
from lesa.schedule import Schedule, history_problems, stage_of_steps
from lesa.search.jobs import with_schedules
from lesa.training.jobs import load_figures, load_predictor, save_predictor

RESULTS = Path("benchmarks/results")
COUNTS = (10, 8, 6)  # full steps
LINCA_ITERATIONS = 150  # of each of its stages: some minutes a schedule


@dataclass(frozen=True)
class Form:
    """One predictor to train: a kind on a schedule."""

    kind: str  # lesa, per_step
    place: str  # uniform, searched
    count: int  # full steps

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.place}"

    @property
    def label(self) -> str:
        kind = "the LESA form, experts alone" if self.kind == "lesa" else "experts and weights of each step"
        return f"{kind}, {self.place} full steps"


def forms(counts: Sequence[int]) -> list[Form]:
    """Every kind on every schedule."""
    return [Form(kind, place, n) for n in counts for place in ("searched", "uniform") for kind in ("per_step", "lesa")]


def schedule_of(workload: Workload, place: str, count: int) -> Schedule:
    """The uniform rule with so many full steps, or the searched one.

    Raises:
        ValueError: there is none.
    """
    steps = workload.call.num_inference_steps
    if place == "searched":
        for schedule in with_schedules(workload).budgets().values():
            if schedule.num_full == count:
                return schedule
        raise ValueError(f"no budget of {workload.name} has {count} full steps: add it and run the search stage")
    for interval in range(1, steps):
        if (schedule := Schedule.uniform(steps, interval)).num_full == count:
            return schedule
    raise ValueError(f"no interval gives {count} full steps of {steps}")


def settings_of(workload: Workload, form: Form, schedule: Schedule, sigmas: torch.Tensor, seed: int) -> Workload:
    """The workload with the form's one budget: its own settings for weights of each step, the LESA form's best for it.

    That form does best with a history of steps, and as much of it as the schedule allows, 3 at most
    (`python -m benchmarks.studies.choices`).
    """
    predictor: dict[str, Any] = {"kind": form.kind}
    if form.kind == "lesa":
        stages = stage_of_steps(sigmas, workload.predictor.boundaries)
        sizes = tuple(2 if _lacks(schedule, 3, stages, stage) else 3 for stage in range(max(stages) + 1))
        predictor |= {"history": "steps", "history_sizes": sizes}
    budgets = {str(form.count): BudgetParams(full_steps=schedule.full_steps)}
    changes = {"predictor": predictor, "schedule": {"budgets": budgets, "default_budget": str(form.count)}}
    return dataclasses.replace(changed(workload, changes), seed=seed)


def _lacks(schedule: Schedule, size: int, stages: Sequence[int], stage: int) -> bool:
    """Whether a predicted step of the noise stage has fewer than `size` steps before it."""
    sizes = [size if other == stage else 1 for other in range(max(stages) + 1)]
    return bool(history_problems(schedule, sizes, stages, "steps"))


def train(workload: Workload, chosen: Sequence[Form], folder: Path, seed: int) -> None:
    """Train what is not there yet."""
    train_set, validation = recorded_splits(workload.recording)
    pipe = load_pipeline(workload.model, workload.resources.device)
    by_count = lesa_schedules(workload, sorted({f.count for f in chosen if f.kind == "lesa"}))
    for form in chosen:
        place = folder / f"{form.name}-{form.count}"
        own = form.kind == "lesa" and form.place == "searched"
        schedule = by_count[form.count] if own else schedule_of(workload, form.place, form.count)
        settings = settings_of(workload, form, schedule, train_set.sigmas, seed)
        if (place / "predictor.json").exists():
            known = load_predictor(place).spec.variants[0].full_steps
            if known == settings.budgets()[str(form.count)].full_steps:
                continue
        started = time.perf_counter()
        predictor = trained(settings, str(form.count), pipe, train_set, validation, closed_loop=True)
        seconds = time.perf_counter() - started
        save_predictor(place, predictor, {"seconds": seconds, "history_sizes": settings.predictor.history_sizes})
        print(f"{place.name}: {seconds:.0f} s", file=sys.stderr, flush=True)


def methods_of(workload: Workload, chosen: Sequence[Form], folder: Path) -> Iterator[Method]:
    """The trained forms as methods; `ValueError` names what is not trained."""
    for form in chosen:
        place = folder / f"{form.name}-{form.count}"
        predictor = load_predictor(place)
        schedule = Schedule.explicit(workload.call.num_inference_steps, predictor.spec.variants[0].full_steps)
        yield lesa_method(str(form.count), predictor, schedule, name=form.name, label=form.label)


def peers_of(
    workload: Workload, pipe: Any, counts: Sequence[int], searched: Path, judged: Sequence[str], *, learned: bool
) -> list[Method]:
    """Every peer at every number of full steps: on the uniform rule, on steps of its own search, and on ours.

    Args:
        workload: whose trajectories and training prompts they are trained and tuned on.
        pipe: its pipeline.
        counts: numbers of full steps.
        searched: file of `python -m benchmarks.peers.search_peers`; without it those rows are absent.
        judged: prompts that nothing may be tuned or trained on.
        learned: also train the learned peers on the uniform rule, and L2P on our searched full steps.
    """
    found = load_searched(searched) if searched.exists() else None
    if found is not None:
        found.refuse(judged, fingerprint(pipe.transformer))
    tuning = read_splits(workload.paths.prompts)["train"][:TUNING_SAMPLES]
    noise = [workload.record.seed_offset + i for i in range(len(tuning))]
    uniform = {str(count): schedule_of(workload, "uniform", count) for count in counts}
    ours = {str(count): schedule_of(workload, "searched", count) for count in counts}
    methods = []
    with_cache_dit = not reported_missing(pipe, workload.call)
    for budget, schedule in uniform.items():
        methods += fixed_peers(budget, schedule, found.peers if found else ())
        if with_cache_dit:
            methods += masked_methods(budget, schedule)
            methods += map(_on_ours, masked_methods(budget, ours[budget]))
        for order in (1, 2):
            label = f"TaylorSeer, order {order}, our searched full steps"
            methods.append(
                rule_method(f"taylor{order}", budget, ours[budget], name=f"taylor{order}_ours", label=label)
            )
    if learned:
        with torch.enable_grad():
            settings: dict[str, Any] = {"prompts": tuning, "seeds": noise, "judged": judged}
            methods += learned_peers(workload, pipe, uniform, **settings, linca_iterations=LINCA_ITERATIONS)
            methods += [
                _on_ours(method)
                for method in learned_peers(workload, pipe, ours, **settings, linca_iterations=0)
                if method.schedule is not None  # thresholds choose their own steps: they are above already
            ]
    return methods


def _on_ours(method: Method) -> Method:
    return dataclasses.replace(method, name=f"{method.name}_ours", label=f"{method.label}, our searched full steps")


def measure(
    workload: Workload,
    pipe: Any,
    ours: Sequence[Method],
    peers: Sequence[Method],
    *,
    num_prompts: int,
    seeds: int,
    seed_offset: int,
    fraction: float,
) -> Results:
    """Every method on held-out prompts and fresh noise."""
    splits = read_splits(workload.paths.prompts)  # refuses prompts that stand in two splits
    test = splits["test"][:num_prompts]
    train_set, validation = recorded_splits(workload.recording)
    trained_on = prompt_digests([*train_set.prompts, *validation.prompts])
    refuse_trained(test, {"prompt_digests": trained_on})
    texts, noise = samples(test, seeds, seed_offset)
    budgets = dict.fromkeys(method.budget for method in ours)
    return evaluate_methods(
        pipe,
        [method for budget in budgets for method in (*ours, *peers) if method.budget == budget],
        texts,
        noise,
        call=workload.call,
        settings=dataclasses.replace(workload.evaluate, converged_fraction=fraction),
        scorer=load_scorer(workload.scorer),
        timing=False,
        report=lambda step, values: print(step, "samples", file=sys.stderr, flush=True),
        about={"workload": workload.name, "seed_offset": seed_offset},
    )


def table(results: Results, against: Mapping[str, str]) -> str:
    """Markdown: one table a number of full steps, best first, our forms against the better TaylorSeer."""
    counts = results.counts
    lines = [
        f"{results.about['workload']}: {counts['samples']} samples, {counts['prompts']} held-out prompts; PSNR in dB "
        f"to the plain run of {len(results.sigmas) - 1} steps with 95% intervals over prompts; to the converged run of "
        f"{counts['converged_steps']} steps on {counts['converged_samples']} samples "
        f"(plain run: {_mean(results.estimate('', 'plain', 'converged_psnr'))}).",
    ]
    for budget in results.budgets:
        rows = sorted(results.at(budget), key=lambda row: -row.psnr.mean)
        base = against[budget]
        lines += [
            "",
            f"### {budget} full steps",
            "",
            f"| method | steps | PSNR | 5th percentile | minus {results.row(budget, base).label} | its p5 minus | "
            "to converged |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        floor = results.row(budget, base).psnr.p5
        for row in rows:
            gain = results.difference(budget, row.method, base)
            lines.append(
                f"| {row.label} | {row.computed_steps:g} | {row.psnr.mean:.2f} [{row.psnr.low:.2f}, "
                f"{row.psnr.high:.2f}] | {row.psnr.p5:.2f} | {gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] | "
                f"{row.psnr.p5 - floor:+.2f} | {_mean(row.converged_psnr)} |"
            )
    return "\n".join(lines) + "\n"


def better_taylor(results: Results) -> dict[str, str]:
    """TaylorSeer at its better order and rule of full steps, searched ones left out, at each budget."""
    chosen = {}
    for budget in results.budgets:
        rows = [r for r in results.at(budget) if r.method in ("taylor1", "taylor2", "taylor1_own", "taylor2_own")]
        chosen[budget] = max(rows, key=lambda row: row.psnr.mean).method
    return chosen


def searched_file(workload: str) -> Path:
    """Where the peers' searched steps lie: this clone's own search, or the one behind the published tables."""
    own = Path("data/peers") / f"{workload}.json"
    return own if own.exists() else RESULTS / f"peers-{workload}.json"


def _mean(value: Any) -> str:
    return "-" if value is None else f"{value.mean:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or measure; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("act", choices=("train", "measure"))
    parser.add_argument("--workload")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="numbers of full steps")
    parser.add_argument("--part", default="0/1", help="train only every n-th form: part/n")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--prompts", type=int, default=256, help="test prompts, from the first")
    parser.add_argument("--seeds", type=int, default=2, help="noise seeds a prompt")
    parser.add_argument("--seed-offset", type=int, default=60_000, help="the first of them")
    parser.add_argument("--converged", type=float, default=0.1, help="share of samples with a converged run")
    parser.add_argument(
        "--peers",
        type=Path,
        help="file of benchmarks.peers.search_peers (default: data/peers/<workload>.json, or else what is kept of the "
        "published tables, benchmarks/results/peers-<workload>.json)",
    )
    parser.add_argument("--no-learned", action="store_true", help="leave out the peers that are trained or tuned")
    options = parser.parse_args(arguments)
    try:
        workload = load_params("params.yaml", options.workload)
        folder = Path("data/benchmarks") / workload.name / f"seed{options.seed}"
        part, parts = map(int, options.part.split("/"))
        chosen = forms(options.counts)
        if options.act == "train":
            train(workload, chosen[part::parts], folder, options.seed)
            return 0
        ours = list(methods_of(workload, chosen, folder))
        pipe = load_pipeline(workload.model, workload.resources.device)
        judged = read_splits(workload.paths.prompts)["test"][: options.prompts]
        searched = options.peers or searched_file(workload.name)
        peers = peers_of(workload, pipe, options.counts, searched, judged, learned=not options.no_learned)
        results = measure(
            workload,
            pipe,
            ours,
            peers,
            num_prompts=options.prompts,
            seeds=options.seeds,
            seed_offset=options.seed_offset,
            fraction=options.converged,
        )
        controls = [peer for peer in peers if peer.name == CONTROL]
        compared = sorted([*ours, *controls], key=lambda method: options.counts.index(int(method.budget)))
        train_set, _ = recorded_splits(workload.recording)
        memory = learned_by_heart(workload, pipe, compared, train_set, results, options.seed_offset + 1_000_000)
        document = results.to_json() | {
            "learned_by_heart": {key: found.to_dict() for key, found in memory.items()},
            "warnings": warned(results),
        }
        document["training"] = {
            f"{form.name}-{form.count}": load_figures(folder / f"{form.name}-{form.count}") for form in chosen
        }
        text = f"{table(results, better_taylor(results))}\n### Learned by heart\n\n{heart_table(memory)}\n"
        out = RESULTS / f"fidelity-{workload.name}-{'-'.join(map(str, options.counts))}.json"
        keep(out, document, text)
        values = {f"{b}/{m}": v["psnr"].tolist() for (b, m), v in results.samples.items() if "psnr" in v}
        np.savez_compressed(folder / f"{out.stem}.npz", **{key: np.asarray(value) for key, value in values.items()})
        print(text)
    except (ValueError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
