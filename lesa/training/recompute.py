"""The gradient through the sampler in little memory: activations are made again, and of a step only features stay.

Checkpointing at two depths (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174). Between
the sampler's steps only latents, conditioning, kept features and predictions are held. In the backward pass one call
of the transformer at a time is run again, guidance branches one after the other, and of that call only the blocks'
inputs are held: each block is run once more in its own backward pass. A full step costs two more forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lesa.predictor.rule import History, Rule
from lesa.sampling.hook import is_predicting
from lesa.schedule import Schedule


class RecomputedRule:
    """A rule whose predictions keep no more than the history for their backward pass.

    Nothing is memoised between predictions: what a memo would hold for the backward pass is as large as a feature.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.name, self.history_size, self.keeps_predictions = rule.name, rule.history_size, rule.keeps_predictions
        self.stages, self.sizes = rule.stages, rule.sizes

    def __call__(self, history: History, step: int) -> torch.Tensor:
        size, branch, steps = history.size, history.branch, history.steps

        def predict(*features: torch.Tensor) -> torch.Tensor:
            past = History(size, branch)
            past.steps, past.features = steps, features
            return self._rule(past, step)

        return _checkpoint(predict, *history.features)


def constant_steps(schedule: Schedule, model_gradient: float, batch: torch.Generator) -> frozenset[int]:
    """Full steps that no gradient goes through, drawn for one optimiser step; nothing is drawn where it is 1."""
    if model_gradient == 1:
        return frozenset()
    drawn = torch.rand(schedule.num_full, generator=batch)
    places = zip(schedule.full_steps, drawn.tolist(), strict=True)
    return frozenset(step for step, place in places if place >= model_gradient)


@contextmanager
def constant_calls(pipe: Any, steps: frozenset[int]) -> Iterator[None]:
    """Within, the transformer's outputs at some steps are constants: gradients pass by along the latents alone."""
    transformer, scheduler = pipe.transformer, pipe.scheduler
    forward = transformer.forward

    def calling(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad() if (scheduler.step_index or 0) in steps else nullcontext():
            return forward(*args, **kwargs)

    with _forwards({transformer: calling} if steps else {}):
        yield


@contextmanager
def recomputed_calls(transformer: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within, the transformer's full calls keep no activations; hooks of LESA are put on after this and taken off
    before it ends.

    The backward pass may come later, when `transformer` is as it was.
    """
    with _forwards({transformer: _recomputed_call(transformer, blocks)}), _recomputed_blocks(blocks):
        yield


def _recomputed_call(transformer: nn.Module, blocks: Sequence[nn.Module]) -> Callable[..., Any]:
    forward = transformer.forward

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if is_predicting(transformer):  # a predicted step has its ends alone, which keep the prediction and little else
            return forward(*args, **kwargs)
        is_first = True

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_first
            if is_first:  # within `recomputed_calls`
                is_first = False
                return forward(*args, **kwargs)
            with _recomputed_blocks(blocks):
                return forward(*args, **kwargs)

        return _checkpoint(call, *args, **kwargs)

    return recomputing


def _recomputed_blocks(blocks: Sequence[nn.Module]) -> Any:
    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: _checkpoint(forward, *args, **kwargs)

    return _forwards({block: recomputed(block.forward) for block in blocks})


@contextmanager
def _forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Put these in the modules' place of `forward`; afterwards it is as it was, another tool's included."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in own.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # All by position: a checkpoint within another one would hold tensors that are given by name, and diffusers gives
    # blocks theirs so. The pipeline is in evaluation mode: no dropout's random numbers have to come again.
    count, names = len(args), tuple(kwargs)

    def by_name(*values: Any) -> Any:
        return function(*values[:count], **dict(zip(names, values[count:], strict=True)))

    return checkpoint(by_name, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False)
