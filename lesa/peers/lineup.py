"""Which peers a comparison runs: rules and solvers on our steps, even ones and searched ones, and tuned caches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lesa import atomic
from lesa.errors import LesaError
from lesa.params import CallParams, EvaluateParams, Report
from lesa.peers.caches import tuned_caches
from lesa.peers.method import Method, lesa_method
from lesa.peers.rules import LABELS, RULES, rule_method
from lesa.peers.solvers import SOLVERS, euler_method, solver_method
from lesa.predictor.predictor import Predictor
from lesa.recording.prompts import PromptError, prompt_digests
from lesa.schedule import Schedule
from lesa.strict_json import parse


def taylorseer_schedule(num_steps: int, num_full: int, warmup_steps: int = 3) -> Schedule | None:
    """TaylorSeer's own rule `{0 .. E-1} U {E-1+kN}` (arXiv 2503.06923) with `num_full` full steps; None if
    no N has.

    Of several N with that number, the one whose longest run of predicted steps is shortest.
    """
    fitting = []
    for interval in range(1, num_steps + 1):
        steps = sorted({*range(warmup_steps), *range(warmup_steps - 1, num_steps, interval)})
        if len(steps) == num_full:
            longest = max(b - a for a, b in zip(steps, [*steps[1:], num_steps], strict=True))
            fitting.append((longest, interval, steps))
    return Schedule.explicit(num_steps, min(fitting)[2]) if fitting else None


# What every comparison runs, the pipeline's own included: of each kind the plain form and what measured best.
USUAL_RULES = ("reuse", "taylor1", "taylor2", "hicache", "spectrum_blend", "dmd")
USUAL_SOLVERS = ("adams_bashforth2", "unipc2")


def fixed_peers(
    budget: str, schedule: Schedule, searched: Sequence[Searched] = (), *, everything: bool = False
) -> list[Method]:
    """Every peer that has nothing to tune, with as many evaluations as the schedule has full steps.

    Args:
        budget: which budget they are compared at.
        schedule: full steps of the predictor there.
        searched: peers on steps of their own that a search found; those with another number of them are left out.
        everything: every rule and solver there is, instead of the usual ones.
    """
    methods = [rule_method(rule, budget, schedule) for rule in (RULES if everything else USUAL_RULES)]
    own = taylorseer_schedule(schedule.num_steps, schedule.num_full)
    if own is not None and own != schedule:
        for order in (1, 2):
            label = f"TaylorSeer, order {order}, its own full steps"
            methods.append(rule_method(f"taylor{order}", budget, own, name=f"taylor{order}_own", label=label))
    methods.append(euler_method(budget, schedule.num_full))
    methods += [
        solver_method(name, budget, schedule.num_steps, schedule.num_full)
        for name in (SOLVERS if everything else USUAL_SOLVERS)
        if name != "euler"
    ]
    return [*methods, *searched_peers(budget, schedule, searched)]


def searched_peers(budget: str, schedule: Schedule, searched: Sequence[Searched]) -> list[Method]:
    """The searched peers that make as many evaluations of a run as long as the schedule's."""
    return [
        searched_method(budget, peer)
        for peer in searched
        if peer.evaluations == schedule.num_full and peer.num_steps == schedule.num_steps
    ]


def peers_from_file(
    path: Path, budgets: Mapping[str, Schedule], judged: Sequence[str], fingerprint: str
) -> list[Method]:
    """The searched peers of a file, for every budget.

    Raises:
        ValueError: a file of another transformer, or of a search that saw a prompt of `judged`.
    """
    searched = load_searched(path)
    searched.refuse(judged, fingerprint)
    return [method for name, schedule in budgets.items() for method in searched_peers(name, schedule, searched.peers)]


def searched_method(budget: str, peer: Searched) -> Method:
    """A rule on its own searched full steps, or a solver on its own searched grid; named `..._searched`."""
    name = f"{peer.method}_searched"
    notes = {"tuning_psnr": round(peer.psnr, 3), "search_runs": peer.runs}
    if peer.method in SOLVERS:
        label = f"{SOLVERS[peer.method].label}, its own searched grid"
        return solver_method(
            peer.method,
            budget,
            peer.num_steps,
            peer.evaluations,
            grid=peer.steps,
            name=name,
            label=label,
            notes=notes,
        )
    schedule = Schedule.explicit(peer.num_steps, peer.steps)
    family = LABELS[peer.method]
    # The table's label names the table's settings; those that were found stand in the row's settings.
    label = f"{family.split(',')[0] if peer.options else family}, its own searched full steps"
    return rule_method(
        peer.method, budget, schedule, name=name, label=label, options=peer.options, notes=notes
    )


_LABELS = {"lesa": "LESA", "lesa_ground_truth": "LESA, ground truth only", "champion": "champion"}


