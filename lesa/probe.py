"""What a sampler run really did, whatever accelerates it: evaluations counted, features read, bytes held.

Plain forward hooks on parts that every method leaves in place, so that all methods are measured by the same
means.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.hooks import StateManager
from diffusers.utils.torch_utils import unwrap_module

from lesa.families import blocks, family_of
from lesa.flops import CallShapes
from lesa.history import History


@dataclass(slots=True)
class RunTrace:
    """Filled while sampling inside `probe`; several pipeline calls add up."""

    calls: int = 0  # of the transformer
    computed: int = 0  # calls in which the last block ran
    features: list[torch.Tensor] = field(default_factory=list)  # [B, L, C] of every call, on the CPU
    peak_bytes: int = 0  # the most that caches held between blocks and ends, all samples of the batch
    shapes: CallShapes = field(default_factory=CallShapes)

    @property
    def computed_share(self) -> float:
        """Computed calls a call; 1 for a plain run."""
        return self.computed / self.calls


@contextmanager
def probe(pipe: Any, *, deep: bool = False) -> Iterator[RunTrace]:
    """Watch the pipeline's transformer.

    Args:
        pipe: the pipeline; what accelerates it must be put on before or inside.
        deep: also read features, bytes and shapes. It costs time and memory: not while timing.
    """
    transformer = unwrap_module(pipe.transformer)
    tail = blocks(transformer, family_of(transformer))[-1][1]
    trace = RunTrace()

    def count_call(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        trace.calls += 1
        if deep:
            trace.features.append(args[0].detach().float().cpu())
            trace.peak_bytes = max(trace.peak_bytes, held_bytes(transformer))

    def count_computed(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        trace.computed += 1

    # A block that is skipped never calls its first child; the ends always run.
    handles = [
        transformer.norm_out.register_forward_pre_hook(count_call),
        next(unwrap_module(tail).children()).register_forward_pre_hook(count_computed),
    ]
    if deep:
        handles.append(transformer.register_forward_pre_hook(trace.shapes, with_kwargs=True))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def held_bytes(transformer: torch.nn.Module) -> int:
    """Bytes of all tensors that caches on diffusers' hooks keep from step to step, each storage once."""
    held: dict[int, int] = {}
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None:
            continue
        for hook in registry.hooks.values():
            for manager in (value for value in vars(hook).values() if isinstance(value, StateManager)):
                for state in manager._state_cache.values():
                    for tensor in _tensors(list(vars(state).values())):
                        storage = tensor.untyped_storage()
                        held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, History):
        yield from value.features
        yield from value.memo.values()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
