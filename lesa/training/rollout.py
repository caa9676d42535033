"""The accelerated pipeline as a differentiable function of the experts in its hook."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lesa.errors import LesaError
from lesa.models.families import blocks, family_of
from lesa.models.output_head import freeze
from lesa.models.pipelines import call_arguments
from lesa.params import CallParams
from lesa.predictor.alpha import time_offsets
from lesa.predictor.rule import History, MemoKey, Rule
from lesa.predictor.step_weights import differences
from lesa.recording.dataset import Trajectories
from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache, is_lesa_cache_enabled, remove_lesa_cache
from lesa.schedule import Schedule, stage_of_steps
from lesa.training.expert import Expert
from lesa.training.recompute import RecomputedRule, constant_calls, recomputed_calls
from lesa.training.step_weights import StepWeights
from lesa.training.targets import Targets


@dataclass(kw_only=True)
class ExpertRule:
    """Experts in training as a `lesa.predictor.rule.Rule`: predictions carry gradients."""

    experts: dict[int, Expert]
    schedule: Schedule
    sigmas: torch.Tensor
    boundaries: tuple[float, ...]
    sizes: tuple[int, ...]
    history: str
    step_weights: StepWeights | None = None  # kind per_step
    step_history: int = 0
    name: str = "experts in training"
    captured: dict[tuple[int, int], torch.Tensor] | None = None  # (branch, step) -> history entry, where asked for
    stages: tuple[int, ...] = field(init=False)
    history_size: int = field(init=False)
    keeps_predictions: bool = field(init=False)

    def __post_init__(self) -> None:
        self.stages = tuple(stage_of_steps(self.sigmas, self.boundaries))
        self.history_size = max(*self.sizes, self.step_history)
        self.keeps_predictions = self.history == "steps"

    def targets(self, stage: int) -> Targets:
        """What the expert of one noise stage predicts."""
        return Targets.on(self.schedule, self.sigmas, self.stages, stage, self.sizes[stage], self.history)

    def __call__(self, history: History, step: int) -> torch.Tensor:
        stage = self.stages[step]
        expert, size = self.experts[stage], self.sizes[stage]
        past = history.steps[:size]
        if self.captured is not None:
            entries = zip(past, history.features[:size], strict=True)
            self.captured |= {(history.branch, s): feature for s, feature in entries}
        newest = history.features[0]
        # Experts train in float32 whatever the pipeline's dtype.
        change = torch.zeros((), device=newest.device)
        if len(past) == size or self.step_weights is None:
            key: MemoKey = ("expert z", stage)
            if key not in history.memo:
                history.memo[key] = expert.project([feature.float() for feature in history.features[:size]])
            offsets = time_offsets(self.sigmas, step, past)[None]
            change = expert.alpha(offsets.to(newest.device), [step]) * history.memo[key]
        if self.step_weights is not None:
            held = [feature.float() for feature in history.features]
            change = change + self.step_weights(held[0], differences(held, self.step_history), step)
        return (newest.float() + change).to(newest.dtype)


def freeze_pipeline(pipe: Any) -> None:
    """Turn off gradients of all the pipeline's parameters: what is trained through it is not it."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            freeze(part)


def accelerated_latents(
    pipe: Any,
    call: CallParams,
    schedule: Schedule,
    rule: Rule,
    data: Trajectories,
    indices: Sequence[int],
    gradient_checkpointing: bool = False,
    constants: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """Final latents of the accelerated pipeline for the same prompts and noise as the recorded runs.

    The pipeline's own `__call__` does the work, under whatever gradient mode is on: its `no_grad` wrapper is left out.

    Args:
        call: how the pipeline is called; the number of steps is the schedule's.
        data: recorded runs, of which `indices` are made again.
        gradient_checkpointing: make activations again in the backward pass (`lesa.training.recompute`).
        constants: full steps that no gradient goes through.
    """
    decorated: Any = type(pipe).__call__
    run_pipeline = decorated.__wrapped__
    call = dataclasses.replace(call, num_inference_steps=schedule.num_steps)
    prompts = [data.prompts[i] for i in indices]
    with ExitStack() as stack:
        # What is held for one loss would be missed when a prediction is made again.
        for expert in rule.experts.values() if isinstance(rule, ExpertRule) and not gradient_checkpointing else ():
            stack.enter_context(expert.projection.held())
        stack.enter_context(in_loop(pipe, schedule, rule, gradient_checkpointing, constants))
        return run_pipeline(
            pipe,
            prompt=prompts,
            generator=[torch.Generator("cpu").manual_seed(data.seeds[i]) for i in indices],
            output_type="latent",
            return_dict=False,
            **call_arguments(pipe, call, len(prompts)),
        )[0]


@contextmanager
def in_loop(
    pipe: Any, schedule: Schedule, rule: Rule, gradient_checkpointing: bool, constants: frozenset[int] = frozenset()
) -> Iterator[None]:
    """The hook on the pipeline's transformer, with activations recomputed in the backward pass if asked."""
    transformer = pipe.transformer
    if gradient_checkpointing:
        rule = RecomputedRule(rule)
    config = LesaCacheConfig(
        schedule=schedule, rule=rule, scheduler=lambda: pipe.scheduler, measure=False, guard=False
    )
    if is_lesa_cache_enabled(transformer):
        raise LesaError("LESA is enabled on this pipeline: call lesa.disable(pipe) before training on it")
    with ExitStack() as stack:
        if gradient_checkpointing:
            modules = [block for _, block, _ in blocks(transformer, family_of(transformer))]
            stack.enter_context(recomputed_calls(transformer, modules))
        stack.enter_context(constant_calls(pipe, constants))
        stack.callback(remove_lesa_cache, transformer)
        apply_lesa_cache(transformer, config)
        yield
