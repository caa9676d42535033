"""What a training run is of: the identity of its trajectories, and how many of validation judge it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lesa.params import CallParams
from lesa.predictor.spec import MIXED
from lesa.schedule import Schedule
from lesa.training.cases import data_digest, training_cases


class Runs:
    """Trajectories with keys."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)


def digest(budget: str, train: Any, validation: Any, others: Any = None) -> str:
    return data_digest(budget, train, validation, others or {})


def test_other_trajectories_of_either_split_are_another_training_run() -> None:
    train, validation, other = Runs("a", "b"), Runs("c"), Runs("d")
    known = digest("5x", train, validation)
    assert known == digest("5x", Runs("b", "a"), Runs("c"))
    swapped = digest("5x", validation, train)
    assert len({known, digest("5x", other, validation), digest("5x", train, other), swapped}) == 4
    assert digest("5x", train, validation, {20: (other, other)}) == known, "a budget is of its own number of steps"
    mixed = {digest(MIXED, train, validation, {20: (train, further)}) for further in (train, other)}
    assert len(mixed) == 2


def test_every_number_of_steps_is_judged_by_as_many_trajectories() -> None:
    design: Any = SimpleNamespace(
        call=CallParams(height=16, width=16, num_inference_steps=8),
        step_counts=(6,),
        schedules={"2x": Schedule.explicit(8, (0, 1, 3, 5))},
    )
    train: Any = Runs("a", "b", "c")
    validation: Any = Runs("d", "e", "f")
    others: Any = {6: (Runs("g"), Runs("h", "i"))}
    (own,) = training_cases(design, "2x", train, validation, {})
    assert own.judged == 3 and (own.train, own.validation) == (train, validation)
    cases = training_cases(design, MIXED, train, validation, others)
    assert [(case.schedule.num_steps, case.judged) for case in cases] == [(6, 2), (8, 2)]
    assert [(case.train, case.validation) for case in cases] == [others[6], (train, validation)]
