"""From the cheapest path to the best schedule: a local search whose every trial is a true closed-loop run.

What is searched for is a schedule for a learned predictor, so each candidate gets one: step weights in closed form
(least squares on the other training trajectories), a regression a step that is remembered, since moving one full
step changes only the steps around it. The run then goes through the real pipeline; the error is that of the final
latents. Validation and test trajectories have no say.
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
from lesa.losses import log_latents_loss
from lesa.params import Workload
from lesa.predictor import BoundPredictor
from lesa.schedule import Schedule, history_problems
from lesa.stages import stage_of_steps
from lesa.step_weights import LeastSquares, differences
from lesa.trajectories import Trajectories, trajectories_digest

Report = Callable[[int, dict[str, float]], None]
DECIBELS = 10 / math.log(10)  # of a natural logarithm
WORST = 1e3  # dB: of a run that left the finite numbers
JUMPS = (1, -1, 2, -2)  # how far full steps are moved


class StepFits:
    """Least-squares step weights for any schedule, each step's regression solved once for its history.

    Args:
        data: trajectories.
        indices: which of them are fitted.
        history_size: K.
        ridge: relative to the regressors' energy.
        device: where the sums are made and the weights stay.
    """

    def __init__(
        self, data: Trajectories, indices: Sequence[int], history_size: int, ridge: float, device: torch.device
    ) -> None:
        self._data, self._indices, self._size, self._ridge = data, list(indices), history_size, ridge
        self._device = device
        self._known: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}  # (step, past) -> [R, C]

    def rule(self, schedule: Schedule) -> BoundPredictor:
        """The fitted predictor on `schedule`: step weights alone, no experts."""
        rows = {s: self._solved(s, schedule.anchors(s, self._size)) for s in schedule.predicted_steps}
        some = next(iter(rows.values()))
        table = torch.zeros(schedule.num_steps, *some.shape, device=self._device)
        for step, row in rows.items():
            table[step] = row
        return BoundPredictor(
            name="least squares",
            history_size=self._size,
            keeps_predictions=False,
            alphas=(math.nan,) * schedule.num_steps,
            stages=(0,) * schedule.num_steps,
            sizes=(1,),
            expert_sizes=(1,),
            experts={0: {}},
            by_step={"weight": table[:, :-1], "bias": table[:, -1]},
        )

    @torch.no_grad()
    def _solved(self, step: int, past: tuple[int, ...]) -> torch.Tensor:
        if (step, past) not in self._known:
            features = self._data.feature_batch(self._indices, [step, *past]).to(self._device)
            history = [features[:, place] for place in range(1, len(past) + 1)]
            regressors = torch.zeros(self._size + 1, *history[0].shape, device=self._device)
            regressors[0], regressors[-1] = history[0], 1.0
            for place, change in enumerate(differences(history, self._size), start=1):
                regressors[place] = change
            sums = LeastSquares(1, self._size + 1, features.shape[-1], self._device)
            sums.add(0, regressors, features[:, 0] - history[0])
            self._known[step, past] = sums.solve(self._ridge)[0][0]
        return self._known[step, past]


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
    """The best schedule found with so many true runs: a descent from each of `starts`, then on from the best.

    Args:
        pipe: the workload's pipeline.
        workload: its `search` section says how many runs of how many trajectories.
        data: training trajectories; the last `search.samples` of them are run, the others fitted.
        starts: schedules of one number of full steps.
        seed: of the order in which moves are tried.
        journal: file of finished runs: a search that was killed goes on from there.
        report: called after every run.

    Returns:
        The schedule, and the error of the final latents in dB of the best start and of the result.
    """
    count, samples, evaluations = len(data), workload.search.samples, workload.search.evaluations
    judged = list(range(count - samples, count))
    predictor = workload.predictor
    fits = StepFits(data, range(count - samples), predictor.step_history, predictor.ridge, pipe.device)
    key = search_key(workload, data)
    done = read_journal(journal, key)
    known: dict[tuple[int, ...], float] = {}  # what this search has asked for: the same whether it was killed or not

    @torch.no_grad()
    def error(schedule: Schedule) -> float:
        if schedule.full_steps not in known and schedule.full_steps in done:
            known[schedule.full_steps] = done[schedule.full_steps]
        if schedule.full_steps not in known:
            latents = accelerated_latents(pipe, workload, schedule, fits.rule(schedule), data, judged)
            loss = log_latents_loss(latents, data.latents[judged].to(latents.device))
            known[schedule.full_steps] = float(loss) * DECIBELS if torch.isfinite(loss) else WORST
            write_journal(journal, key, done | known)
            report(len(known), {"error_db": known[schedule.full_steps], "best_db": min(known.values())})
        return known[schedule.full_steps]

    generator = torch.Generator().manual_seed(seed)
    start_error = min(map(error, starts))
    found = []
    for number, start in enumerate(starts, start=1):
        share = len(known) + (evaluations - len(known)) // (len(starts) - number + 1)
        found.append(_descend(workload, data.sigmas, start, error, known, share, generator))
    best = _descend(workload, data.sigmas, min(found, key=error), error, known, evaluations, generator)
    return best, {"start_error_db": start_error, "error_db": error(best), "evaluations": float(len(known))}


def _descend(
    workload: Workload,
    sigmas: torch.Tensor,
    start: Schedule,
    error: Callable[[Schedule], float],
    known: Mapping[tuple[int, ...], float],
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
            if candidate.full_steps in known or not serves(workload, candidate, sigmas):
                continue
            if error(candidate) < error(best):
                move = tuple(b - a for a, b in zip(best.full_steps, candidate.full_steps, strict=True))
                best = candidate
                break
        if best is before:
            break
    return best


def search_key(workload: Workload, data: Trajectories) -> str:
    """Identity of a search's runs: what their errors depend on."""
    predictor = workload.predictor
    parts = [
        dataclasses.asdict(workload.call),
        dataclasses.asdict(workload.model),
        [predictor.step_history, predictor.ridge, workload.search.samples],
        trajectories_digest(data),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_journal(path: Path, key: str) -> dict[tuple[int, ...], float]:
    """Errors of the runs that are done; none where the journal is of another search or torn."""
    try:
        record = json.loads(path.read_text())
        if record["key"] == key:
            return {tuple(steps): float(error) for steps, error in record["runs"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing is lost but time
    return {}


def write_journal(path: Path, key: str, runs: dict[tuple[int, ...], float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, {"key": key, "runs": [[list(steps), error] for steps, error in runs.items()]})


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
