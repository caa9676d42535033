"""The searched schedules of a workload: one small file between the search and everything that trains or judges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesa import atomic, strict_json
from lesa.errors import LesaError
from lesa.params import BudgetParams, ScheduleParams, searched_budgets
from lesa.schedule import Schedule

_MAX_BYTES = 1 << 20


def write_schedules(path: Path, num_steps: int, searched: Mapping[str, tuple[Schedule, Mapping[str, float]]]) -> None:
    """Keep the schedule and figures of each budget's search, which was for runs of `num_steps`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    budgets = {
        name: {"full_steps": list(schedule.full_steps), **figures} for name, (schedule, figures) in searched.items()
    }
    atomic.write_json(path, {"num_steps": num_steps, "budgets": budgets}, sort_keys=False)


def read_schedules(path: Path, rule: ScheduleParams, num_steps: int) -> ScheduleParams:
    """`rule` with every searched budget's full steps filled in, for runs of `num_steps`.

    Raises:
        ValueError: a budget that was not searched, or for another number of steps.
    """
    wanted = searched_budgets(rule)
    if not wanted:
        return rule
    try:
        record: dict[str, Any] = strict_json.parse(path.read_bytes(), max_bytes=_MAX_BYTES)
        searched_for = record["num_steps"]
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
    if searched_for != num_steps:
        problems.append(f"searched for {searched_for} steps, the call has {num_steps}")
    if problems:
        raise LesaError(f"{path}: {'; '.join(problems)}: run the search stage again")
    budgets = {
        name: BudgetParams(full_steps=full_steps[name]) if name in wanted else budget
        for name, budget in rule.budgets.items()
    }
    for name in wanted:
        Schedule.explicit(num_steps, full_steps[name])
    return dataclasses.replace(rule, budgets=budgets)
