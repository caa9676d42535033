"""The optimiser loop both training steps share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lesa.params import PredictorParams
from lesa.training.expert import Expert
from lesa.training.loop import (
    FINAL_LEARNING_RATE,
    LoopSettings,
    Objective,
    TrainingError,
    batch_generator,
    fit,
    optimise,
)

K, C, S = 2, 3, 6
OFFSETS = torch.tensor([[0.1 * (i + 1), 0.1 * (i + 1) + 0.2] for i in range(S)])


def new_experts() -> nn.ModuleDict:
    params = PredictorParams(gate="table", projection="per_channel", history_sizes=(K,), boundaries=())
    expert = Expert(params, channels=C, history_size=K, offsets=OFFSETS, steps=range(S), num_steps=S, seed=0)
    return nn.ModuleDict({"expert": expert})


def loss_of(experts: nn.ModuleDict, generator: torch.Generator) -> torch.Tensor:
    features = torch.randn(K, 8, C, generator=generator)
    predicted = (
        experts["expert"].project(features.unbind()) * experts["expert"].alpha(OFFSETS, range(S)).mean()
    )
    return (predicted - (3 * features[0] + 1)).square().mean()


def settings(**changes: Any) -> LoopSettings:
    values: dict[str, Any] = {
        "iterations": 10,
        "learning_rate": 0.05,
        "gate_learning_rate": 0.02,
        "weight_decay": 0.0,
        "gradient_clip": 1.0,
        "step_learning_rate": 0.0,
        "checkpoint_every": 2,
        "seed": 3,
    }
    return LoopSettings(**(values | changes))


def run(
    folder: Path,
    *,
    loss: Callable[[nn.ModuleDict, torch.Generator], torch.Tensor] = loss_of,
    validation: Callable[[], float] | None = None,
    report: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    key: str = "key",
    **changes: Any,
) -> tuple[nn.ModuleDict, float]:
    experts = new_experts()

    @torch.no_grad()
    def validate() -> float:
        return float(loss_of(experts, torch.Generator().manual_seed(999)))

    best = optimise(
        experts,
        lambda generator: loss(experts, generator),
        validation or validate,
        settings=settings(**changes),
        folder=folder,
        key=key,
        report=report,
    )
    return experts, best


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 10))
def test_stopping_anywhere_changes_nothing(tmp_path: Path, at: int) -> None:
    whole, best = run(tmp_path / "whole")

    def stop(iteration: int, values: dict[str, float]) -> None:
        if iteration == at:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "parts", report=stop)
    seen: list[int] = []
    experts, again = run(tmp_path / "parts", report=lambda iteration, _: seen.append(iteration))
    assert seen == list(range(at // 2 * 2 + 1, 11))  # from the newest checkpoint on
    assert again == best
    for name, value in whole.state_dict().items():
        assert torch.equal(experts.state_dict()[name], value), name


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, best = run(tmp_path)
    seen: list[int] = []
    second, again = run(tmp_path, report=lambda iteration, _: seen.append(iteration))
    assert seen == [] and again == best
    assert all(torch.equal(second.state_dict()[n], v) for n, v in first.state_dict().items())


def test_other_settings_start_anew(tmp_path: Path) -> None:
    run(tmp_path, key="one")
    seen: list[int] = []
    run(tmp_path, key="two", report=lambda iteration, _: seen.append(iteration))
    assert seen == list(range(1, 11))


def test_the_lowest_validation_loss_wins_the_start_included(tmp_path: Path) -> None:
    losses = iter([1.0, 5.0, 0.5, 2.0, 7.0, 7.0])
    states: list[dict[str, torch.Tensor]] = []
    experts = new_experts()

    def validation() -> float:
        states.append({name: value.clone() for name, value in experts.state_dict().items()})
        return next(losses)

    best = optimise(
        experts,
        lambda generator: loss_of(experts, generator),
        validation,
        settings=settings(),
        folder=tmp_path / "a",
        key="key",
        report=lambda *_: None,
    )
    assert best == 0.5
    assert all(torch.equal(experts.state_dict()[n], v) for n, v in states[2].items())
    start = new_experts().state_dict()
    grows = itertools.count(1.0)
    experts, best = run(tmp_path / "b", validation=lambda: next(grows))
    assert best == 1.0
    assert all(torch.equal(experts.state_dict()[n], v) for n, v in start.items())


def test_training_lowers_the_loss_and_says_how_it_goes(tmp_path: Path) -> None:
    reports: list[tuple[int, dict[str, float]]] = []
    _, best = run(tmp_path, iterations=60, checkpoint_every=20, report=lambda i, v: reports.append((i, v)))
    assert [i for i, _ in reports] == list(range(1, 61))
    assert [i for i, v in reports if "validation_loss" in v] == [20, 40, 60]
    assert best < 0.5 * reports[0][1]["loss"]
    rates = [v["learning_rate"] for _, v in reports]
    assert rates[:3] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05])
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.05 * FINAL_LEARNING_RATE, rel=0.1)
    assert all(v["iterations_per_second"] > 0 and v["gradient_norm"] >= 0 for _, v in reports)


def test_no_iterations_leave_the_start(tmp_path: Path) -> None:
    experts, best = run(tmp_path, iterations=0)
    assert all(torch.equal(experts.state_dict()[n], v) for n, v in new_experts().state_dict().items())
    assert math.isfinite(best)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path, bad: float) -> None:
    calls = itertools.count()
    kept: list[nn.ModuleDict] = []

    def loss(experts: nn.ModuleDict, generator: torch.Generator) -> torch.Tensor:
        kept.append(experts)
        return loss_of(experts, generator) * (bad if next(calls) == 5 else 1.0)

    with pytest.raises(
        TrainingError, match="the loss at iteration 5 is not finite.*last checkpoint is intact"
    ):
        run(tmp_path, loss=loss)
    reached: list[dict[str, torch.Tensor]] = []

    def stop(iteration: int, values: dict[str, float]) -> None:
        if iteration == 5:
            raise Stop

    def spy(experts: nn.ModuleDict, generator: torch.Generator) -> torch.Tensor:
        reached[:] = [experts.state_dict()]
        return loss_of(experts, generator)

    with pytest.raises(Stop):
        run(tmp_path / "other", loss=spy, report=stop)
    assert all(torch.equal(kept[-1].state_dict()[n], v) for n, v in reached[0].items())
    whole, _ = run(tmp_path / "whole")
    resumed, _ = run(tmp_path)  # the checkpoint of iteration 4 is intact, and goes on
    assert all(torch.equal(resumed.state_dict()[n], v) for n, v in whole.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    def loss(experts: nn.ModuleDict, generator: torch.Generator) -> torch.Tensor:
        return (experts["expert"].projection.tensors()["bias"] * 0).sqrt().sum()  # 0 at a slope that is not finite

    with pytest.raises(TrainingError, match="the gradient at iteration 0 is not finite"):
        run(tmp_path, loss=loss)
    with pytest.raises(TrainingError, match="the gradient at iteration 0 is not finite"):
        run(tmp_path, loss=loss, gradient_clip=0.0)
    assert not list(tmp_path.glob("iteration-*"))


def test_a_validation_loss_that_is_not_finite_is_never_a_checkpoint(tmp_path: Path) -> None:
    losses = iter([1.0, 0.5, float("nan")])
    with pytest.raises(TrainingError, match="the validation loss at iteration 4 is not finite"):
        run(tmp_path, validation=lambda: next(losses))
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-00000002"]


def test_batches_depend_on_seed_and_iteration_alone() -> None:
    def drawn(seed: int, iteration: int) -> list[int]:
        return torch.randperm(1000, generator=batch_generator(seed, iteration)).tolist()

    assert drawn(1, 2) == drawn(1, 2)
    assert len({tuple(drawn(seed, iteration)) for seed in range(3) for iteration in range(3)}) == 9


class Numbers:
    """In the place of trajectories: the loss of each row."""

    def __init__(self, *losses: float) -> None:
        self.losses = losses


def fitted(folder: Path, **given: Any) -> tuple[dict[str, float], list[tuple[int, list[int]]], list[dict[str, float]]]:
    """`fit` on two cases, whose losses the experts shift by nothing; what was asked of the objective and reported."""
    experts = new_experts()
    bias = experts["expert"].projection.moved["channel"]
    cases: list[Any] = [
        SimpleNamespace(train=Numbers(1.0, 2.0, 3.0), validation=Numbers(4.0, 6.0, 100.0), judged=2),
        SimpleNamespace(train=Numbers(10.0, 20.0), validation=Numbers(20.0, 30.0), judged=2),
    ]
    asked: list[tuple[int, list[int]]] = []
    told: list[dict[str, float]] = []

    def loss(case: Any, data: Any, rows: list[int], _: torch.Generator | None) -> torch.Tensor:
        if torch.is_grad_enabled():
            assert data is case.train
            asked.append((cases.index(case), rows))
        else:
            assert data is case.validation
        return torch.tensor([data.losses[row] for row in rows]).mean() + bias.sum()

    every: Objective[Any] = Objective(loss, rows=lambda data: range(len(data.losses)))
    figures = fit(
        experts,
        cases[: given.pop("count", 2)],
        every,
        settings(iterations=12, checkpoint_every=6, learning_rate=0.0, gate_learning_rate=0.0),
        "key",
        folder=folder,
        report=lambda _, values: told.append(values),
        batch_size=2,
        **given,
    )
    return figures, asked, told


def test_each_step_is_a_batch_of_one_case_and_validation_the_mean_of_all(tmp_path: Path) -> None:
    figures, asked, told = fitted(tmp_path)
    assert figures == {"validation_loss_start": 15.0, "validation_loss": 15.0}  # of 5 and 25
    assert {place for place, _ in asked} == {0, 1}
    assert all(len(set(rows)) == 2 and max(rows) < (3, 2)[place] for place, rows in asked)
    means = [[1.0, 2.0, 3.0], [10.0, 20.0]]
    for (place, rows), values in zip(asked, told, strict=True):
        assert values["loss"] == sum(means[place][row] for row in rows) / 2
    again = fitted(tmp_path / "again")
    assert again[1] == asked  # drawn from the seed alone


def test_relative_losses_are_in_units_of_the_start_where_there_are_several(tmp_path: Path) -> None:
    figures, asked, told = fitted(tmp_path, relative=True)
    assert figures == {"validation_loss_start": 1.0, "validation_loss": 1.0}
    means = [[1.0, 2.0, 3.0], [10.0, 20.0]]
    for (place, rows), values in zip(asked, told, strict=True):
        assert values["loss"] == pytest.approx(sum(means[place][row] for row in rows) / 2 / (5.0, 25.0)[place])
    figures, _, _ = fitted(tmp_path / "one", relative=True, count=1)
    assert figures == {"validation_loss_start": 5.0, "validation_loss": 5.0}


def test_validation_may_judge_by_something_else_and_by_other_rows(tmp_path: Path) -> None:
    judge: Objective[Any] = Objective(
        lambda case, data, rows, _: torch.tensor([float(len(data.losses)) * row for row in rows]).mean(),
        rows=lambda data: [row for row in range(len(data.losses)) if row % 2],
    )
    figures, asked, _ = fitted(tmp_path, judge=judge)
    assert figures["validation_loss_start"] == 2.5  # row 1 of three, row 1 of two
    assert {row for _, rows in asked for row in rows} == {0, 1, 2}  # training goes by the objective's own rows


def test_batches_are_training_rows_and_validation_is_of_validation_rows(tmp_path: Path) -> None:
    """Each split's rows that count, and of validation no more than the case judges by."""
    asked: list[tuple[str, bool, list[int]]] = []
    experts = new_experts()
    case: Any = SimpleNamespace(train="train", validation="validation", judged=5)

    def loss(case: Any, data: Any, rows: list[int], _: torch.Generator | None) -> torch.Tensor:
        asked.append((data, torch.is_grad_enabled(), list(rows)))
        return loss_of(experts, torch.Generator().manual_seed(0))

    objective: Any = Objective(loss, rows=lambda data: {"train": [1, 3, 5, 7], "validation": [0, 2, 4, 6]}[data])
    fit(
        experts, [case], objective, settings(iterations=4), "key",
        batch_size=2, folder=tmp_path, report=lambda *_: None,
    )  # fmt: skip
    learned = [(data, rows) for data, grad, rows in asked if grad]
    judged = [(data, rows) for data, grad, rows in asked if not grad]
    assert len(learned) == 4 and {data for data, _ in learned} == {"train"}
    assert all(len(rows) == 2 and {*rows} < {1, 3, 5, 7} for _, rows in learned)
    assert {data for data, _ in judged} == {"validation"}
    assert [rows for _, rows in judged[:2]] == [[0, 2], [4]]
