"""Successive halving: schedules that lead the search are trained through the sampler before one of them is taken.

Weights in closed form rank schedules as they are before training, and what training makes of a schedule differs by
more than the leaders do. So the leaders, not too alike, get a short closed loop each, of step weights alone: what
experts add, they add to all of them. There are two rounds: a very short training of many, which ranks them much as a
longer one does, and a longer one of the few finalists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lesa.params import CallParams, ClosedLoopParams
from lesa.predictor.rule import History, WithoutStages
from lesa.predictor.spec import STEPS
from lesa.predictor.step_weights import differences
from lesa.recording.dataset import Trajectories, draw
from lesa.schedule import Schedule
from lesa.search.trials import Steps
from lesa.training.encoded_prompts import prompts_encoded_once
from lesa.training.loop import LoopSettings, TrainingError, optimise
from lesa.training.losses import log_latents_loss
from lesa.training.recompute import constant_steps
from lesa.training.rollout import accelerated_latents, freeze_pipeline
from lesa.training.step_weights import StepWeights

APART = 4  # steps by which the full steps of two finalists differ at least, taken together


@dataclass
class StepRule(WithoutStages):
    """Step weights alone as a `lesa.predictor.rule.Rule`: predictions carry their gradients."""

    weights: StepWeights
    history_size: int  # K
    name: str = "step weights in training"
    keeps_predictions: bool = False

    def __call__(self, history: History, step: int) -> torch.Tensor:
        held = [feature.float() for feature in history.features]
        change = self.weights(held[0], differences(held, self.history_size), step)
        return (held[0] + change).to(history.features[0].dtype)


def leaders(errors: Mapping[Steps, float], count: int, chosen: Sequence[Steps] = ()) -> list[Steps]:
    """The lowest errors among schedules that are not too alike, the lowest first.

    Args:
        errors: of schedules with the same number of full steps.
        count: how many at most.
        chosen: schedules that come before all others.
    """
    leading = list(chosen[:count])
    for steps in sorted(errors, key=lambda steps: (errors[steps], steps)):
        if len(leading) == count:
            break
        if all(_apart(steps, other) >= APART for other in leading):
            leading.append(steps)
    return leading


def _silent(iteration: int, values: dict[str, float]) -> None:
    """A report that tells nothing: of a finalist's training only the resulting error is reported, by its caller."""


def _apart(one: Steps, other: Steps) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _loop_settings(settings: ClosedLoopParams, iterations: int, seed: int) -> LoopSettings:
    return LoopSettings(
        iterations=iterations,
        learning_rate=0.0,  # there are no experts
        gate_learning_rate=0.0,
        step_learning_rate=settings.step_learning_rate,
        weight_decay=0.0,
        gradient_clip=settings.gradient_clip,
        checkpoint_every=iterations,
        seed=seed,
    )


def error_after_training(
    pipe: Any,
    call: CallParams,
    data: Trajectories,
    schedule: Schedule,
    start: StepWeights,
    *,
    settings: ClosedLoopParams,
    history_size: int,
    seed: int,
    fitted: Sequence[int],
    judged: Sequence[int],
    iterations: int,
) -> float:
    """Error of the final latents after a short closed loop of step weights, as natural logarithm of the squared error.

    Args:
        pipe: the workload's pipeline; its parameters are frozen.
        call: how the pipeline is called.
        data: training trajectories.
        schedule: on which the weights are good.
        start: weights in closed form, trained in place.
        settings: how fast, and on batches of how many trajectories.
        history_size: K of the weights.
        seed: of the batches.
        fitted: trajectories that are learned from.
        judged: others, for the error.
        iterations: optimiser steps.

    Returns:
        The error, that of the start where training made it worse; infinity where it left the finite numbers.
    """
    freeze_pipeline(pipe)
    rule = StepRule(start, history_size)

    def loss_of(indices: Sequence[int], constants: frozenset[int] = frozenset()) -> torch.Tensor:
        recomputed = settings.gradient_checkpointing and torch.is_grad_enabled()
        latents = accelerated_latents(pipe, call, schedule, rule, data, indices, recomputed, constants)
        return log_latents_loss(latents, data.latents[list(indices)].to(latents.device))

    def batch_loss(batch: torch.Generator) -> torch.Tensor:
        chosen = [fitted[i] for i in draw(batch, len(fitted), settings.batch_size)]
        return loss_of(chosen, constant_steps(schedule, settings.model_gradient, batch))

    @torch.no_grad()
    def judged_loss() -> float:
        return float(loss_of(judged))

    loop = _loop_settings(settings, iterations, seed)
    weights = nn.ModuleDict({STEPS: start})
    apart = prompts_encoded_once(pipe) if settings.gradient_checkpointing else nullcontext()
    with apart, TemporaryDirectory() as folder:  # training this short is not resumed
        try:
            return optimise(
                weights, batch_loss, judged_loss, settings=loop, folder=Path(folder), key="", report=_silent
            )
        except TrainingError:
            return math.inf
