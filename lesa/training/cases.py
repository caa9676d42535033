"""What experts are trained on: schedules with the trajectories of their number of steps, and what may be asked between.

Time offsets are in noise level, so one set of experts can serve runs of many lengths (LESA, arXiv 2602.20497). A budget
is carried to another number of steps by `Schedule.carried`; every carried schedule leads with two full steps, which is
the history these experts look back on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lesa.errors import LesaError
from lesa.predictor.alpha import history_steps
from lesa.predictor.spec import MIXED, MIXED_HISTORY
from lesa.recording.dataset import Splits, Trajectories, trajectories_digest
from lesa.schedule import Schedule, least_full, stage_of_steps
from lesa.training.design import ExpertDesign

MAX_START_POINTS = 512  # of the offsets at which a gate is started
MARGIN = 0.05  # of the range of offsets: noise levels between the recorded numbers of steps are interpolated


def data_digest(budget: str, train: Trajectories, validation: Trajectories, others: Mapping[int, Splits]) -> str:
    """Identity of the trajectories that the experts of `budget` are trained on."""
    further = [data for count in sorted(others) for data in others[count]] if budget == MIXED else []
    return trajectories_digest(train, validation, *further)


def draw_case(batch: torch.Generator, count: int) -> int:
    """Which of `count` cases an optimiser step is about; nothing is drawn where there is no choice."""
    return int(torch.randint(count, (), generator=batch)) if count > 1 else 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One schedule that experts are trained on, with the trajectories of its number of steps."""

    schedule: Schedule
    train: Trajectories
    validation: Trajectories
    judged: int  # validation trajectories that count, from the first


def training_cases(
    design: ExpertDesign, budget: str, train: Trajectories, validation: Trajectories, others: Mapping[int, Splits]
) -> list[Case]:
    """What the experts of `budget` are trained on: its schedule, or with `MIXED` all schedules at all step counts.

    Args:
        train, validation: trajectories of the call's own number of steps.
        others: those of every further number of steps; read for `MIXED` alone.

    Raises:
        ValueError: trajectories of a number of steps are missing.
    """
    if budget != MIXED:
        schedule = design.schedules[budget]
        return [Case(schedule=schedule, train=train, validation=validation, judged=len(validation))]
    if missing := sorted(set(design.step_counts) - others.keys()):
        raise LesaError(f"experts for other numbers of steps need the trajectories of {missing} steps too")
    sets = {design.call.num_inference_steps: (train, validation), **others}
    judged = min(len(validation) for _, validation in sets.values())
    return [
        Case(schedule=schedule, train=sets[count][0], validation=sets[count][1], judged=judged)
        for count in sorted(sets)
        for schedule in carried_schedules(design, count)
    ]


def carried_schedules(design: ExpertDesign, num_steps: int) -> list[Schedule]:
    """Every budget's schedule for runs of `num_steps` as it is served: those that predict something, each once."""
    budgets = design.schedules.values()
    least = least_full(budgets)
    carried = [schedule.carried(num_steps, least) for schedule in budgets]
    return [schedule for schedule in dict.fromkeys(carried) if schedule.predicted_steps]


def served_offsets(design: ExpertDesign, stage: int, levels: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """[n, 2] noise-level offsets that an expert may be asked for at any number of steps from the lowest to the highest.

    Full steps count too: there the error meter asks what the expert would have predicted. Where rounding puts a carried
    schedule's full steps changes from one number of steps to the next, so all of them are looked at; what is
    returned are the extreme ones, with a margin, and some of the others.

    Args:
        levels: noise levels by number of steps, of those that are recorded.
    """
    boundaries, history = design.predictor.boundaries, design.predictor.history
    rows = []
    for num_steps in range(min(levels), max(levels) + 1):
        sigmas = levels[num_steps] if num_steps in levels else interpolated(levels[max(levels)], num_steps)
        stages = stage_of_steps(sigmas, boundaries)
        for schedule in carried_schedules(design, num_steps):
            steps = [step for step in range(MIXED_HISTORY, num_steps) if stages[step] == stage]
            if steps:
                past = [history_steps(schedule, step, MIXED_HISTORY, history) for step in steps]
                rows.append(sigmas[torch.tensor(past)] - sigmas[steps][:, None])
    if not rows:  # nothing to predict in this noise stage, a start is still well defined
        return torch.arange(1, MIXED_HISTORY + 1, dtype=torch.float32)[None] / max(levels)
    offsets = torch.cat(rows).float()
    low, high = offsets.amin(dim=0), offsets.amax(dim=0)
    margin = MARGIN * (high - low)
    extremes = torch.stack([(low - margin).clamp_min(0.0), high + margin])
    return torch.cat([extremes, offsets[:: -(-len(offsets) // MAX_START_POINTS)]])


def interpolated(sigmas: torch.Tensor, num_steps: int) -> torch.Tensor:
    """[num_steps + 1] noise levels at even places along a longer run's noise levels [S + 1]."""
    places = torch.arange(num_steps + 1, dtype=torch.float64) * (len(sigmas) - 1) / num_steps
    before = places.long().clamp_max(len(sigmas) - 2)
    levels = sigmas.double()
    return (levels[before] + (places - before) * (levels[before + 1] - levels[before])).float()
