"""Training-free rules that stand in for the transformer's blocks: one function each, one call for all.

A rule is bound to a schedule and its noise levels and then called with the history and the step to predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from lesa.errors import LesaError
from lesa.models.flops import ModelFlops, taylor_flops
from lesa.peers.dmd import DMD, FEWEST, equally_spaced
from lesa.peers.method import Method, hooked
from lesa.predictor.rule import History, MemoKey, Rule, RuleFactory, WithoutStages
from lesa.schedule import Schedule


def rule_method(
    rule: str,
    budget: str,
    schedule: Schedule,
    *,
    name: str | None = None,
    label: str | None = None,
    options: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Method:
    """A training-free rule of `lesa.peers.rules.RULES` through our hook.

    Args:
        rule: its name.
        budget: which budget it is compared at.
        schedule: its full steps.
        name: key of the row; None is the rule's.
        label: for people; None is the table's.
        options: settings of the rule instead of the table's, e.g. another contraction.
        notes: further settings to show, e.g. what a search saw.
    """
    if rule not in RULES:
        raise LesaError(f"{rule!r} is not a rule; known: {', '.join(RULES)}")
    factory = partial(RULES[rule], **(options or {}))
    return hooked_method(
        name or rule,
        label or LABELS[rule],
        budget,
        schedule,
        factory,
        settings={**(options or {}), **(notes or {})},
    )


def hooked_method(
    name: str,
    label: str,
    budget: str,
    schedule: Schedule,
    factory: RuleFactory,
    *,
    settings: Mapping[str, Any] | None = None,
    own_flops: Callable[[ModelFlops, torch.Tensor], float] | None = None,
) -> Method:
    """Anything that predicts features, through our hook, at equal full steps.

    Args:
        factory: binds the rule to a schedule and its noise levels.
        own_flops: operations of the rule in one run; None reads them off the rules of `lesa.peers.rules`.
    """

    def operations(model: ModelFlops, sigmas: torch.Tensor) -> float:
        return rule_flops(factory(schedule, sigmas), schedule, model)

    return Method(
        name=name,
        label=label,
        budget=budget,
        kind="rule",
        using=lambda pipe, sigmas: hooked(pipe, schedule, factory, sigmas),
        num_steps=schedule.num_steps,
        schedule=schedule,
        own_flops=own_flops or operations,
        settings={"full_steps": list(schedule.full_steps), **(settings or {})},
    )


def rule_flops(rule: Rule, schedule: Schedule, model: ModelFlops) -> float:
    """Operations of a training-free rule in one run, for one sample and one branch."""
    if isinstance(rule, Taylor):
        return taylor_flops(rule.order, schedule, tokens=model.tokens, channels=model.channels)
    if isinstance(rule, Weighted):
        size, kept = rule.history_size, rule.keeps_predictions
        terms = sum(min(step, size) if kept else len(schedule.anchors(step, size)) for step in schedule.predicted_steps)
        return 2.0 * terms * model.tokens * model.channels
    if isinstance(rule, DMD):
        spaced = {step: equally_spaced(schedule.anchors(step, rule.history_size)) for step in schedule.predicted_steps}
        by_anchor = {schedule.anchors(step, 1)[0]: count for step, count in spaced.items()}
        products = sum(count * (count + 1) / 2 for count in by_anchor.values() if count >= FEWEST)
        terms = sum(count - 1 for count in spaced.values())  # two equally spaced steps, as any two are: a line
        return 2.0 * (products + terms) * model.tokens * model.channels
    return 0.0


@dataclass(frozen=True)
class Reuse(WithoutStages):
    """The newest cached feature as it is."""

    name: str = "reuse"
    history_size: int = 1
    keeps_predictions: bool = False

    def __call__(self, history: History, step: int) -> torch.Tensor:
        return history.features[0]


@dataclass(frozen=True)
class Taylor(WithoutStages):
    """TaylorSeer (arXiv 2503.06923): sum of `D_i x^i / i!`, x the distance from the newest full step.

    `D_i` are the finite differences TaylorSeer accumulates: `D_{i+1} = (D_i - D_i of the full step before) / gap`
    with the gap between the two newest full steps at every order.

    With a `contraction` c the monomials become HiCache's (arXiv 2508.16984): `c^i H_i(c x) / i!` with the
    physicists' Hermite polynomials H. Its first order is Taylor's times 2 c^2, so that c below 0.71 damps it.
    """

    order: int
    name: str
    history_size: int
    keeps_predictions: bool = False
    positions: tuple[float, ...] | None = None  # where each step lies; None: steps count one each
    contraction: float | None = None  # HiCache's sigma; None: Taylor

    def __call__(self, history: History, step: int) -> torch.Tensor:
        distance = self._position(step) - self._position(history.steps[0])
        prediction = history.features[0]
        for order in range(1, min(self.order, len(history.features) - 1) + 1):
            scale = self.basis(order, distance)
            prediction = torch.add(prediction, self._difference(history, order), alpha=scale)
        return prediction

    def basis(self, order: int, distance: float) -> float:
        """What `D_order` is multiplied with at a distance."""
        if self.contraction is None:
            return distance**order / math.factorial(order)
        return self.contraction**order * hermite(order, self.contraction * distance) / math.factorial(order)

    def _position(self, step: int) -> float:
        return step if self.positions is None else self.positions[step]

    def _difference(self, history: History, order: int) -> torch.Tensor:
        key: MemoKey = ("taylor", order)
        if key not in history.memo:
            places = tuple(self._position(step) for step in history.steps)
            history.memo[key] = taylor_difference(history.features, places, order)
        return history.memo[key]


def taylor_difference(
    features: tuple[torch.Tensor, ...], places: tuple[float, ...], order: int
) -> torch.Tensor:
    """`D_order` at the newest of `features` (newest first), as TaylorSeer accumulates it."""
    if order == 0:
        return features[0]
    newer = taylor_difference(features, places, order - 1)
    older = taylor_difference(features[1:], places[1:], order - 1)
    return (newer - older) / (places[0] - places[1])


def hermite(order: int, x: float) -> float:
    """Physicists' Hermite polynomial: H_0 = 1, H_1 = 2x, H_{n+1} = 2x H_n - 2n H_{n-1}."""
    before, value = 0.0, 1.0
    for n in range(order):
        before, value = value, 2 * x * value - 2 * n * before
    return value


