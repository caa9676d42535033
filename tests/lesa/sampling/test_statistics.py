"""What a run's records say of its errors, by hand."""

from __future__ import annotations

import torch

from lesa.sampling.statistics import RunStatistics, StepRecord
from lesa.schedule import Schedule


def record(step: int, *errors: list[float]) -> StepRecord:
    made = StepRecord(step=step, kind="full", planned="full")
    for branch in errors:
        made.add_errors(torch.tensor(branch))
    return made


def test_a_step_s_error_is_the_mean_and_a_sample_s_the_worst_branch() -> None:
    made = record(3, [0.1, 0.4], [0.3, 0.2])
    assert made.error is not None and abs(made.error - 0.25) < 1e-6
    assert made.sample_errors is not None and torch.equal(made.sample_errors, torch.tensor([0.3, 0.4]))
    assert record(3).error is None and record(3).sample_errors is None


def test_bounds_hold_until_another_schedule_does() -> None:
    """They are of the first schedule's errors: from the change on the run is another one."""
    statistics = RunStatistics(rule="r", schedule=Schedule.explicit(6, (0, 2, 4)), bounds={2: 0.25, 3: 0.25})
    assert statistics.is_beyond(record(2, [0.1, 0.5])) and not statistics.is_beyond(record(2, [0.1, 0.25]))
    assert statistics.is_beyond(record(2, [float("nan")])) and not statistics.is_beyond(record(4, [9.0]))
    statistics.change = 3
    assert statistics.is_beyond(record(2, [0.5])) and not statistics.is_beyond(record(3, [0.5]))
