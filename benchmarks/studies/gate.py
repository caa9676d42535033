"""How often the gate is right: planted candidates whose true difference to the champion is known.

python -m benchmarks.studies.gate [JUDGEMENT.json] [--runs 1000]

Each run draws prompts of a recorded judgement (`benchmarks.studies.gate_recording`), with replacement, and of each some
of its recorded samples. The candidate has the recorded difference to the champion, sample by sample, moved so that its
mean and its worst fifth differ from the champion's by what is planted; then the gate decides as it does for real.
Noise, resemblance within a prompt and tails are those recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results_files import keep
from lesa.params import PublishParams
from lesa.publishing.gate import CANDIDATE, CHAMPION, WORST, Measured, judge, look_sizes

Values = NDArray[np.float64]
DIFFERENCES = (-1.0, -0.3, -0.1, 0.0, 0.1, 0.3)  # dB, of the mean
TAILS = {"worse": -1.5, "equal": 0.0, "better": 0.5}  # dB, of the worst fifth's mean
STRETCHED = 0.7  # share whose distance to its upper end is stretched or shrunk to get there
PEER = "peer"  # far behind: it never decides


def worst(values: Values) -> float:
    """Mean of the lowest share that the gate looks at."""
    ordered = np.sort(values, axis=None)
    return float(ordered[: round(WORST * len(ordered))].mean())


@dataclass(frozen=True, kw_only=True)
class Population:
    """Champion and planted candidate on every recorded sample, [prompts, seeds]."""

    champion: Values
    candidate: Values

    @classmethod
    def planted(cls, champion: Values, candidate: Values, difference: float, tail: float) -> Population:
        """The recorded candidate, its lower part stretched and all of it shifted, until both are what is wanted.

        Raises:
            ValueError: no stretching gets there.
        """
        edge, wanted = np.quantile(candidate, STRETCHED), worst(champion) + tail

        def stretched(factor: float) -> Values:
            values = np.where(candidate < edge, edge - factor * (edge - candidate), candidate)
            return np.asarray(values - values.mean() + champion.mean() + difference)

        low, high = 0.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if worst(stretched(middle)) > wanted else (low, middle)
        found = stretched((low + high) / 2)
        if abs(worst(found) - wanted) > 1e-3:
            raise ValueError(f"a worst fifth {tail:+g} dB from the champion's cannot be planted at {difference:+g} dB")
        return cls(champion=champion, candidate=found)

    def drawn(self, prompts: int, seeds: int, rng: np.random.Generator) -> tuple[Values, Values]:
        """Champion and candidate [prompts, seeds]: other prompts of this kind, and noise of each."""
        rows = rng.integers(len(self.champion), size=(prompts, 1))
        columns = rng.integers(self.champion.shape[1], size=(prompts, seeds))
        return self.champion[rows, columns], self.candidate[rows, columns]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a judgement takes its samples, as `lesa.publishing.judgement.gate_samples` does."""

    prompts: int  # there are
    seeds: int  # of a prompt at a time
    first: int
    most: int
    tolerance_db: float

    @property
    def groups(self) -> list[int]:
        return [index // self.seeds % self.prompts for index in range(look_sizes(self.first, self.most)[-1])]


def one_run(population: Population, plan: Plan, seed: int) -> dict[str, Any]:
    """What the gate says to one planted candidate."""
    rng = np.random.default_rng(seed)
    groups = plan.groups
    rounds = -(-len(groups) // (plan.prompts * plan.seeds))
    champion, candidate = population.drawn(plan.prompts, plan.seeds * rounds, rng)
    places: Counter[int] = Counter()
    ours, theirs = [], []
    for group in groups:
        ours.append(float(candidate[group, places[group]]))
        theirs.append(float(champion[group, places[group]]))
        places[group] += 1

    def measure(wanted: Mapping[str, Sequence[str]], first: int, end: int) -> Measured:
        behind = [value - 9.0 for value in theirs[first:end]]
        values = {CANDIDATE: ours[first:end], CHAMPION: theirs[first:end], PEER: behind}
        return {budget: {name: values[name] for name in (CANDIDATE, *names)} for budget, names in wanted.items()}

    decision = judge(
        {"x": [CHAMPION, PEER]},
        measure,
        default_budget="x",
        groups=groups,
        looks=look_sizes(plan.first, plan.most),
        tolerance_db=plan.tolerance_db,
    )
    answers = {about: found["answer"] for about, found in decision.numbers[CHAMPION]["x"].items()}
    return {"promote": decision.promote, "samples": decision.samples, **answers}


def rates(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of the runs; `tail_alone`: the mean was found higher, and the tail kept the candidate out."""
    count = len(runs)
    alone = sum(run["mean"] == "yes" and run["tail"] != "yes" for run in runs)
    undecided = sum(not run["promote"] and "no" not in (run["mean"], run["tail"]) for run in runs)
    return {
        "runs": count,
        "promoted": sum(run["promote"] for run in runs) / count,
        "refused_for_the_tail_alone": alone / count,
        "undecided": undecided / count,
        "samples_mean": float(np.mean([run["samples"] for run in runs])),
        "samples_most": max(run["samples"] for run in runs),
    }


def table(document: Mapping[str, Any]) -> str:
    lines = [
        f"# The gate on planted candidates, {document['budget']} of {document['source']}",
        "",
        f"{document['runs']} runs a row; at most {document['plan']['most']} samples; tolerance of the tail "
        f"{document['plan']['tolerance_db']:g} dB. Command: `{document['command']}`.",
        "",
        "| true mean, dB | true tail | promoted | refused for the tail alone | undecided | samples, mean |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in document["rows"]:
        lines.append(
            f"| {row['difference']:+.1f} | {row['tail']} | {row['promoted']:.1%} | "
            f"{row['refused_for_the_tail_alone']:.1%} | {row['undecided']:.1%} | {row['samples_mean']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = PublishParams()
    kept = Path("benchmarks/results/judgement-flux-digits.json")
    parser.add_argument("judgement", nargs="?", type=Path, default=kept, help="default: %(default)s")
    parser.add_argument("--budget", default="5x", help="whose samples (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1000, help="of each row (default: %(default)s)")
    parser.add_argument("--most", type=int, default=settings.gate_max_samples, help="samples (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=settings.tail_tolerance_db, help="dB (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/gate-<judgement>")
    arguments = parser.parse_args(argv)
    recorded = json.loads(arguments.judgement.read_text())
    shape = (recorded["prompts"], recorded["seeds_per_prompt"])
    champion, candidate = (
        np.asarray(recorded["psnr"][arguments.budget][name], np.float64).reshape(shape)
        for name in (CHAMPION, CANDIDATE)
    )
    plan = Plan(prompts=shape[0], seeds=2, first=128, most=arguments.most, tolerance_db=arguments.tolerance)
    rows = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for tail, lower in TAILS.items():
            for difference in DIFFERENCES:
                population = Population.planted(champion, candidate, difference, lower)
                found = list(pool.map(partial(one_run, population, plan), range(arguments.runs), chunksize=20))
                rows.append({"difference": difference, "tail": tail, **rates(found)})
                print(json.dumps(rows[-1]), flush=True)
    name = arguments.judgement.stem.removeprefix("judgement-")
    document = {
        "source": name,
        "budget": arguments.budget,
        "runs": arguments.runs,
        "command": " ".join(["python -m benchmarks.studies.gate", *(sys.argv[1:] if argv is None else argv)]),
        "plan": {"prompts": plan.prompts, "seeds": plan.seeds, "first": plan.first, "most": plan.most,
                 "tolerance_db": plan.tolerance_db},
        "recorded": {
            "samples": int(champion.size),
            "difference_mean": float((candidate - champion).mean()),
            "difference_deviation": float((candidate - champion).std()),
            "champion_worst_fifth": worst(champion),
            "candidate_worst_fifth": worst(candidate),
        },
        "rows": rows,
    }  # fmt: skip
    keep(arguments.output or Path("benchmarks/results") / f"gate-{name}", document, table(document))


if __name__ == "__main__":
    main()
