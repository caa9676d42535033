"""Run, step and branch of a call, from a scheduler and from a list of timesteps."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lesa.sampling.clock import ForeignCallError, SchedulerClock, Tick, TimestepClock


def stepped(scheduler: FlowMatchEulerDiscreteScheduler, index: int) -> None:
    sample = torch.zeros(1, 2)
    scheduler.step(sample, scheduler.timesteps[index], sample)


def started(num_steps: int = 4) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    return scheduler


def test_steps_follow_the_scheduler_and_a_new_run_follows_set_timesteps():
    scheduler = started()
    clock = SchedulerClock(scheduler)
    assert clock.num_steps == 4
    assert clock.tick("cond", None) == Tick(True, 0, "cond")
    stepped(scheduler, 0)
    assert clock.tick("cond", None) == Tick(False, 1, "cond")
    scheduler.set_timesteps(4)  # the run was broken off; its step would have been 1 again
    assert clock.tick("cond", None) == Tick(True, 0, "cond")


def test_a_call_of_another_pipeline_is_refused_and_leaves_no_trace():
    scheduler = started()
    clock = SchedulerClock(scheduler, timestep_factor=0.5)
    levels = scheduler.timesteps / 2
    clock.tick("cond", levels[:1])
    with pytest.raises(ValueError, match="not the one that steps"):  # at one step both have one timestep
        clock.tick("cond", levels[:1])
    stepped(scheduler, 0)
    with pytest.raises(ForeignCallError, match=r"its timestep is 500, the scheduler that LESA watches is at 333\.5"):
        clock.tick("cond", levels[:1])
    assert clock.tick("cond", levels[1:2].to(torch.bfloat16)) == Tick(False, 1, "cond")
    for index in range(1, 4):
        stepped(scheduler, index)
    with pytest.raises(ForeignCallError, match="another pipeline is running on this transformer .* done its last step"):
        clock.tick("cond", levels[:1])


def test_timesteps_that_are_not_the_scheduler_s_from_the_start_tell_nothing():
    scheduler = started()
    clock = SchedulerClock(scheduler)
    clock.tick("cond", torch.tensor([3.0]))
    stepped(scheduler, 0)
    assert clock.tick("cond", torch.tensor([2.0])) == Tick(False, 1, "cond")


def test_a_second_call_of_a_step_without_a_context_is_the_next_branch():
    scheduler = started()
    clock = SchedulerClock(scheduler)
    assert [clock.tick(None, None).branch for _ in range(2)] == ["#0", "#1"]
    stepped(scheduler, 0)
    assert [clock.tick(None, None) for _ in range(2)] == [Tick(False, 1, "#0"), Tick(False, 1, "#1")]


def test_a_scheduler_that_does_not_advance_is_refused():
    clock = SchedulerClock(started())
    clock.tick("cond", None)
    with pytest.raises(ValueError, match="not the one that steps"):
        clock.tick("cond", None)
    clock = SchedulerClock(started())
    clock.tick(None, None)
    clock.tick(None, None)
    with pytest.raises(ValueError, match="not the one that steps"):
        clock.tick(None, None)


def test_the_number_of_branches_is_held_to():
    clock = SchedulerClock(started(), num_branches=1)
    clock.tick("cond", None)
    with pytest.raises(ValueError, match="guidance branches"):
        clock.tick("uncond", None)
    scheduler = started()
    clock = SchedulerClock(scheduler, num_branches=2)
    clock.tick("cond", None)
    stepped(scheduler, 0)
    with pytest.raises(ValueError, match=r"called 1 time\(s\) at step 0, expected 2"):
        clock.tick("cond", None)


def test_the_scheduler_may_be_looked_up_and_may_change():
    first, second = started(4), started(6)
    current = [first]
    clock = SchedulerClock(lambda: current[0])
    assert clock.tick("cond", None).new_run
    current[0] = second
    assert clock.tick("cond", None) == Tick(True, 0, "cond")
    assert clock.num_steps == 6
    current[0] = None  # what a weak reference gives when the pipeline is gone
    with pytest.raises(ValueError, match="is gone"):
        clock.tick("cond", None)


def test_a_scheduler_without_a_step_is_refused():
    with pytest.raises(ValueError, match="no step_index"):
        SchedulerClock(object())


def test_equal_timesteps_are_counted():
    """In bfloat16, 998 and 1000 are the same number; so would a value-based step be."""
    values = torch.tensor([1000.0, 998.0, 996.0, 500.0]).to(torch.bfloat16)
    assert values[0] == values[1]
    clock = TimestepClock([1000.0, 998.0, 996.0, 500.0])
    ticks = [clock.tick(None, value) for value in values]
    assert [tick.step for tick in ticks] == [0, 1, 2, 3]
    assert [tick.new_run for tick in ticks] == [True, False, False, False]
    assert clock.tick(None, values[0]) == Tick(True, 0, "#0")


def test_counting_with_two_branches_and_with_contexts():
    clock = TimestepClock([9.0, 5.0], num_branches=2)
    ticks = [clock.tick(None, value) for value in (9.0, 9.0, 5.0, 5.0, 9.0)]
    assert [(tick.step, tick.branch) for tick in ticks] == [
        (0, "#0"),
        (0, "#1"),
        (1, "#0"),
        (1, "#1"),
        (0, "#0"),
    ]
    clock = TimestepClock([9.0, 5.0])
    ticks = [
        clock.tick(name, value)
        for name, value in (("cond", 9.0), ("uncond", 9.0), ("cond", 5.0), ("uncond", 5.0), ("cond", 9.0))
    ]
    assert [(tick.step, tick.branch, tick.new_run) for tick in ticks] == [
        (0, "cond", True),
        (0, "uncond", False),
        (1, "cond", False),
        (1, "uncond", False),
        (0, "cond", True),
    ]


def test_a_broken_run_is_noticed_by_its_values():
    clock = TimestepClock([9.0, 7.0, 5.0])
    clock.tick(None, torch.tensor([9.0, 9.0]))
    clock.tick(None, 7.0)
    assert clock.tick(None, 9.0) == Tick(True, 0, "#0")
    with pytest.raises(ValueError, match=r"timestep 3 where 7 \(step 1\)"):
        clock.tick(None, 3.0)
    with pytest.raises(ValueError, match="without `timestep`"):
        clock.tick(None, None)


def test_after_a_failure_a_new_run_starts():
    clock = TimestepClock([9.0, 9.0])
    clock.tick(None, 9.0)
    clock.fail()
    assert clock.tick(None, 9.0) == Tick(True, 0, "#0")