Weights = Callable[[tuple[int, ...], int], Sequence[float]]  # (steps in the history, step) -> one a feature


@dataclass(frozen=True)
class Weighted(WithoutStages):
    """A sum of the cached features with scalar weights that only the steps decide."""

    weights: Weights = field(repr=False)
    name: str
    history_size: int
    keeps_predictions: bool = False

    def __call__(self, history: History, step: int) -> torch.Tensor:
        weights = self.weights(history.steps, step)
        newest = history.features[0]
        # In float32: weights of either sign cancel, and what is left would drown in the rounding of bfloat16.
        total = newest.float() * weights[0]
        for feature, weight in zip(history.features[1:], weights[1:], strict=True):
            total = torch.add(total, feature.float(), alpha=weight)
        return total.to(newest.dtype)


def chebyshev_weights(
    steps: tuple[int, ...], step: int, *, num_steps: int, degree: int, ridge: float, blend: float
) -> list[float]:
    """Spectrum's forecast (arXiv 2603.01623) as weights of the cached features, newest first.

    Every channel is fitted by `sum_m c_m T_m(tau)`, tau the step mapped from 0..num_steps to -1..1, with ridge
    regression `c = (X^T X + ridge I)^-1 X^T H`; the forecast is that series at `step`, mixed with the line
    through the two newest features: `blend` of the first, the rest of the second.
    """
    x = chebyshev(torch.tensor([*steps, step], dtype=torch.float64) * (2.0 / num_steps) - 1.0, degree)
    design, at = x[:-1], x[-1]
    gram = design.T @ design + ridge * torch.eye(degree + 1, dtype=torch.float64)
    fitted = (design @ torch.linalg.solve(gram, at)).tolist()
    line = [0.0] * len(steps)
    along = (step - steps[0]) / (steps[0] - steps[1]) if len(steps) > 1 else 0.0
    line[0] = 1.0 + along
    if len(steps) > 1:
        line[1] = -along
    return [blend * a + (1.0 - blend) * b for a, b in zip(fitted, line, strict=True)]


