"""Which steps are full: the papers' formula, every refusal, the anchors a prediction looks back on."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa.schedule import Schedule, history_problems, least_full, picture, stage_of_steps

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")


@given(
    steps=st.integers(1, 60),
    interval=st.integers(1, 70),
    warmup=st.integers(0, 65),
    cooldown=st.integers(0, 65),
)
def test_uniform_is_the_formula(steps: int, interval: int, warmup: int, cooldown: int) -> None:
    schedule = Schedule.uniform(steps, interval, warmup, cooldown)
    for step in range(steps):
        on_grid = step >= warmup and (step - warmup) % interval == 0
        expected = step == 0 or step < warmup or on_grid or step >= steps - cooldown
        assert schedule.is_full(step) == expected, step
        assert (step in schedule.predicted_steps) == (not expected)
    assert schedule.num_full + len(schedule.predicted_steps) == steps
    assert schedule.full_steps == tuple(sorted(set(schedule.full_steps)))


@pytest.mark.parametrize(
    ("interval", "full", "ratio"), [(7, 10, "5.00"), (8, 9, "5.56"), (10, 8, "6.25"), (1, 50, "1.00")]
)
def test_the_papers_ratios(interval: int, full: int, ratio: str) -> None:
    schedule = Schedule.uniform(50, interval)
    assert schedule.num_full == full
    assert f"{schedule.ratio:.2f}" == ratio
    assert str(schedule) == f"{full} full of 50: {ratio}x"


def test_by_hand() -> None:
    assert Schedule.uniform(50, 7).full_steps == (0, 1, 2, 3, 10, 17, 24, 31, 38, 45)
    assert Schedule.uniform(50, 10).full_steps == (0, 1, 2, 3, 13, 23, 33, 43)
    assert Schedule.uniform(10, 4, warmup_steps=1, cooldown_steps=2).full_steps == (0, 1, 5, 8, 9)
    assert Schedule.uniform(4, 9, warmup_steps=0).full_steps == (0,)
    assert picture(Schedule.uniform(12, 5)) == "####....#. .."


def test_plain_sampling_is_a_schedule() -> None:
    assert Schedule.uniform(1, 1).full_steps == (0,)
    assert Schedule.uniform(1, 1).predicted_steps == ()
    assert Schedule.uniform(9, 1, warmup_steps=0).full_steps == tuple(range(9))
    assert Schedule.uniform(5, 3, warmup_steps=40).predicted_steps == ()


def test_anchors_are_the_newest_full_steps() -> None:
    schedule = Schedule.uniform(50, 7)
    assert schedule.anchors(9, 3) == (3, 2, 1)
    assert schedule.anchors(10, 3) == (3, 2, 1)  # a full step looks back too, for the error meter
    assert schedule.anchors(11, 3) == (10, 3, 2)
    assert schedule.anchors(49, 2) == (45, 38)
    assert schedule.anchors(2, 4) == (1, 0)
    assert schedule.anchors(0, 4) == ()


def test_explicit_lists_keep_what_they_are_given() -> None:
    schedule = Schedule.explicit(6, [0, 1, 4])
    assert schedule.full_steps == (0, 1, 4) and schedule.predicted_steps == (2, 3, 5)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert schedule.digest() == Schedule.explicit(6, (0, 1, 4)).digest()
    assert schedule.digest() != Schedule.explicit(7, (0, 1, 4)).digest()
    assert schedule.digest() != Schedule.explicit(6, (0, 1, 5)).digest()


@pytest.mark.parametrize(
    ("steps", "full", "words"),
    [
        (0, (0,), "num_steps must be an integer of at least 1, got 0"),
        (True, (0,), "num_steps must be an integer"),
        (3.0, (0,), "num_steps must be an integer"),
        (4, (1, 2), "must contain step 0"),
        (4, (), "must contain step 0"),
        (4, (0, 2, 1), "increase without repeats"),
        (4, (0, 1, 1), "increase without repeats"),
        (4, (0, 4), r"\[4\] lie outside 0..3"),
        (4, (-1, 0), r"\[-1\] lie outside 0..3"),
        (4, (0, 1.0), "full_steps must be integers"),
        (4, (0, True), "full_steps must be integers"),
    ],
)
def test_refusals(steps: Any, full: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule.explicit(steps, full)


def test_every_problem_is_in_one_message() -> None:
    with pytest.raises(ValueError, match="num_steps.*interval.*warmup_steps.*cooldown_steps"):
        Schedule.uniform(0, 0, -1, -1)
    with pytest.raises(ValueError, match="repeats.*outside.*step 0"):
        Schedule.explicit(3, (2, 1, 9))
    for wrong in (1.0, "7", None, True):
        with pytest.raises(ValueError, match="interval must be an integer of at least 1"):
            Schedule.uniform(10, wrong)  # type: ignore[arg-type]


def test_a_history_that_is_too_long_names_the_step() -> None:
    schedule = Schedule.uniform(10, 4, warmup_steps=1)  # full 0 1 5 9
    stages = [0] * 6 + [1] * 4
    assert history_problems(schedule, (2, 3), stages) == []
    (problem,) = history_problems(schedule, (3, 3), stages)
    assert "history_size 3 of noise stage 0 needs 3 full steps before step 2" in problem
    assert "has 2: lower the history size or raise warmup_steps" in problem
    assert len(history_problems(schedule, (3, 4), stages)) == 2


def test_a_history_of_steps_counts_predictions() -> None:
    schedule = Schedule.explicit(10, (0, 1, 9))
    stages = [0] * 10
    assert history_problems(schedule, (2,), stages, "steps") == []
    (problem,) = history_problems(schedule, (4,), stages, "steps")
    assert "needs 4 steps before step 2" in problem and "has 2" in problem


@given(
    steps=st.integers(1, 120),
    full=st.sets(st.integers(1, 119), max_size=40),
    other=st.integers(1, 200),
)
def test_a_carried_schedule_keeps_its_ratio_and_leads_with_two(steps: int, full: set[int], other: int) -> None:
    schedule = Schedule.explicit(steps, sorted({0} | {step for step in full if step < steps}))
    carried = schedule.carried(other)
    assert carried.num_steps == other
    assert carried.full_steps[:2] == tuple(range(min(2, other)))
    wanted = other / schedule.ratio
    if 3 <= wanted <= other:
        assert abs(carried.num_full - wanted) <= 0.5
    else:
        assert carried.num_full == min(other, 3)
    if full and schedule.full_steps[:2] == (0, 1) and schedule.num_full >= 3:
        assert schedule.carried(steps) == schedule


@given(interval=st.integers(2, 10), times=st.integers(1, 5))
def test_places_along_the_run_are_kept(interval: int, times: int) -> None:
    """Carried to a multiple of its steps, a regular schedule stays regular, to within a step."""
    schedule = Schedule.explicit(12 * interval, (0, 1, *range(interval, 12 * interval, interval)))
    carried = schedule.carried(schedule.num_steps * times)
    gaps = [later - earlier for earlier, later in itertools.pairwise(carried.full_steps[2:])]
    assert max(gaps) - min(gaps) <= 2
    assert max(abs(gap - interval) for gap in gaps) <= 2


def test_carried_by_hand() -> None:
    searched = Schedule.explicit(50, (0, 1, 3, 7, 14, 21, 28, 34, 40, 45))
    assert searched.carried(100).num_full == 20
    assert searched.carried(20, least=6).num_full == 6 and searched.carried(4, least=6).num_full == 4
    assert searched.carried(20).full_steps == (0, 1, 6, 14)
    assert searched.carried(4).full_steps == (0, 1, 2) and searched.carried(2).full_steps == (0, 1)
    assert Schedule.uniform(50, 1).carried(20).predicted_steps == ()
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        searched.carried(0)


def test_a_step_exactly_at_a_boundary_is_in_the_noisier_stage() -> None:
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert stage_of_steps(levels, (0.75, 0.25)) == [0, 0, 1, 1]


def test_a_carried_schedule_keeps_as_many_full_steps_as_it_must() -> None:
    fast, slow = Schedule.explicit(50, (0, 1, 10, 20, 30, 40)), Schedule.uniform(50, 3)
    assert least_full([slow, fast]) == 6
    assert fast.carried(10, 6).num_full == 6 and fast.carried(10).num_full == 3 and fast.carried(4, 6).num_full == 4
