"""From the cheapest path to the best schedule: a local search whose every trial is a true closed-loop run.

What is searched for is a schedule for a learned predictor, so each candidate gets one: step weights in closed form,
fitted on the other training trajectories. The run then goes through the real pipeline; the error is that of the final
latents. A candidate that falls behind the best on the first trajectories is not run on the rest (`search.trials`).
Where a descent ends depends on the order of its moves, so there are several; which schedule is best changes with
training through the sampler, so a very short one screens the leaders and a short one has the last word
(`search.finalists`). Validation and test trajectories have no say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from lesa.errors import LesaError
from lesa.params import Report, Workload
from lesa.predictor.predictor import BoundPredictor
from lesa.recording.dataset import Trajectories, trajectories_digest
from lesa.schedule import Schedule, history_problems, stage_of_steps
from lesa.search.finalists import error_after_training, leaders
from lesa.search.trials import Runs, Trial, run_trial
from lesa.training.losses import log_squared_errors
from lesa.training.rollout import accelerated_latents
from lesa.training.step_weights import StepFits

DECIBELS = 10 / math.log(10)  # of a natural logarithm
JUMPS = (1, -1, 2, -2)  # how far full steps are moved
HOPELESS = 3.0  # dB that a start may be behind the best one: no descent from farther behind has caught up


class ErrorOf(Protocol):
    """Error of a schedule, in dB; run as far as it takes to tell it from a schedule that was run in full."""

    def __call__(self, schedule: Schedule, against: Schedule | None = None, /) -> float: ...


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
    """The best schedule found by several descents, each with a drawn order of its own; training has the last word.

    Args:
        pipe: the workload's pipeline.
        workload: its `search` section says how many runs of how many trajectories, and how many are trained.
        data: training trajectories; `search.samples` of them are run, those of other prompts fitted (`judged_apart`).
        starts: schedules of one number of full steps: the descents begin at them in turn, at the best one first; at one
            that is far behind none begins.
        seed: of the orders in which moves are tried.
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
    runs = Runs(journal, search_key(workload, data), report)

    @torch.no_grad()
    def errors_of(schedule: Schedule, rule: BoundPredictor, indices: list[int]) -> list[float]:
        latents = accelerated_latents(pipe, workload, schedule, rule, data, indices)
        errors = log_squared_errors(latents, data.latents[indices].to(latents.device)) * DECIBELS
        return errors.tolist()

    def error(schedule: Schedule, against: Schedule | None = None) -> float:
        run = (0, schedule.full_steps)
        incumbent = None if against is None else runs.known[0, against.full_steps]
        trial = runs.known.get(run)
        unfinished = trial is not None and len(trial.errors) < len(judged)
        if trial is None or (unfinished and incumbent is not None and trial.error < incumbent.error):
            rule = fits.rule(schedule)
            trial = runs.make(run, "error", lambda: run_trial(judged, partial(errors_of, schedule, rule), incumbent))
        return trial.error

    def trained_error(schedule: Schedule, iterations: int, value: str) -> float:
        run = (iterations, schedule.full_steps)
        if run not in runs.known:
            weights, rows = fits.weights(schedule), [row for row in fitted if data.branch[row] == 0]
            given = (pipe, workload, data, schedule, weights)
            train = partial(error_after_training, *given, fitted=rows, judged=judged, iterations=iterations)
            runs.make(run, value, lambda: Trial.of([train() * DECIBELS]))
        return runs.known[run].error

    ranked = sorted(starts, key=error)
    ranked = [start for start in ranked if error(start) <= error(ranked[0]) + HOPELESS]
    ends = []
    for number in range(settings.descents):
        left = settings.descents * settings.evaluations - len(runs.made)
        limit = len(runs.made) + left // (settings.descents - number)
        generator = torch.Generator().manual_seed(seed + number)
        start = ranked[number % len(ranked)]
        ends.append(_descend(workload, data.sigmas, start, error, runs, limit, generator))
    best = min(ends, key=error)
    figures = {"start_error_db": error(ranked[0]), "error_db": error(best), "evaluations": float(len(runs.made))}
    if settings.finalists > 1:
        chosen = _candidates(runs, ends, max(settings.screened, settings.finalists))
        if len(chosen) > settings.finalists:
            screen = partial(trained_error, iterations=settings.screen_iterations, value="screened_error")
            chosen = sorted(chosen, key=screen)[: settings.finalists]
        train = partial(trained_error, iterations=settings.finalist_iterations, value="trained_error")
        best = min(chosen, key=train)
        figures["trained_error_db"] = train(best)
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
    raise LesaError(f"search.samples: {samples} leaves none of {len(prompts)} recorded training prompts to be fitted")


def _descend(
    workload: Workload,
    sigmas: torch.Tensor,
    start: Schedule,
    error: ErrorOf,
    runs: Runs,
    limit: int,
    generator: torch.Generator,
) -> Schedule:
    """Takes the first better neighbour again and again, until none is better or so many runs were made.

    What was an improvement is tried once more in the same direction before anything else; what this descent has seen
    is not tried again.
    """
    best, seen = start, {start.full_steps}
    move: tuple[int, ...] | None = None
    while len(runs.made) < limit:
        before = best
        for candidate in neighbours(best, generator, move):
            if len(runs.made) >= limit:
                break
            if candidate.full_steps in seen or not serves(workload, candidate, sigmas):
                continue
            seen.add(candidate.full_steps)
            if error(candidate, best) < error(best, None):
                move = tuple(b - a for a, b in zip(best.full_steps, candidate.full_steps, strict=True))
                best = candidate
                break
        if best is before:
            break
    return best


def _candidates(runs: Runs, ends: Sequence[Schedule], count: int) -> list[Schedule]:
    """Where the descents ended, the best first, then whatever else leads."""
    errors = {steps: trial.error for (iterations, steps), trial in runs.known.items() if iterations == 0}
    found = leaders({end.full_steps: errors[end.full_steps] for end in ends}, count)
    return [Schedule.explicit(ends[0].num_steps, steps) for steps in leaders(errors, count, found)]


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
