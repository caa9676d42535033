"""The best steps for every peer, found on training prompts: full steps of the rules, grids of the solvers.

python -m benchmarks.peers.search_peers --workload flux-digits --evaluations 6 8 10 --out data/peers/flux-digits.json

What was found is kept after every search; a run that was broken off goes on where it was. A peer that is worse with
more evaluations than with fewer, whichever was searched first, is searched again from the fewer ones' steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.grid_search import guessed_optimum, insertions, kicked, moves, spread_starts
from benchmarks.peers.recorded_path import RecordedPath, decibels
from benchmarks.peers.rule_tuning import RULE_OPTIONS
from lesa import metrics
from lesa.models.fingerprint import fingerprint
from lesa.models.output_head import output_head_of
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.peers.lineup import (
    Searched,
    SearchedPeers,
    load_searched,
    save_searched,
    searched_method,
    taylorseer_schedule,
)
from lesa.peers.method import Method
from lesa.peers.rules import RULES
from lesa.peers.solvers import SOLVERS
from lesa.recording.dataset import recorded_splits
from lesa.recording.prompts import prompt_digests, read_splits
from lesa.schedule import Schedule
from lesa.search.local_search import kicks, local_search
from lesa.search.path import cheapest_path
from lesa.search.trials import Steps, Trial

METHODS = (
    "adams_bashforth2",
    "taylor1",
    "taylor2",
    "spectrum",
    "hicache",
    "dmd",
    "euler",
    "unipc2",
    "dpm_solver_2m",
    "heun",
)
_GUESSED = 4  # trajectories a guess is made from
_NEIGHBOURS = 3  # of the steps with one fewer, plus one: how many a search starts from

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """Training samples with their plain runs, and what is guessed from recorded trajectories."""

    pipe: Any
    workload: Workload
    prompts: Sequence[str]
    seeds: Sequence[int]
    latents: torch.Tensor  # of the plain run
    images: torch.Tensor  # likewise
    sigmas: torch.Tensor  # [S + 1]
    path: RecordedPath

    @classmethod
    def of(cls, workload: Workload, pipe: Any, num_samples: int) -> Tuner:
        prompts = read_splits(workload.paths.prompts)["train"][:num_samples]
        # Noise from the recording's range, on training prompts: nothing is judged on either.
        seeds = [workload.record.seed_offset + i for i in range(len(prompts))]
        train, _ = recorded_splits(workload.recording)
        arguments = (pipe, prompts, seeds, workload.call)
        latents = sample(*arguments, "latent", batch_size=workload.evaluate.batch_size)
        images = sample(*arguments, batch_size=workload.evaluate.batch_size)
        return cls(
            pipe=pipe,
            workload=workload,
            prompts=prompts,
            seeds=seeds,
            latents=latents,
            images=images,
            sigmas=pipe.scheduler.sigmas.detach().cpu(),
            path=RecordedPath.of(train, output_head_of(pipe.transformer), range(min(_GUESSED, len(train)))),
        )

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def _run(self, method: Method, count: int, output_type: str) -> torch.Tensor:
        call, size = method.call(self.workload.call), self.workload.evaluate.batch_size
        with torch.no_grad(), method.using(self.pipe, self.sigmas):
            return sample(self.pipe, self.prompts[:count], self.seeds[:count], call, output_type, batch_size=size)

    def error(self, peer: Searched, count: int) -> float:
        """Mean over the first `count` samples of the final latents' squared error, in dB."""
        return decibels(self._run(searched_method("", peer), count, "latent") - self.latents[:count])

    def psnr(self, peer: Searched) -> float:
        """Mean over all samples, of the images."""
        return float(metrics.psnr(self._run(searched_method("", peer), len(self.prompts), "pt"), self.images).mean())

    def guess(self, peer: Searched) -> Callable[[Steps], float]:
        if peer.method in SOLVERS:
            return lambda steps: self.path.solver_drift(peer.method, steps, peer.evaluations)
        return lambda steps: self.path.rule_drift(partial(RULES[peer.method], **peer.options), steps)


