"""Everything that is compared, in one form: a name and a way to put it on a pipeline and take it off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lesa.models.flops import ModelFlops, predictor_flops
from lesa.params import CallParams
from lesa.predictor.predictor import Predictor
from lesa.predictor.rule import RuleFactory
from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache, remove_lesa_cache
from lesa.schedule import Schedule

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
    held: Callable[[Any], Any] | None = field(default=None, repr=False)  # of the pipeline: see `probe`
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
        skipped = model.head + sum(always)
        return computed * model.total + (self.num_steps - computed) * skipped + self.own_flops(model, sigmas)


def lesa_method(
    budget: str, predictor: Predictor, schedule: Schedule, *, name: str = "lesa", label: str = "LESA"
) -> Method:
    """A learned predictor through our hook."""

    def using(pipe: Any, sigmas: torch.Tensor) -> AbstractContextManager[None]:
        weights = pipe.transformer

        def factory(schedule: Schedule, sigmas: torch.Tensor) -> Any:
            return predictor.bind(schedule, sigmas, device=weights.device, dtype=weights.dtype)

        return hooked(pipe, schedule, factory, sigmas)

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


@contextmanager
def hooked(pipe: Any, schedule: Schedule, factory: RuleFactory, sigmas: torch.Tensor) -> Iterator[None]:
    # Without the error meter, which no peer has: it costs one prediction a full step.
    config = LesaCacheConfig(
        schedule=schedule, rule=factory(schedule, sigmas), scheduler=pipe.scheduler, measure=False
    )
    apply_lesa_cache(pipe.transformer, config)
    try:
        yield
    finally:
        remove_lesa_cache(pipe.transformer)
