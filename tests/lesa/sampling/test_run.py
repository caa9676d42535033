"""A run without hooks, pipeline or transformer: tensors in, decisions out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lesa.peers.rules import RULES
from lesa.predictor.rule import History, WithoutStages
from lesa.sampling.adaptive import Fallback
from lesa.sampling.run import Run
from lesa.schedule import Schedule


def feature(value: float, tokens: int = 1) -> torch.Tensor:
    return torch.full((1, tokens, 1), value)


@dataclasses.dataclass
class Told(WithoutStages):
    """Predicts the values it was told, and remembers what it was asked: branch, step, history."""

    values: dict[int, float]
    name: str = "told"
    history_size: int = 2
    keeps_predictions: bool = False
    asked: list[tuple[int, int, tuple[int, ...]]] = dataclasses.field(default_factory=list)

    def __call__(self, history: History, step: int) -> torch.Tensor:
        self.asked.append((history.branch, step, history.steps))
        return feature(self.values[step])


def drive(run: Run, features: dict[int, float], branches: tuple[str, ...] = ("only",)) -> list[list[float | None]]:
    """Every branch's prediction at every step; a branch's features are those of the first, ten times its index more."""
    predictions: list[list[float | None]] = [[] for _ in branches]
    for step, value in features.items():
        for index, branch in enumerate(branches):
            decision = run.decide(step, branch)
            full = decision.prediction is None
            run.keep(decision, feature(value + 10 * index) if full else None)
            predictions[index].append(None if full else float(decision.prediction))
    return predictions


def test_a_line_through_the_newest_full_steps() -> None:
    schedule = Schedule.explicit(6, (0, 1, 4))
    run = Run(schedule, RULES["taylor1"](schedule, torch.empty(0)))
    run.begin()
    assert drive(run, {0: 1.0, 1: 3.0, 2: 0.0, 3: 0.0, 4: 12.0, 5: 0.0}) == [[None, None, 5.0, 7.0, None, 15.0]]
    statistics = run.statistics
    assert [record.kind[0] for record in statistics.steps] == ["f", "f", "p", "p", "f", "p"]
    # The one feature at step 1, and the line at step 4: 1 predicted for 3, 9 for 12.
    assert [record.error for record in statistics.steps][1] == pytest.approx(2 / 3)
    assert [record.error for record in statistics.steps][4] == pytest.approx(1 / 4)
    assert statistics.finished and statistics.num_branches == 1 and statistics.peak_bytes == 3 * 4
    assert not list(run.held_tensors())  # nothing is predicted after the last step


def test_branches_are_numbered_in_the_order_of_their_first_calls() -> None:
    rule = Told({2: 1.0, 3: 2.0})
    run = Run(Schedule.explicit(4, (0, 1)), rule, measure=False)
    run.begin()
    drive(run, {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}, ("cond", "uncond"))
    assert rule.asked == [(branch, step, (1, 0)) for step in (2, 3) for branch in (0, 1)]
    assert run.statistics.num_branches == 2 and run.statistics.finished


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_an_unusable_prediction_is_a_full_step_outside_the_history(bad: float) -> None:
    for guard in (True, False):
        rule = Told({2: bad, 3: 1.0})
        run = Run(Schedule.explicit(4, (0, 1)), rule, measure=False, guard=guard)
        run.begin()
        ((*_, third, fourth),) = drive(run, {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0})
        assert (third is None) == guard and fourth == 1.0
        assert run.statistics.num_fallbacks == guard
        assert rule.asked[-1] == (0, 3, (1, 0))


def test_a_rule_may_look_back_on_its_own_predictions() -> None:
    rule = Told({1: 2.0, 2: 3.0}, keeps_predictions=True)
    run = Run(Schedule.explicit(3, (0,)), rule)
    run.begin()
    drive(run, {0: 1.0, 1: 0.0, 2: 0.0})
    assert [steps for _, _, steps in rule.asked] == [(0,), (1, 0)]


def test_a_late_start_is_full_until_its_history_is_in_the_run() -> None:
    schedule = Schedule.explicit(8, (0, 3, 4, 6))
    run = Run(schedule, RULES["taylor1"](schedule, torch.empty(0)), notes={"budget": "fast"})
    run.begin(2)
    drive(run, dict.fromkeys(range(2, 8), 1.0))
    assert [record.kind[0] for record in run.statistics.steps] == ["f", "f", "f", "p", "f", "p"]
    assert run.statistics.num_fallbacks == 0
    assert run.statistics.notes["budget"] == "fast" and run.statistics.notes["begins at"].startswith("step 2; full")


def test_a_late_start_wants_the_oldest_feature_of_its_history_too() -> None:
    """At step 4 the newest full step is in the run, the one before it is not."""
    rule = Told(dict.fromkeys(range(8), 1.0))
    run = Run(Schedule.explicit(8, (0, 3, 5)), rule)
    run.begin(2)
    drive(run, dict.fromkeys(range(2, 8), 1.0))
    assert [record.kind[0] for record in run.statistics.steps] == ["f", "f", "f", "f", "p", "p"]
    assert rule.asked == [(0, 6, (5, 3)), (0, 7, (5, 3))]
    assert run.statistics.steps[2].planned == "full" and "history" not in run.statistics.notes, "nothing is missing"


def test_tokens_beyond_the_image_s_are_not_kept() -> None:
    run = Run(Schedule.explicit(2, (0,)), RULES["reuse"](Schedule.explicit(2, (0,)), torch.empty(0)))
    run.begin(num_tokens=2)
    run.keep(run.decide(0, "only"), feature(1.0, tokens=5))
    prediction = run.decide(1, "only").prediction
    assert prediction is not None and prediction.shape == (1, 2, 1)
    assert run.statistics.peak_bytes == 2 * 4  # in storage of its own


def test_a_branch_that_begins_late_is_full_until_it_has_a_history() -> None:
    rule = Told(dict.fromkeys(range(6), 1.0))
    run = Run(Schedule.explicit(6, (0, 3)), rule, measure=False)
    run.begin()
    for step in range(6):
        for branch in ("cond", "uncond") if step else ("cond",):
            decision = run.decide(step, branch)
            run.keep(decision, None if decision.prediction is not None else feature(1.0))
            # "uncond" has nothing before step 3, and 3 alone of the two that a prediction looks back on afterwards.
            assert (decision.prediction is None) == (step in (0, 3) or branch == "uncond")
    assert [record.kind[0] for record in run.statistics.steps] == ["f"] * 6
    assert run.statistics.num_fallbacks == 4 and run.statistics.notes["history"].startswith("missing at step 1; ")
    assert run.statistics.finished


def test_a_broken_run_keeps_no_features() -> None:
    run = Run(Schedule.explicit(3, (0,)), Told({1: 1.0, 2: 1.0}))
    assert not run.is_under_way
    run.begin()
    run.keep(run.decide(0, "cond"), feature(1.0))
    assert list(run.held_tensors()) and run.is_under_way
    run.break_off()
    assert not list(run.held_tensors()) and not run.statistics.finished and not run.is_under_way


@pytest.mark.parametrize("name", ["reuse", "taylor1", "taylor2", "dmd"])
def test_a_run_that_lost_its_history_is_full_until_it_is_back(name: str) -> None:
    schedule = Schedule.explicit(9, (0, 1, 2, 5, 7))
    rule = RULES[name](schedule, torch.linspace(1, 0, 10))
    run = Run(schedule, rule)
    run.begin()
    size, kinds = rule.history_size, []
    held: list[int] = []
    for step in range(9):
        if step == 4:
            run.forget()  # as when another pipeline resets all hooks
            held = []
        decision = run.decide(step, "only")
        full = decision.prediction is None
        run.keep(decision, feature(1.0 + step) if full else None)
        needed = [s for s in schedule.full_steps if s < step][-size:]
        assert full == (schedule.is_full(step) or not set(needed) <= set(held))
        held += [step] if schedule.is_full(step) else []
        kinds.append(decision.record.kind != decision.record.planned)
    assert run.statistics.num_fallbacks == sum(kinds) > 0 and run.statistics.finished
    assert "step 4;" in run.statistics.notes["history"]


def test_a_rule_that_looks_back_on_its_predictions_waits_for_neighbouring_steps() -> None:
    run = Run(Schedule.explicit(7, (0, 1)), Told(dict.fromkeys(range(7), 1.0), keeps_predictions=True))
    run.begin()
    drive(run, dict.fromkeys(range(4), 1.0))
    run.forget()
    drive(run, dict.fromkeys(range(4, 7), 1.0))
    assert [record.kind[0] for record in run.statistics.steps] == list("ffppffp")


def test_branches_keep_their_numbers_when_features_are_forgotten() -> None:
    rule = Told(dict.fromkeys(range(5), 1.0))
    run = Run(Schedule.explicit(5, (0, 1, 2, 3)), rule, measure=False)
    run.begin()
    drive(run, {0: 1.0}, ("cond", "uncond"))
    run.keep(run.decide(1, "cond"), feature(1.0))
    run.forget()
    run.keep(run.decide(1, "uncond"), feature(1.0))
    drive(run, dict.fromkeys(range(2, 5), 1.0), ("cond", "uncond"))
    assert [(branch, step) for branch, step, _ in rule.asked] == [(0, 4), (1, 4)]
    assert run.statistics.num_branches == 2


def test_every_run_watches_anew_whether_to_change_over() -> None:
    own, slower = Schedule.explicit(6, (0, 2)), Schedule.explicit(6, (0, 1, 3, 5))
    fallback = Fallback(own, {2: 0.2}, slower, Told({3: 1.0, 4: 1.0, 5: 1.0}, history_size=3), "slow")
    for predicted, change in ((1.25, 3), (1.1, None)):
        run = Run(own, Told({1: 1.0, 2: predicted, 3: 1.0, 4: 1.0, 5: 1.0}), fallback=fallback)
        run.begin()
        features = dict.fromkeys(range(6), 1.0)
        drive(run, features)
        assert run.statistics.change == change
        assert (run.schedule is slower) == (change is not None)
        full = [record.step for record in run.statistics.steps if record.kind == "full"]
        assert full == ([0, 2] if change is None else [0, 2, 3, 5])
        assert ("changed over" in run.statistics.notes) == (change is not None)


def test_a_change_over_without_a_history_is_full_until_there_is_one() -> None:
    own, slower = Schedule.explicit(6, (0, 2)), Schedule.explicit(6, (0, 1, 3, 4))
    slow = Told(dict.fromkeys(range(6), 1.0))
    run = Run(own, Told(dict.fromkeys(range(6), 2.0)), fallback=Fallback(own, {2: 0.2}, slower, slow, "slow"))
    run.begin()
    drive(run, dict.fromkeys(range(3), 1.0))
    run.forget()
    drive(run, dict.fromkeys(range(3, 6), 1.0))
    assert run.statistics.change == 3
    assert [record.kind[0] for record in run.statistics.steps] == list("fpfffp")
    assert slow.asked[-1] == (0, 5, (4, 3))


def test_a_change_over_holds_for_all_branches() -> None:
    own, slower = Schedule.explicit(6, (0, 2)), Schedule.explicit(6, (0, 1, 3, 5))
    slow = Told(dict.fromkeys(range(6), 5.0), history_size=3)
    run = Run(own, Told(dict.fromkeys(range(6), 5.0)), fallback=Fallback(own, {2: 0.2}, slower, slow, "slow"))
    run.begin()
    first, second = drive(run, dict.fromkeys(range(6), 5.0), ("cond", "uncond"))  # 5 predicted of 15 at step 2
    assert first == second == [None, 5.0, None, None, 5.0, None]
    assert run.statistics.change == 3
    assert [asked for asked in slow.asked if asked[1] == 4] == [(0, 4, (3, 1, 0)), (1, 4, (3, 1, 0))]


def test_a_fallback_of_any_branch_makes_the_step_a_counted_one() -> None:
    """The first branch is predicted well; what it did at the step is told first."""

    class Second(Told):
        def __call__(self, history: History, step: int) -> torch.Tensor:
            return super().__call__(history, step) * (float("nan") if history.branch == 1 and step == 2 else 1.0)

    run = Run(Schedule.explicit(4, (0, 1)), Second({2: 1.0, 3: 1.0}), measure=False)
    run.begin()
    first, second = drive(run, dict.fromkeys(range(4), 1.0), ("cond", "uncond"))
    assert (first[2], second[2]) == (1.0, None) and run.statistics.num_fallbacks == 1
    assert [record.kind for record in run.statistics.steps] == ["full", "full", "full", "predicted"]


def test_a_jump_is_told_from_the_newest_feature() -> None:
    """What is plausible after a loud feature was a jump from the quiet one before it."""
    rule = Told({1: 1.0, 3: 1500.0})
    run = Run(Schedule.explicit(4, (0, 2)), rule, measure=False)
    run.begin()
    assert drive(run, {0: 1.0, 1: 0.0, 2: 1000.0, 3: 0.0}) == [[None, 1.0, None, 1500.0]]


def test_the_worst_sample_raises_the_alarm() -> None:
    own, slower = Schedule.explicit(6, (0, 2)), Schedule.explicit(6, (0, 1, 3, 5))
    predicted = torch.tensor([[[1.0]], [[1.5]]])  # of one sample right, of the other half as much again

    class Two(Told):
        def __call__(self, history: History, step: int) -> torch.Tensor:
            return predicted

    run = Run(own, Two({}), fallback=Fallback(own, {2: 0.3}, slower, Two({}, history_size=3), "slow"))
    run.begin()
    for step in range(6):
        decision = run.decide(step, "only")
        run.keep(decision, torch.ones(2, 1, 1) if decision.prediction is None else None)
    assert run.statistics.change == 3
    assert not list(run.held_tensors()), "what was kept for the change goes too"


@pytest.mark.parametrize("predicted", [1.0, 2.0])
def test_nothing_is_kept_after_a_run_that_might_have_changed_over(predicted: float) -> None:
    own, slower = Schedule.explicit(6, (0, 2)), Schedule.explicit(6, (0, 1, 3, 5))
    told = Told(dict.fromkeys(range(6), predicted))
    run = Run(own, told, fallback=Fallback(own, {2: 0.2}, slower, Told(dict.fromkeys(range(6), 1.0)), "slow"))
    run.begin()
    drive(run, dict.fromkeys(range(6), 1.0))
    assert (run.statistics.change is None) == (predicted == 1.0)
    assert not list(run.held_tensors()) and run.statistics.finished


def test_the_peak_is_that_of_the_whole_run() -> None:
    """At the last step one branch's features are gone before the other's are counted."""
    run = Run(Schedule.explicit(3, (0, 1)), Told({2: 1.0}), measure=False)
    run.begin()
    drive(run, dict.fromkeys(range(3), 1.0), ("cond", "uncond"))
    assert run.statistics.peak_bytes == 4 * 4  # two branches, two features of one float32 number
