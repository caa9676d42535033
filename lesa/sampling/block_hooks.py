"""Hooks beneath the transformer's: blocks, rotary embeddings and embedders obey what the root hook decided."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.utils.torch_utils import unwrap_module

from lesa.models.families import BlockList
from lesa.sampling.hook_registry import is_alive

AGAIN = "disable LESA and enable it again, after whatever changed the hooks"
_MAX_PLACEHOLDERS = 8  # shapes of a run's guidance branches, with room to spare


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


class LesaBlockHook(ModelHook):
    """Runs the block, or passes its inputs through in the order of its outputs."""

    def __init__(self, call: LesaCallState, block: torch.nn.Module, row: BlockList, is_tail: bool) -> None:
        super().__init__()
        self._call = call
        self._row = row
        self._is_tail = is_tail
        names = list(inspect.signature(type(unwrap_module(block)).forward).parameters)[1:]  # without self
        self._positions = {name: index for index, name in enumerate(names)}

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if not call.skip:
            if not call.active and not is_alive(call.root):
                raise RuntimeError(f"the hook of the transformer was silenced by another tool: {AGAIN}")
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


class LesaRotaryHook(ModelHook):
    """Leaves the rotary embeddings as they were at the full step before: only blocks read them.

    On a small model they are a fifth of what a predicted step costs.
    """

    _is_stateful = True

    def __init__(self, call: LesaCallState) -> None:
        super().__init__()
        self._call = call
        self._newest: Any = None

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._call.skip and self._newest is not None:
            return self._newest
        self._newest = self.fn_ref.original_forward(*args, **kwargs)
        return self._newest

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._newest = None
        return module


class LesaEmbedderHook(ModelHook):
    """Gives a placeholder of the right shape for tokens that only skipped blocks would read: one element, expanded.

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