def search_peer(
    tuner: Tuner,
    method: str,
    evaluations: int,
    known: Mapping[tuple[str, int], Searched],
    *,
    quick_samples: int,
    quick_runs: int,
    runs: int,
    seed: int,
    say: Say,
) -> Searched:
    """The best steps, and options where the rule has any, of one peer at one number of evaluations.

    Quick runs on few samples find the region, runs on all samples the steps, with the options chosen between. What
    `known` has of the peer is gone on from, and replaced only by what is better. Where the result is worse than with
    fewer evaluations, the search has failed and is repeated from those steps plus one.
    """
    blank = Searched(
        method=method, num_steps=tuner.num_steps, evaluations=evaluations, steps=(), psnr=0.0, runs=0
    )
    fewer = [known[m, n] for m, n in known if m == method and n < evaluations]
    below = max(fewer, key=lambda peer: peer.evaluations, default=None)
    before = known.get((method, evaluations))
    if (nearest := before or below) is not None:
        blank = replace(blank, options=nearest.options)
    starts = _starts(tuner, blank, [peer for (_, n), peer in known.items() if n == evaluations])
    grown = _grown(tuner, blank, below) if below is not None else []
    search = partial(_searched, tuner, quick_samples=quick_samples, runs=runs, seed=seed, say=say)
    peer, best = search(blank, [*starts, *grown[:_NEIGHBOURS]], quick_runs=quick_runs)
    if before is not None:
        peer = replace(peer, runs=peer.runs + before.runs)
        if tuner.error(before, len(tuner.prompts)) <= best:
            peer, best = replace(before, runs=peer.runs), tuner.error(before, len(tuner.prompts))
    if below is not None and best > tuner.error(below, len(tuner.prompts)):
        say(f"worse than with {below.evaluations}: again from those steps")
        again, better = search(peer, grown, quick_runs=max(quick_runs, 2 * len(grown)))
        peer = replace(again if better < best else peer, runs=again.runs)
    return replace(peer, psnr=tuner.psnr(peer))


@dataclass
class _PeerSearch:
    """The search of one peer's steps, and how many runs of the pipeline it has taken."""

    tuner: Tuner
    seed: int
    say: Say
    runs: int

    def best_steps(self, peer: Searched, starts: Sequence[Steps], count: int, budget: int) -> Searched:
        """The peer on the best steps found with so many runs on the first `count` samples, all of them each time."""
        errors: list[float] = []

        def evaluate(steps: Steps, incumbent: Trial | None) -> Trial:
            errors.append(self.error(replace(peer, steps=steps), count))
            self.say(f"{count} samples, run {len(errors)} of at most {budget}, best {-min(errors):.2f} dB")
            return Trial.of(errors[-1:])

        num_steps = self.tuner.num_steps
        _, done = local_search(
            evaluate,
            starts,
            moves,
            num_steps=num_steps,
            budget=budget,
            seed=self.seed,
            origins=kicks(partial(kicked, num_steps=num_steps)),
        )
        return replace(peer, steps=done.best)

    def error(self, peer: Searched, count: int) -> float:
        """`Tuner.error`, counted as a run."""
        self.runs += 1
        return self.tuner.error(peer, count)


