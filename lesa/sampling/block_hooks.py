"""Hooks beneath the transformer's: blocks, rotary embeddings and embedders obey what the root hook decided.

At a predicted step a block passes its inputs through, and the last one (the tail) returns the prediction. Modules whose
output only the blocks read (token embedders, rotary embeddings) do not run either.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.utils.torch_utils import unwrap_module

from lesa.errors import LesaError
from lesa.models.families import BlockList, blocks, family_of
from lesa.sampling.hook_registry import AGAIN, HookError, PlacedHook, add_hook, find_hook, is_above_offload, is_alive

BLOCK_HOOK, ROTARY_HOOK, EMBEDDER_HOOK = "lesa_cache_block", "lesa_cache_rotary", "lesa_cache_embedder"
SILENCED = f"the hook of the transformer was silenced by another tool, as renewing offloading does: {AGAIN}"
_ROTARY = ("pos_embed", "rope")  # diffusers' names for what makes rotary embeddings
_MAX_PLACEHOLDERS = 8  # shapes of a run's guidance branches, with room to spare
_MAX_NAMED = 3  # modules that a message names


class LesaCallState:
    """What the hooks of one transformer tell each other during one call."""

    __slots__ = ("active", "feature", "prediction", "root", "skip")

    def __init__(self) -> None:
        self.root: ModelHook | None = None
        self.clear()

    def clear(self) -> None:
        self.active = False  # whether the transformer is in a call that the root hook sees
        self.skip = False  # whether the blocks pass their inputs through
        self.prediction: torch.Tensor | None = None  # what the tail returns then
        self.feature: torch.Tensor | None = None  # what the tail returned otherwise


class LesaBlockHook(PlacedHook):
    """Runs the block, or passes its inputs through in the order of its outputs."""

    def __init__(self, call: LesaCallState, block: torch.nn.Module, row: BlockList, is_tail: bool) -> None:
        super().__init__()
        self._call = call
        self._row = row
        self._is_tail = is_tail
        names = list(inspect.signature(type(unwrap_module(block)).forward).parameters)[1:]  # without self
        self._positions = {name: index for index, name in enumerate(names)}

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self._call.active:  # the root hook has looked at its own calls
            self.refuse_copies(module)
        return args, kwargs

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if not call.skip:
            if not call.active and not is_alive(call.root):
                raise HookError(SILENCED)
            output = self.fn_ref.original_forward(*args, **kwargs)
            if self._is_tail:
                index = self._row.encoder_index
                call.feature = output if index is None else output[self._row.hidden_index]
            return output
        hidden = call.prediction if self._is_tail else self._input("hidden_states", args, kwargs)
        if self._row.encoder_index is None:
            return hidden
        encoder = self._input("encoder_hidden_states", args, kwargs)
        return (hidden, encoder) if self._row.hidden_index == 0 else (encoder, hidden)

    def _input(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[self._positions[name]]


class LesaRotaryHook(PlacedHook):
    """Leaves the rotary embeddings as they were at the full step before: only blocks read them.

    On a small model they would take a fifth of a predicted step's time.
    """

    _is_stateful = True

    def __init__(self, call: LesaCallState) -> None:
        super().__init__()
        self._call = call
        self._newest: Any = None  # embeddings of the newest full call

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._call.skip and self._newest is not None:
            return self._newest
        self._newest = self.fn_ref.original_forward(*args, **kwargs)
        return self._newest

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._newest = None
        return module


class LesaEmbedderHook(PlacedHook):
    """Stands in for tokens that only skipped blocks would read, with one element expanded to their shape.

    The shape is that of the newest full call with an input of the same shape: guidance branches differ in theirs.
    """

    _is_stateful = True

    def __init__(self, call: LesaCallState) -> None:
        super().__init__()
        self._call = call
        self._placeholders: dict[torch.Size, torch.Tensor] = {}

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()), None)
        shape = given.shape if isinstance(given, torch.Tensor) else None
        if self._call.skip and shape in self._placeholders:
            return self._placeholders[shape]
        output = self.fn_ref.original_forward(*args, **kwargs)
        if shape is not None and isinstance(output, torch.Tensor):
            if len(self._placeholders) >= _MAX_PLACEHOLDERS:
                self._placeholders.clear()
            self._placeholders[shape] = output.new_zeros(1).expand(output.shape)
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._placeholders = {}
        return module


def add_block_hooks(transformer: torch.nn.Module, call: LesaCallState) -> dict[str, torch.nn.Module]:
    """Hooks on everything of `transformer` that predicted steps skip.

    Returns:
        The modules that `hook_problems` looks after, by name.

    Raises:
        LesaError: it has no blocks.
    """
    family = family_of(transformer)
    rows = blocks(transformer, family)
    if not rows:
        raise LesaError(f"{type(transformer).__name__} has no blocks to skip")
    for index, (_, block, row) in enumerate(rows):
        hook = LesaBlockHook(call, block, row, is_tail=index == len(rows) - 1)
        add_hook(unwrap_module(block), hook, BLOCK_HOOK)
    for names, kind, hook_name in (
        (_ROTARY, LesaRotaryHook, ROTARY_HOOK),
        (family.embedders, LesaEmbedderHook, EMBEDDER_HOOK),
    ):
        for name in names:
            module = getattr(transformer, name, None)
            if isinstance(module, torch.nn.Module):
                add_hook(unwrap_module(module), kind(call), hook_name)
    return {name: module for name, module, _ in _hooked_modules(transformer)}


def hook_problems(transformer: torch.nn.Module, hooked: Mapping[str, torch.nn.Module]) -> list[str]:
    """What is not as it was when LESA was enabled: modules, their hooks, and what offloads them.

    Args:
        hooked: what `add_block_hooks` returned.
    """
    replaced, silenced, late = [], [], []
    now = _hooked_modules(transformer)
    for name, module, hook_name in now:
        if (before := hooked.get(name)) is not module:
            replaced.append(f"{name} ({_how_replaced(before, module)})")
        elif not is_alive(find_hook(module, hook_name)):
            silenced.append(name)
        elif not is_above_offload(module, hook_name):
            late.append(name)
    replaced += [f"{name} (it is gone)" for name in hooked.keys() - {name for name, *_ in now}]
    problems = []
    if replaced:
        problems.append(f"modules were replaced after LESA was enabled, {_listed(replaced)}: {AGAIN}")
    if silenced:
        problems.append(f"the hooks of {_listed(silenced)} were silenced by another tool: {AGAIN}")
    if late:
        problems.append(
            f"offloading was set up after LESA on {_listed(late)}, so predicted steps would move weights: {AGAIN}"
        )
    return problems


def _how_replaced(before: torch.nn.Module | None, now: torch.nn.Module) -> str:
    """By what kind of act a module came to stand where LESA's hook was."""
    if before is None:
        return "it is new"
    wrapped = getattr(now, "base_layer", None)
    if wrapped is not None and wrapped is not before:
        return "an adapter wraps another layer, as a control LoRA does"
    if wrapped is not None:
        return "an adapter wraps it"
    if getattr(before, "base_layer", None) is now:
        return "an adapter was taken off it"
    if type(now) is not type(before):
        return f"{type(now).__name__} instead of {type(before).__name__}, as quantising does"
    shapes = [[parameter.shape for parameter in module.parameters()] for module in (before, now)]
    return "of the same shape, as a copy" if shapes[0] == shapes[1] else "of another shape"


