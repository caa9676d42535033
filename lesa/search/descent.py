"""From the cheapest path to the best schedule: a local search whose every trial is a true closed-loop run.

What is searched for is a schedule for a learned predictor, so each candidate gets one: step weights in closed form,
fitted on the other training trajectories. The run then goes through the real pipeline; the error is that of the final
latents. A candidate that falls behind the incumbent on the first trajectories is not run on the rest (`search.trials`).
Where a descent ends depends on the order of its moves, so there are several; which schedule is best changes with
training through the sampler, so the leaders are trained, in two rounds of successive halving (`search.finalists`).
Validation and test trajectories have no say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lesa.errors import LesaError
from lesa.params import CallParams, ClosedLoopParams, ModelParams, PredictorParams, Report, SearchParams
from lesa.predictor.predictor import BoundPredictor
from lesa.recording.dataset import Trajectories, trajectories_digest
from lesa.schedule import Schedule, history_problems, stage_of_steps
from lesa.search.finalists import error_after_training, leaders
from lesa.search.local_search import Evaluations, Move, in_turn, local_search
from lesa.search.trials import Runs, Steps, Trial, run_trial
from lesa.training.losses import log_squared_errors
from lesa.training.rollout import accelerated_latents
from lesa.training.step_weights import StepFits

DECIBELS = 10 / math.log(10)  # of a natural logarithm
JUMPS = ((1, -1), (2, -2))  # how far full steps are moved, near moves before far ones
HOPELESS = 3.0  # dB that a start may be behind the best one: no descent from farther behind has caught up


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a search depends on beside its trajectories and its starts."""

    call: CallParams
    model: ModelParams
    predictor: PredictorParams
    search: SearchParams
    closed_loop: ClosedLoopParams  # how fast finalists are trained
    seed: int  # of the finalists' batches


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Errors of schedules in dB: of true runs on some training trajectories, with weights learned on others."""

    pipe: Any
    settings: SearchSettings
    data: Trajectories
    judged: list[int]  # rows that are run
    fitted: list[int]  # rows that weights are learned on
    fits: StepFits
    runs: Runs

    @classmethod
    def of(cls, pipe: Any, settings: SearchSettings, data: Trajectories, journal: Path, report: Report) -> Judge:
        """Fit on some of the trajectories, judge on the others; `journal` and `report` as `refine` takes them."""
        predictor = settings.predictor
        judged, fitted = judged_apart(data, settings.search.samples)
        return cls(
            pipe=pipe,
            settings=settings,
            data=data,
            judged=judged,
            fitted=fitted,
            fits=StepFits(data, fitted, predictor.step_history, predictor.ridge, pipe.device),
            runs=Runs(journal, search_key(settings, data), report),
        )

    @property
    def num_steps(self) -> int:
        return len(self.data.sigmas) - 1

    def trial(self, steps: Steps, incumbent: Trial | None) -> Trial:
        """Run a schedule with weights in closed form, as far as it takes to tell it from the incumbent."""

        def run() -> Trial:
            schedule = Schedule.explicit(self.num_steps, steps)
            return run_trial(self.judged, partial(self._errors, schedule, self.fits.rule(schedule)), incumbent)

        return self.runs.make((0, steps), "error", run)

    @torch.no_grad()
    def _errors(self, schedule: Schedule, rule: BoundPredictor, rows: list[int]) -> list[float]:
        latents = accelerated_latents(self.pipe, self.settings.call, schedule, rule, self.data, rows)
        errors = log_squared_errors(latents, self.data.latents[rows].to(latents.device)) * DECIBELS
        return errors.tolist()

    def trained_error(self, steps: Steps, iterations: int, value: str) -> float:
        """The error after a short training of the weights; `value` names it in reports."""
        run = (iterations, steps)
        if run not in self.runs.known:
            self.runs.make(run, value, partial(self._trained, steps, iterations))
        return self.runs.known[run].error

    def _trained(self, steps: Steps, iterations: int) -> Trial:
        schedule = Schedule.explicit(self.num_steps, steps)
        error = error_after_training(
            self.pipe,
            self.settings.call,
            self.data,
            schedule,
            self.fits.weights(schedule),
            settings=self.settings.closed_loop,
            history_size=self.settings.predictor.step_history,
            seed=self.settings.seed,
            fitted=[row for row in self.fitted if self.data.branch[row] == 0],
            judged=self.judged,
            iterations=iterations,
        )
        return Trial.of([error * DECIBELS])


def refine(
    pipe: Any,
    settings: SearchSettings,
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
        settings: the section `search` says how many runs of how many trajectories, and how many are trained.
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
    search, judge = settings.search, Judge.of(pipe, settings, data, journal, report)

    def allowed(steps: Steps) -> bool:
        return serves(settings.predictor, Schedule.explicit(judge.num_steps, steps), data.sigmas)

    ends, done = local_search(
        judge.trial,
        [start.full_steps for start in starts],
        moves,
        num_steps=judge.num_steps,
        budget=max(search.descents * search.evaluations, len(set(starts))),
        seed=seed,
        origins=in_turn(search.descents, within=HOPELESS),
        samples=len(judge.judged),
        allowed=allowed,
    )
    best = min(ends, key=done.error)
    figures = {
        "start_error_db": min(done.error(start.full_steps) for start in starts),
        "error_db": done.error(best),
        "evaluations": float(done.count),
    }
    if search.finalists > 1:
        candidates = _candidates(done, ends, max(search.screened, search.finalists))
        best, figures["trained_error_db"] = _best_after_training(judge, candidates)
    return Schedule.explicit(judge.num_steps, best), figures


def _candidates(done: Evaluations, ends: Sequence[Steps], count: int) -> list[Steps]:
    """Where the descents ended, the best first, then whatever else leads."""
    errors = {steps: trial.error for steps, trial in done.trials.items()}
    return leaders(errors, count, leaders({end: errors[end] for end in ends}, count))


def _best_after_training(judge: Judge, candidates: Sequence[Steps]) -> tuple[Steps, float]:
    """Successive halving: of many candidates a very short training keeps a few, of which a longer one takes the best.

    Returns:
        The steps, and their error after the longer training in dB.
    """
    search = judge.settings.search
    finalists = list(candidates)
    if len(finalists) > search.finalists:
        screen = partial(judge.trained_error, iterations=search.screen_iterations, value="screened_error")
        finalists = sorted(finalists, key=screen)[: search.finalists]
    train = partial(judge.trained_error, iterations=search.finalist_iterations, value="trained_error")
    best = min(finalists, key=train)
    return best, train(best)


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


def search_key(settings: SearchSettings, data: Trajectories) -> str:
    """Identity of a search's runs: what their errors depend on."""
    predictor, loop = settings.predictor, settings.closed_loop
    parts = [
        dataclasses.asdict(settings.call),
        dataclasses.asdict(settings.model),
        [predictor.step_history, predictor.ridge, settings.search.samples],
        [loop.batch_size, loop.step_learning_rate, loop.gradient_clip, settings.seed],
        trajectories_digest(data),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def moves(steps: Steps, generator: torch.Generator) -> list[Move]:
    """One full step moved, or all from one on, near moves first, in a drawn order."""
    count = len(steps)
    drawn: list[Move] = []
    for jumps in JUMPS:
        these = [
            tuple(by if first <= place < last else 0 for place in range(count))
            for first in range(1, count)
            for last in (first + 1, count)
            for by in jumps
        ]
        drawn += [these[number] for number in torch.randperm(len(these), generator=generator).tolist()]
    return drawn


def serves(predictor: PredictorParams, schedule: Schedule, sigmas: torch.Tensor) -> bool:
    """Whether the predictor has the history it wants at every predicted step."""
    if predictor.kind == "per_step":
        return True  # its early steps use what there is
    stages = stage_of_steps(sigmas, predictor.boundaries)
    return not history_problems(schedule, predictor.history_sizes, stages, predictor.history)
