"""The searched schedules of a workload: one small file between the search and everything that trains or judges."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lesa import atomic
from lesa.errors import LesaError
from lesa.params import BudgetParams, Workload, searched_budgets
from lesa.schedule import Schedule


def write_schedules(workload: Workload, searched: Mapping[str, tuple[Schedule, Mapping[str, float]]]) -> None:
    """Keep the schedule and figures of each budget's search."""
    path = workload.paths.schedules
    path.parent.mkdir(parents=True, exist_ok=True)
    budgets = {
        name: {"full_steps": list(schedule.full_steps), **figures} for name, (schedule, figures) in searched.items()
    }
    atomic.write_json(path, {"num_steps": workload.call.num_inference_steps, "budgets": budgets}, sort_keys=False)


def with_schedules(workload: Workload) -> Workload:
    """The workload with every searched budget's full steps filled in.

    Raises:
        ValueError: a budget that was not searched, or for another number of steps.
    """
    wanted = searched_budgets(workload.schedule)
    if not wanted:
        return workload
    path = workload.paths.schedules
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        num_steps = record["num_steps"]
        full_steps = {name: tuple(budget["full_steps"]) for name, budget in record["budgets"].items()}
    except FileNotFoundError:
        raise LesaError(f"{path} does not exist: run the search stage, python -m flows.search") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LesaError(f"{path}: not a file of searched schedules; run the search stage again") from None
    problems = [
        f"{name}: {count} full steps wanted, found {list(full_steps.get(name, ()))}"
        for name, count in wanted.items()
        if len(full_steps.get(name, ())) != count
    ]
    if num_steps != workload.call.num_inference_steps:
        problems.append(f"searched for {num_steps} steps, the call has {workload.call.num_inference_steps}")
    if problems:
        raise LesaError(f"{path}: {'; '.join(problems)}: run the search stage again")
    budgets = {
        name: BudgetParams(full_steps=full_steps[name]) if name in wanted else budget
        for name, budget in workload.schedule.budgets.items()
    }
    for name in wanted:
        Schedule.explicit(num_steps, full_steps[name])
    return dataclasses.replace(workload, schedule=dataclasses.replace(workload.schedule, budgets=budgets))