def _searched(
    tuner: Tuner,
    blank: Searched,
    starts: Sequence[Steps],
    *,
    quick_samples: int,
    quick_runs: int,
    runs: int,
    seed: int,
    say: Say,
) -> tuple[Searched, float]:
    """With the error on all samples in dB; `runs` of the result adds up."""
    search = _PeerSearch(tuner, seed, say, runs=blank.runs)
    peer = search.best_steps(blank, starts, quick_samples, quick_runs)
    if options := RULE_OPTIONS.get(peer.method):
        errors = [search.error(replace(peer, options=each), quick_samples) for each in options]
        peer = replace(peer, options=options[errors.index(min(errors))])
        peer = search.best_steps(peer, [peer.steps], quick_samples, quick_runs // 2)
    peer = search.best_steps(peer, [peer.steps], len(tuner.prompts), runs)
    return replace(peer, runs=search.runs), tuner.error(peer, len(tuner.prompts))


def _starts(tuner: Tuner, blank: Searched, others: Sequence[Searched]) -> list[Steps]:
    """Spread steps, the rules' own, what other peers were best with, and where the guess leads from there."""
    num_steps, count = tuner.num_steps, blank.evaluations
    size = _size(blank)
    starts = [*spread_starts(num_steps, size), *(peer.steps for peer in others if len(peer.steps) == size)]
    starts.append(guessed_optimum(tuner.guess(blank), starts[0], num_steps))
    if blank.method in RULES:
        intervals = range(1, num_steps)
        uniform = [Schedule.uniform(num_steps, n) for n in intervals]
        starts += [schedule.full_steps for schedule in uniform if schedule.num_full == count][:1]
        if (own := taylorseer_schedule(num_steps, count)) is not None:
            starts.append(own.full_steps)
        costs = tuner.path.segment_costs(partial(RULES[blank.method], **blank.options))
        if (path := cheapest_path(costs, num_steps, count, leading=2)) is not None:
            starts.append(path)
    return starts


def _grown(tuner: Tuner, blank: Searched, below: Searched) -> list[Steps]:
    """The steps found for fewer evaluations, long gaps halved, and one step anywhere, in the order of the guess."""
    size, guess, steps = _size(blank), tuner.guess(blank), below.steps
    if len(steps) == size:  # Heun, where one evaluation more may need no further step
        return [steps]
    while len(steps) < size - 1:
        steps = min(insertions(steps, tuner.num_steps), key=lambda each: _spread(each, tuner.num_steps))
    return sorted(insertions(steps, tuner.num_steps), key=guess)


def _size(peer: Searched) -> int:
    """Number of steps to be found."""
    return SOLVERS[peer.method].grid_size(peer.evaluations) if peer.method in SOLVERS else peer.evaluations


def _spread(steps: Steps, num_steps: int) -> tuple[int, Steps]:
    """Sum of squared gaps: small where no gap is long."""
    return sum((b - a) ** 2 for a, b in zip(steps, (*steps[1:], num_steps), strict=True)), steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Search and save; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.search_peers", description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--workload", help="section of the parameter file; default: its default")
    parser.add_argument("--evaluations", type=int, nargs="+", help="default: full steps of the workload's budgets")
    parser.add_argument("--out", type=Path, help="default: data/peers/<workload>.json")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=sorted({*RULES, *SOLVERS}))
    parser.add_argument("--samples", type=int, default=24, help="training prompts the steps are found on")
    parser.add_argument("--quick-samples", type=int, default=8, help="of them, to find the region on")
    parser.add_argument("--quick-runs", type=int, default=150, help="at most, a search")
    parser.add_argument("--runs", type=int, default=40, help="on all samples, at most, a search")
    parser.add_argument("--again", action="store_true", help="search on from what the file has already, too")
    parser.add_argument("--seed", type=int, default=0, help="of the search's random moves")
    options = parser.parse_args(arguments)
    try:
        _search_all(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _search_all(options: argparse.Namespace) -> None:
    workload = load_params(options.params, options.workload)
    out = options.out or Path("data/peers") / f"{workload.name}.json"
    counts = options.evaluations or [schedule.num_full for schedule in workload.budgets().values()]
    if min(counts) < 2 or min(options.samples, options.quick_samples, options.quick_runs, options.runs) < 1:
        raise ValueError("--evaluations must be at least 2, samples and runs at least 1")
    pipe = load_pipeline(workload.model, workload.resources.device)
    tuner = Tuner.of(workload, pipe, options.samples)
    empty = SearchedPeers(
        workload=workload.name,
        fingerprint=fingerprint(pipe.transformer),
        prompt_digests=tuple(prompt_digests(tuner.prompts)),
        tuning_samples=len(tuner.prompts),
        peers=(),
    )
    kept = load_searched(out) if out.exists() else empty
    if replace(kept, peers=()) != empty:  # of another transformer or other prompts
        kept = empty
    known = {(peer.method, peer.evaluations): peer for peer in kept.peers}
    missing = [(m, n) for n in sorted(set(counts)) for m in options.methods if options.again or (m, n) not in known]
    started = time.monotonic()

    def search(wanted: Sequence[tuple[str, int]]) -> None:
        for number, (method, evaluations) in enumerate(wanted, start=1):

            def say(text: str, at: str = f"{number} of {len(wanted)}: {method} at {evaluations}") -> None:
                print(f"\r{time.monotonic() - started:5.0f} s  {at}: {text}\033[K", end="", file=sys.stderr, flush=True)

            peer = search_peer(
                tuner,
                method,
                evaluations,
                known,
                quick_samples=min(options.quick_samples, len(tuner.prompts)),
                quick_runs=options.quick_runs,
                runs=options.runs,
                seed=options.seed,
                say=say,
            )
            known[method, evaluations] = peer
            peers = tuple(sorted(known.values(), key=lambda each: (each.evaluations, each.method)))
            save_searched(out, replace(empty, peers=peers))
            say("")
            shown = f", {dict(peer.options)}" if peer.options else ""
            result = f"{peer.psnr:.2f} dB after {peer.runs} runs, {list(peer.steps)}{shown}"
            print(f"\n{method} at {evaluations}: {result}", flush=True)

    search(missing)
    search(worse_with_more(known))  # numbers searched in an order in which the smaller one was not known yet
    for method, evaluations in worse_with_more(known):
        print(
            f"warning: {method} at {evaluations} is worse than with fewer evaluations on the tuning samples: "
            f"repeat with --again --methods {method} --evaluations {evaluations} and more --quick-runs",
            file=sys.stderr,
        )


def worse_with_more(known: Mapping[tuple[str, int], Searched]) -> list[tuple[str, int]]:
    """Method and evaluations of every search that failed: its images are worse than with fewer evaluations."""
    return [
        (method, count)
        for (method, count), peer in sorted(known.items(), key=lambda item: (item[0][1], item[0][0]))
        if any(m == method and n < count and other.psnr > peer.psnr for (m, n), other in known.items())
    ]


if __name__ == "__main__":
    raise SystemExit(main())
