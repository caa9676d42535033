"""Training-free rules that stand in for the transformer's blocks: one function each, one call for all.

A rule is bound to a schedule and its noise levels and then called with the history and the step to predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from lesa.history import History
from lesa.schedule import Schedule


class Rule(Protocol):
    """Anything that predicts a feature from cached ones."""

    @property
    def name(self) -> str: ...

    @property
    def history_size(self) -> int:
        """Features it needs at most."""
        ...

    @property
    def keeps_predictions(self) -> bool:
        """Whether its own predictions enter the history."""
        ...

    def __call__(self, history: History, step: int) -> torch.Tensor:
        """The feature [B, L, C] at `step`; history features are left unmodified."""
        ...


RuleFactory = Callable[[Schedule, torch.Tensor], Rule]


@dataclass(frozen=True)
class Reuse:
    """The newest cached feature as it is."""

    name: str = "reuse"
    history_size: int = 1
    keeps_predictions: bool = False

    def __call__(self, history: History, step: int) -> torch.Tensor:
        return history.features[0]


@dataclass(frozen=True)
class Taylor:
    """TaylorSeer (arXiv 2503.06923): sum of `D_i x^i / i!`, x the distance in steps from the newest full step.

    `D_i` are the finite differences TaylorSeer accumulates: `D_{i+1} = (D_i - D_i of the full step before) / gap`
    with the gap between the two newest full steps at every order.
    """

    order: int
    name: str
    history_size: int
    keeps_predictions: bool = False

    def __call__(self, history: History, step: int) -> torch.Tensor:
        distance = step - history.steps[0]
        prediction = history.features[0]
        scale = 1.0
        for order in range(1, min(self.order, len(history.features) - 1) + 1):
            scale *= distance / order
            prediction = torch.add(prediction, self._difference(history, order), alpha=scale)
        return prediction

    def _difference(self, history: History, order: int) -> torch.Tensor:
        if order not in history.memo:
            history.memo[order] = taylor_difference(history.features, history.steps, order)
        return history.memo[order]


def taylor_difference(
    features: tuple[torch.Tensor, ...], steps: tuple[int, ...], order: int
) -> torch.Tensor:
    """`D_order` at the newest of `features` (newest first), as TaylorSeer accumulates it."""
    if order == 0:
        return features[0]
    newer = taylor_difference(features, steps, order - 1)
    older = taylor_difference(features[1:], steps[1:], order - 1)
    return (newer - older) / (steps[0] - steps[1])


def reuse(schedule: Schedule, sigmas: torch.Tensor) -> Rule:
    return Reuse()


def taylor(schedule: Schedule, sigmas: torch.Tensor, *, order: int) -> Rule:
    return Taylor(order=order, name=f"taylor{order}", history_size=order + 1)


RULES: dict[str, RuleFactory] = {
    "reuse": reuse,
    "taylor1": partial(taylor, order=1),
    "taylor2": partial(taylor, order=2),
}
