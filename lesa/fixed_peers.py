"""The peers that `lesa compare` runs at every budget: rules and solvers, on our steps, even ones and searched ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lesa.forecast import LABELS, RULES
from lesa.methods import Method, euler_method, rule_method, solver_method
from lesa.schedule import Schedule
from lesa.searched import Searched, load_searched
from lesa.solvers import SOLVERS


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
    fitting = [
        found
        for found in searched
        if found.evaluations == schedule.num_full and found.num_steps == schedule.num_steps
    ]
    return [searched_method(budget, found) for found in fitting]


def peers_from_file(
    path: Path, budgets: Mapping[str, Schedule], judged: Sequence[str], fingerprint: str
) -> list[Method]:
    """The searched peers of a file, for every budget.

    Raises:
        ValueError: a file of another transformer, or of a search that saw a prompt of `judged`.
    """
    found = load_searched(path)
    found.refuse(judged, fingerprint)
    return [method for name, schedule in budgets.items() for method in searched_peers(name, schedule, found.peers)]


def searched_method(budget: str, found: Searched) -> Method:
    """A rule on its own searched full steps, or a solver on its own searched grid; named `..._searched`."""
    name = f"{found.method}_searched"
    notes = {"tuning_psnr": round(found.psnr, 3), "search_runs": found.runs}
    if found.method in SOLVERS:
        label = f"{SOLVERS[found.method].label}, its own searched grid"
        return solver_method(
            found.method,
            budget,
            found.num_steps,
            found.evaluations,
            grid=found.steps,
            name=name,
            label=label,
            notes=notes,
        )
    schedule = Schedule.explicit(found.num_steps, found.steps)
    family = LABELS[found.method]
    # The table's label names the table's settings; those that were found stand in the row's settings.
    label = f"{family.split(',')[0] if found.options else family}, its own searched full steps"
    return rule_method(
        found.method, budget, schedule, name=name, label=label, options=found.options, notes=notes
    )