def predictor_methods(predictors: Mapping[str, Predictor], budgets: Mapping[str, Schedule]) -> list[Method]:
    """Every predictor at every budget."""
    return [
        lesa_method(budget, predictor, schedule, name=name, label=_LABELS.get(name, name))
        for budget, schedule in budgets.items()
        for name, predictor in predictors.items()
    ]


def peer_methods(budgets: Mapping[str, Schedule]) -> list[Method]:
    """The peers that nothing has to be tuned for, at every budget."""
    return [method for budget, schedule in budgets.items() for method in fixed_peers(budget, schedule)]


def by_budget(methods: Iterable[Method], budgets: Iterable[str]) -> list[Method]:
    """The same methods, budget by budget."""
    everything = list(methods)
    return [method for budget in budgets for method in everything if method.budget == budget]


def default_methods(
    pipe: Any,
    predictors: Mapping[str, Predictor],
    budgets: Mapping[str, Schedule],
    *,
    call: CallParams,
    settings: EvaluateParams,
    tuning_prompts: Sequence[str] = (),
    tuning_seeds: Sequence[int] = (),
    report: Report | None = None,
) -> list[Method]:
    """The predictors and every peer, at every budget.

    Args:
        pipe: the pipeline; only the tuning of caches samples with it.
        predictors: by name; the first one is the measure for the caches' time.
        budgets: full steps of each budget.
        call: the plain run.
        settings: batch size and repeats.
        tuning_prompts: training prompts, one a sample, for the caches; empty leaves the caches out.
        tuning_seeds: their noise.
        report: progress of the tuning.
    """
    ours = predictor_methods(predictors, budgets)
    caches: list[Method] = []
    if tuning_prompts and ours:
        first = next(iter(predictors))
        caches = tuned_caches(
            pipe,
            {method.budget: method for method in ours if method.name == first},
            call=call,
            prompts=tuning_prompts,
            seeds=tuning_seeds,
            batch_size=settings.batch_size,
            repeats=settings.wall_clock_repeats,
            report=report,
        )
    return by_budget([*ours, *peer_methods(budgets), *caches], budgets)


SCHEMA = "lesa-searched-peers-1"
_MAX_SEARCHED = 1 << 20  # bytes of a file of searched peers


@dataclass(frozen=True, kw_only=True)
class Searched:
    """The best steps found for one peer at one number of evaluations."""

    method: str  # a rule of lesa.peers.rules.RULES or a solver of lesa.peers.solvers.SOLVERS
    num_steps: int  # of the plain run
    evaluations: int  # of the transformer in a run
    steps: tuple[int, ...]  # full steps of a rule, grid of a solver, in steps of the plain run
    psnr: float  # dB to the plain run, mean over the tuning samples, of the images
    runs: int  # of the pipeline that the search made
    options: Mapping[str, Any] = field(default_factory=dict)  # settings of the rule, where they were tuned too


@dataclass(frozen=True, kw_only=True)
class SearchedPeers:
    """All that one search found, and what it may be used for."""

    workload: str
    fingerprint: str  # of the transformer it was made for
    prompt_digests: tuple[str, ...]  # of the tuning prompts: never to be judged on
    tuning_samples: int
    peers: tuple[Searched, ...]

    def refuse(self, prompts: Sequence[str], fingerprint: str) -> None:
        """`ValueError` where the file is of another transformer, or saw prompts that are to be judged."""
        if fingerprint != self.fingerprint:
            raise LesaError(
                f"the searched peers are those of transformer {self.fingerprint[:19]}, this one is "
                f"{fingerprint[:19]}: run python -m benchmarks.peers.search_peers again"
            )
        seen = [prompt for prompt in prompts if prompt_digests([prompt])[0] in set(self.prompt_digests)]
        if seen:
            raise PromptError(
                f"the peers' search saw {len(seen)} of {len(prompts)} prompts, e.g. {seen[0][:60]!r}: judge on others"
            )


def save_searched(path: Path, searched: SearchedPeers) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, {"schema": SCHEMA, **asdict(searched)})


def load_searched(path: Path) -> SearchedPeers:
    """`ValueError` naming what is missing or wrong."""
    try:
        record = parse(path.read_bytes(), max_bytes=_MAX_SEARCHED)
        if record.pop("schema") != SCHEMA:
            raise LesaError(f"schema is not {SCHEMA}")
        peers = tuple(Searched(**{**peer, "steps": tuple(peer["steps"])}) for peer in record.pop("peers"))
        record["prompt_digests"] = tuple(record["prompt_digests"])
        return SearchedPeers(peers=peers, **record)
    except FileNotFoundError:
        raise LesaError(f"{path} does not exist; python -m benchmarks.peers.search_peers makes it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LesaError(f"{path}: not a file of searched peers ({error}); make it again") from None