def _listed(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _hooked_modules(transformer: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    """Name, module and hook of everything that predicted steps skip and that has weights."""
    family = family_of(transformer)
    hooked = [(name, block, BLOCK_HOOK) for name, block, _ in blocks(transformer, family)]
    hooked += [(name, getattr(transformer, name), EMBEDDER_HOOK) for name in family.embedders]
    return [(name, unwrap_module(module), hook_name) for name, module, hook_name in hooked]


Compiled = list[tuple[dict[str, Any], Any]]  # attributes of a module, and the compiled call that was taken from them


@torch.compiler.disable
def take_compiled(transformer: torch.nn.Module) -> Compiled:
    """Keep a skipped call out of compiled modules: each kind of call would be compiled once more to do nothing.

    `torch.compile` counts such variants of all hooked modules together and gives up at eight.
    """
    taken = []
    for _, module, _ in _hooked_modules(transformer):
        attributes = module.__dict__
        if attributes.get("_compiled_call_impl") is not None:
            taken.append((attributes, attributes["_compiled_call_impl"]))
            attributes["_compiled_call_impl"] = None
    return taken


@torch.compiler.disable
def give_back(taken: Compiled) -> None:
    """Undo `take_compiled`."""
    for attributes, compiled in taken:
        attributes["_compiled_call_impl"] = compiled