def chebyshev(x: torch.Tensor, degree: int) -> torch.Tensor:
    """[N, degree + 1] of T_0 .. T_degree at the points x [N] in -1..1."""
    columns = [torch.ones_like(x), x]
    for _ in range(2, degree + 1):
        columns.append(2 * x * columns[-1] - columns[-2])
    return torch.stack(columns[: degree + 1], dim=1)


def reuse(schedule: Schedule, sigmas: torch.Tensor) -> Rule:
    return Reuse()


def taylor(schedule: Schedule, sigmas: torch.Tensor, *, order: int) -> Rule:
    return Taylor(order=order, name=f"taylor{order}", history_size=order + 1)


def taylor_sigma(schedule: Schedule, sigmas: torch.Tensor, *, order: int) -> Rule:
    """Taylor with distances in noise level instead of steps: a shifted schedule makes them differ."""
    positions = tuple(sigmas.tolist())
    return Taylor(order=order, name=f"taylor{order}_sigma", history_size=order + 1, positions=positions)


def hicache(
    schedule: Schedule, sigmas: torch.Tensor, *, order: int, contraction: float, name: str = "hicache"
) -> Rule:
    """HiCache; the paper's order is 2, its contraction lies between 0.5 and 0.7 (tuned for each model)."""
    return Taylor(order=order, name=name, history_size=order + 1, contraction=contraction)


def spectrum(
    schedule: Schedule,
    sigmas: torch.Tensor,
    *,
    degree: int = 4,
    ridge: float = 0.1,
    window: int = 10,
    blend: float,
    name: str = "spectrum",
) -> Rule:
    """Spectrum; degree, ridge and window as its authors set them for FLUX."""
    settings: dict[str, Any] = {"degree": degree, "ridge": ridge, "blend": blend}
    settings["num_steps"] = schedule.num_steps
    return Weighted(cache(partial(chebyshev_weights, **settings)), name, history_size=window)


def dmd(schedule: Schedule, sigmas: torch.Tensor, *, rank: int = 5, history: int = 6) -> Rule:
    """Dynamic mode decomposition of the newest `history` features, of `rank` modes at most."""
    return DMD(rank=rank, history_size=history)


RULES: dict[str, RuleFactory] = {
    "reuse": reuse,
    "taylor1": partial(taylor, order=1),
    "taylor2": partial(taylor, order=2),
    "taylor1_sigma": partial(taylor_sigma, order=1),
    "taylor2_sigma": partial(taylor_sigma, order=2),
    "hicache": partial(hicache, order=2, contraction=0.5, name="hicache"),
    "hicache_07": partial(hicache, order=2, contraction=0.7, name="hicache_07"),
    "spectrum": partial(spectrum, blend=1.0, name="spectrum"),
    "spectrum_blend": partial(spectrum, blend=0.5, name="spectrum_blend"),
    "dmd": dmd,
}
LABELS = {
    "reuse": "reuse",
    "taylor1": "TaylorSeer, order 1",
    "taylor2": "TaylorSeer, order 2",
    "taylor1_sigma": "Taylor in sigma, order 1",
    "taylor2_sigma": "Taylor in sigma, order 2",
    "hicache": "HiCache, order 2, contraction 0.5",
    "hicache_07": "HiCache, order 2, contraction 0.7",
    "spectrum": "Spectrum (Chebyshev)",
    "spectrum_blend": "Spectrum, half Chebyshev, half line",
    "dmd": "dynamic mode decomposition",
}
