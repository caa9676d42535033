"""From the cheapest path to the best schedule: a local search whose every trial is a true closed-loop run.

What is searched for is a schedule for a learned predictor, so each candidate gets one: step weights in closed form,
fitted on the other training trajectories. The run then goes through the real pipeline; the error is that of the final
latents. A candidate that falls behind the best on the first trajectories is not run on the rest (`lesa.race`). Of the
leaders that this finds, a short training through the sampler takes the best (`lesa.finalists`). Validation and test
trajectories have no say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lesa import atomic
from lesa.closed_loop import accelerated_latents
from lesa.finalists import Steps, error_after_training, leaders
from lesa.loop import Report
from lesa.losses import log_squared_errors
from lesa.params import Workload
from lesa.predictor import BoundPredictor
from lesa.race import Race, raced
from lesa.schedule import Schedule, history_problems
from lesa.stages import stage_of_steps
from lesa.step_fits import StepFits
from lesa.trajectories import Trajectories, trajectories_digest

Run = tuple[int, Steps]  # optimiser steps before it, full steps
DECIBELS = 10 / math.log(10)  # of a natural logarithm
JUMPS = (1, -1, 2, -2)  # how far full steps are moved


def refine(
    pipe: Any,
    workload: Workload,
    data: Trajectories,
    starts: Sequence[Schedule],
    *,
    seed: int,
    journal: Path,
    report: Report,
) -> tuple[Schedule, dict[str, float]]:
    """The best schedule found: a descent from each of `starts`, then on from the best; training has the last word.

    Args:
        pipe: the workload's pipeline.
        workload: its `search` section says how many runs of how many trajectories, and how many are trained.
        data: training trajectories; `search.samples` of them are run, those of other prompts fitted (`judged_apart`).
        starts: schedules of one number of full steps.
        seed: of the order in which moves are tried.
        journal: file of finished runs: a search that was killed goes on from there.
        report: called after every run.

    Returns:
        The schedule, and in dB the error of the final latents of the best start and of the best schedule with weights
        in closed form (`start_error_db`, `error_db`) and, where finalists were trained, of the schedule returned after
        its short training (`trained_error_db`).
    """
    settings, predictor = workload.search, workload.predictor
    judged, fitted = judged_apart(data, settings.samples)
    fits = StepFits(data, fitted, predictor.step_history, predictor.ridge, pipe.device)
    key = search_key(workload, data)
    done = read_journal(journal, key)
    known: dict[Run, Race] = {}  # what this search has asked for: the same whether it was killed or not

    def remembered(run: Run, value: str, make: Callable[[], Race]) -> Race:
        if run not in known and run in done:
            known[run] = done[run]
        if run not in known:
            known[run] = make()
            write_journal(journal, key, done | known)
            best = min(race.error for (iterations, _), race in known.items() if iterations == run[0])
            report(len(known), {f"{value}_db": known[run].error, f"best_{value}_db": best})
        return known[run]

    @torch.no_grad()
    def errors_of(schedule: Schedule, rule: BoundPredictor, indices: list[int]) -> list[float]:
        latents = accelerated_latents(pipe, workload, schedule, rule, data, indices)
        errors = log_squared_errors(latents, data.latents[indices].to(latents.device)) * DECIBELS
        return errors.tolist()

    def run_once(schedule: Schedule, against: Schedule | None) -> Race:
        rule = fits.rule(schedule)
        rival = None if against is None else known[0, against.full_steps]
        return raced(judged, lambda indices: errors_of(schedule, rule, indices), rival)

    def error(schedule: Schedule, against: Schedule | None = None) -> float:
        return remembered((0, schedule.full_steps), "error", lambda: run_once(schedule, against)).error

    def trained(schedule: Schedule) -> Race:
        weights, runs = fits.weights(schedule), [row for row in fitted if data.branch[row] == 0]
        found = error_after_training(pipe, workload, data, schedule, weights, fitted=runs, judged=judged)
        return Race.of([found * DECIBELS])

    def trained_error(schedule: Schedule) -> float:
        run = settings.finalist_iterations, schedule.full_steps
        return remembered(run, "trained_error", lambda: trained(schedule)).error

    generator = torch.Generator().manual_seed(seed)
    start_error = min(map(error, starts))
    found = []
    for number, start in enumerate(starts, start=1):
        share = len(known) + (settings.evaluations - len(known)) // (len(starts) - number + 1)
        found.append(_descend(workload, data.sigmas, start, error, known, share, generator))
    best = _descend(workload, data.sigmas, min(found, key=error), error, known, settings.evaluations, generator)
    figures = {"start_error_db": start_error, "error_db": error(best), "evaluations": float(len(known))}
    errors = {steps: race.error for (_, steps), race in known.items()}
    chosen = [Schedule.explicit(best.num_steps, steps) for steps in leaders(errors, settings.finalists)]
    if len(chosen) > 1:
        best = min(chosen, key=trained_error)
        figures["trained_error_db"] = trained_error(best)
    return best, figures


def judged_apart(data: Trajectories, samples: int) -> tuple[list[int], list[int]]:
    """Rows to run the candidates on, and rows to fit them on: no prompt has both.

    As many prompts are run as there can be, the last ones; of each as few noises as make up `samples`, one of the
    guidance branches (all lead to the same latents).

    Raises:
        ValueError: no prompt would be left to fit.
    """
    runs: dict[str, list[int]] = {}
    for row, (prompt, branch) in enumerate(zip(data.prompts, data.branch, strict=True)):
        if branch == 0:
            runs.setdefault(prompt, []).append(row)
    prompts = list(runs)
    for noises in range(1, max(map(len, runs.values())) + 1):
        chosen: list[str] = []
        rows: list[int] = []
        for prompt in prompts[:0:-1]:  # the first one is always fitted
            if len(rows) < samples:
                chosen.append(prompt)
                rows += runs[prompt][:noises][: samples - len(rows)]
        if len(rows) == samples:
            taken = set(chosen)
            return sorted(rows), [row for row, prompt in enumerate(data.prompts) if prompt not in taken]
    raise ValueError(f"search.samples: {samples} leaves none of {len(prompts)} recorded training prompts to be fitted")


def _descend(
    workload: Workload,
    sigmas: torch.Tensor,
    start: Schedule,
    error: Callable[[Schedule, Schedule | None], float],
    known: Mapping[Run, Race],
    evaluations: int,
    generator: torch.Generator,
) -> Schedule:
    """Takes the first better neighbour again and again, until none is better or so many runs were made.

    What was an improvement is tried once more in the same direction before anything else.
    """
    best: Schedule = start
    move: tuple[int, ...] | None = None
    while len(known) < evaluations:
        before = best
        for candidate in neighbours(best, generator, move):
            if len(known) >= evaluations:
                break
            if (0, candidate.full_steps) in known or not serves(workload, candidate, sigmas):
                continue
            if error(candidate, best) < error(best, None):
                move = tuple(b - a for a, b in zip(best.full_steps, candidate.full_steps, strict=True))
                best = candidate
                break
        if best is before:
            break
    return best


def search_key(workload: Workload, data: Trajectories) -> str:
    """Identity of a search's runs: what their errors depend on."""
    predictor, loop = workload.predictor, workload.closed_loop
    parts = [
        dataclasses.asdict(workload.call),
        dataclasses.asdict(workload.model),
        [predictor.step_history, predictor.ridge, workload.search.samples],
        [loop.batch_size, loop.step_learning_rate, loop.gradient_clip, workload.seed],
        trajectories_digest(data),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_journal(path: Path, key: str) -> dict[Run, Race]:
    """Errors of the runs that are done; none where the journal is of another search or torn."""
    try:
        record = json.loads(path.read_text())
        if record["key"] == key:
            return {
                (int(iterations), tuple(steps)): Race(error=float(error), errors=tuple(map(float, errors)))
                for iterations, steps, error, errors in record["runs"]
            }
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing is lost but time
    return {}


def write_journal(path: Path, key: str, runs: Mapping[Run, Race]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[iterations, list(steps), race.error, list(race.errors)] for (iterations, steps), race in runs.items()]
    atomic.write_json(path, {"key": key, "runs": rows})


def neighbours(
    schedule: Schedule, generator: torch.Generator, move: Sequence[int] | None = None
) -> Iterator[Schedule]:
    """Schedules with one full step moved, or all from one on, near moves first, in a drawn order.

    Args:
        schedule: where to start.
        generator: of the order.
        move: by how much each full step was moved last; the same again comes first.
    """
    count = schedule.num_full
    moves: list[Sequence[int]] = [] if move is None else [move]
    for jumps in (JUMPS[:2], JUMPS[2:]):
        these = [
            [by if first <= place < last else 0 for place in range(count)]
            for first in range(1, count)
            for last in (first + 1, count)
            for by in jumps
        ]
        moves += [these[number] for number in torch.randperm(len(these), generator=generator).tolist()]
    seen = {schedule.full_steps}
    for shifts in moves:
        steps = tuple(step + shift for step, shift in zip(schedule.full_steps, shifts, strict=True))
        if steps in seen or steps[-1] >= schedule.num_steps or any(b <= a for a, b in pairwise(steps)):
            continue
        seen.add(steps)
        yield Schedule.explicit(schedule.num_steps, steps)


def serves(workload: Workload, schedule: Schedule, sigmas: torch.Tensor) -> bool:
    """Whether the predictor has the history it wants at every predicted step."""
    predictor = workload.predictor
    if predictor.kind == "per_step":
        return True  # its early steps use what there is
    stages = stage_of_steps(sigmas, predictor.boundaries)
    return not history_problems(schedule, predictor.history_sizes, stages, predictor.history)
