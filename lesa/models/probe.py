"""What a sampler run really did, whatever accelerates it: evaluations counted, features read, bytes held.

Plain forward hooks on parts that every method leaves in place, so that all methods are measured by the same
means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.hooks.hooks import StateManager
from diffusers.utils.torch_utils import unwrap_module

from lesa.models.families import blocks, family_of
from lesa.models.flops import CallShapes


@dataclass(slots=True)
class RunTrace:
    """Filled while sampling inside `probe`; several pipeline calls add up."""

    calls: int = 0  # of the transformer
    computed: int = 0  # calls in which every block ran
    features: list[torch.Tensor] = field(default_factory=list)  # [B, L, C] of every call, on the CPU
    peak_bytes: int = 0  # the most that caches held between blocks and output head, all samples of the batch
    shapes: CallShapes = field(default_factory=CallShapes)

    @property
    def computed_share(self) -> float:
        """Computed calls a call; 1 for a plain run."""
        return self.computed / self.calls


@contextmanager
def probe(pipe: Any, *, deep: bool = False, held: Callable[[Any], Any] | None = None) -> Iterator[RunTrace]:
    """Watch the pipeline's transformer.

    Args:
        pipe: the pipeline; what accelerates it must be put on before or inside.
        deep: also read features, bytes and shapes. It costs time and memory: not while timing.
        held: what a cache outside diffusers' hooks keeps on the pipeline, as nested lists and dictionaries of tensors.
    """
    transformer = unwrap_module(pipe.transformer)
    every = blocks(transformer, family_of(transformer))
    trace = RunTrace()
    ran: set[int] = set()  # blocks of the call that is under way

    def count_call(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        trace.calls += 1
        # Not the last block alone: DBCache runs the last ones at every step, FirstBlockCache the first one.
        trace.computed += len(ran) == len(every)
        ran.clear()
        if deep:
            trace.features.append(args[0].detach().float().cpu())
            trace.peak_bytes = max(trace.peak_bytes, held_bytes(transformer, held(pipe) if held else ()))

    def count_block(index: int) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: ran.add(index)

    # A block that is skipped never calls its first child; the output head always runs.
    handles = [transformer.norm_out.register_forward_pre_hook(count_call)]
    handles += [
        next(unwrap_module(block).children()).register_forward_pre_hook(count_block(index))
        for index, (_, block, _) in enumerate(every)
    ]
    if deep:
        handles.append(transformer.register_forward_pre_hook(trace.shapes, with_kwargs=True))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@runtime_checkable
class HoldsTensors(Protocol):
    """What keeps tensors from step to step on a hook, outside diffusers' own state managers."""

    def held_tensors(self) -> Iterator[torch.Tensor]: ...


def held_bytes(transformer: torch.nn.Module, further: Any = ()) -> int:
    """Bytes of all tensors that diffusers' hooks, and `further`, keep from step to step, each storage once."""
    tensors = list(_tensors(further))
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None:
            continue
        for hook in registry.hooks.values():
            for value in vars(hook).values():
                if isinstance(value, StateManager):
                    for state in value._state_cache.values():
                        tensors += _tensors(list(vars(state).values()))
                elif isinstance(value, HoldsTensors):
                    tensors += value.held_tensors()
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
