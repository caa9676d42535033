"""Everything that is compared, in one form: a name and a way to put it on a pipeline and take it off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig

from lesa.dmd import DMD, FEWEST, equally_spaced
from lesa.flops import ModelFlops, predictor_flops, taylor_flops
from lesa.forecast import LABELS, RULES, Rule, RuleFactory, Taylor, Weighted
from lesa.hook import LesaCacheConfig, apply_lesa_cache, remove_lesa_cache
from lesa.params import CallParams
from lesa.predictor import Predictor
from lesa.schedule import Schedule
from lesa.solvers import SOLVERS, even_grid, solver

Using = Callable[[Any, torch.Tensor], AbstractContextManager[None]]  # (pipe, sigmas [S + 1] of the plain run)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to sample with fewer evaluations."""

    name: str  # key in tables and files
    label: str  # for people
    budget: str  # which budget it is compared at
    kind: Literal["lesa", "rule", "solver", "cache"]
    using: Using = field(repr=False)
    num_steps: int  # sampler steps of its run
    schedule: Schedule | None = None  # full steps, where they are fixed and on the plain run's steps
    leading_blocks: int = 0  # first blocks that run at every step, computed or not
    trailing_blocks: int = 0  # last ones, likewise
    held: Callable[[Any], Any] | None = field(default=None, repr=False)  # of the pipeline: see `lesa.probe.probe`
    own_flops: Callable[[ModelFlops, torch.Tensor], float] = field(
        default=lambda model, sigmas: 0.0, repr=False
    )
    predictor: Predictor | None = field(default=None, repr=False)  # of kind "lesa"
    settings: Mapping[str, Any] = field(default_factory=dict)  # shown in the table

    @property
    def same_steps(self) -> bool:
        """Whether its features can be compared with the plain run's, step by step."""
        return self.kind != "solver"

    def call(self, call: CallParams) -> CallParams:
        """The pipeline call of this method: plain Euler asks for fewer steps, all others as the plain run."""
        if self.kind == "solver" and "grid" not in self.settings:
            return dataclasses.replace(call, num_inference_steps=self.num_steps)
        return call

    def flops(self, model: ModelFlops, computed: float, sigmas: torch.Tensor) -> float:
        """Operations a sample and branch of a run with `computed` full steps (a mean for adaptive caches)."""
        always = model.blocks[: self.leading_blocks] + model.blocks[len(model.blocks) - self.trailing_blocks :]
        skipped = model.ends + sum(always)
        return computed * model.total + (self.num_steps - computed) * skipped + self.own_flops(model, sigmas)


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
    """A training-free rule of `lesa.forecast.RULES` through our hook.

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
        raise ValueError(f"{rule!r} is not a rule; known: {', '.join(RULES)}")
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
        own_flops: operations of the rule in one run; None reads them off the rules of `lesa.forecast`.
    """

    def operations(model: ModelFlops, sigmas: torch.Tensor) -> float:
        return rule_flops(factory(schedule, sigmas), schedule, model)

    return Method(
        name=name,
        label=label,
        budget=budget,
        kind="rule",
        using=lambda pipe, sigmas: _hooked(pipe, schedule, factory, sigmas),
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


def lesa_method(
    budget: str, predictor: Predictor, schedule: Schedule, *, name: str = "lesa", label: str = "LESA"
) -> Method:
    """A learned predictor through our hook."""

    def using(pipe: Any, sigmas: torch.Tensor) -> AbstractContextManager[None]:
        weights = pipe.transformer

        def factory(schedule: Schedule, sigmas: torch.Tensor) -> Any:
            return predictor.bind(schedule, sigmas, device=weights.device, dtype=weights.dtype)

        return _hooked(pipe, schedule, factory, sigmas)

    return Method(
        name=name,
        label=label,
        budget=budget,
        kind="lesa",
        using=using,
        num_steps=schedule.num_steps,
        schedule=schedule,
        own_flops=lambda model, sigmas: predictor_flops(
            predictor.spec, schedule, sigmas, tokens=model.tokens
        ),
        predictor=predictor,
        settings={"full_steps": list(schedule.full_steps)},
    )


def euler_method(budget: str, num_evaluations: int) -> Method:
    """The pipeline's own scheduler with fewer steps."""
    return Method(
        name="euler",
        label="fewer Euler steps",
        budget=budget,
        kind="solver",
        using=lambda pipe, sigmas: _as_it_is(),
        num_steps=num_evaluations,
        settings={"num_inference_steps": num_evaluations},
    )


def solver_method(
    solver_name: str,
    budget: str,
    num_steps: int,
    num_evaluations: int,
    *,
    grid: Sequence[int] | None = None,
    name: str | None = None,
    label: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Method:
    """A solver of `lesa.solvers.SOLVERS` on even steps of the plain run's `num_steps`, or on a grid that is given."""
    if solver_name not in SOLVERS:
        raise ValueError(f"{solver_name!r} is not a solver; known: {', '.join(SOLVERS)}")
    row = SOLVERS[solver_name]
    steps = tuple(grid) if grid is not None else even_grid(num_steps, row.grid_size(num_evaluations))
    return Method(
        name=name or solver_name,
        label=label or row.label,
        budget=budget,
        kind="solver",
        using=lambda pipe, sigmas: solver(pipe, steps, solver_name, num_evaluations),
        num_steps=num_evaluations,
        settings={"grid": list(steps), "solver": solver_name, **(notes or {})},
    )


def diffusers_cache_method(
    budget: str,
    num_steps: int,
    config: Callable[[], Any],
    *,
    name: str,
    label: str,
    leading_blocks: int = 0,
    settings: Mapping[str, Any],
) -> Method:
    """One of diffusers' own caches; `config` makes a fresh configuration each time it is put on."""
    return Method(
        name=name,
        label=label,
        budget=budget,
        kind="cache",
        using=lambda pipe, sigmas: _diffusers_cache(pipe, config),
        num_steps=num_steps,
        leading_blocks=leading_blocks,
        settings=settings,
    )


def first_block_method(budget: str, num_steps: int, threshold: float) -> Method:
    """diffusers' FirstBlockCache: the first block runs at every step and tells whether the others must."""
    return diffusers_cache_method(
        budget,
        num_steps,
        lambda: FirstBlockCacheConfig(threshold=threshold),
        name="first_block_cache",
        label="FirstBlockCache",
        leading_blocks=1,
        settings={"threshold": threshold},
    )


def mag_cache_method(
    budget: str,
    num_steps: int,
    ratios: Sequence[float],
    *,
    threshold: float,
    retention_steps: int,
    max_skip_steps: int,
) -> Method:
    """diffusers' MagCache with magnitude ratios calibrated on this model."""

    def config() -> MagCacheConfig:
        return MagCacheConfig(
            threshold=threshold,
            max_skip_steps=max_skip_steps,
            retention_ratio=retention_steps / num_steps,
            num_inference_steps=num_steps,
            mag_ratios=list(ratios),
        )

    return diffusers_cache_method(
        budget,
        num_steps,
        config,
        name="mag_cache",
        label="MagCache",
        settings={
            "threshold": threshold,
            "retention_steps": retention_steps,
            "max_skip_steps": max_skip_steps,
        },
    )


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _hooked(pipe: Any, schedule: Schedule, factory: RuleFactory, sigmas: torch.Tensor) -> Iterator[None]:
    # Without the error meter, which no peer has: it costs one prediction a full step.
    config = LesaCacheConfig(
        schedule=schedule, rule=factory(schedule, sigmas), scheduler=pipe.scheduler, measure=False
    )
    apply_lesa_cache(pipe.transformer, config)
    try:
        yield
    finally:
        remove_lesa_cache(pipe.transformer)


@contextmanager
def _diffusers_cache(pipe: Any, config: Callable[[], Any]) -> Iterator[None]:
    pipe.transformer.enable_cache(config())
    try:
        yield
    finally:
        pipe.transformer.disable_cache()
