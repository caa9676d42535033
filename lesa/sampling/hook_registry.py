"""Hooks put into diffusers' registries and taken out again, without silencing the hooks of other tools.

accelerate's offloading wraps a forward too, and keeps what it wrapped as `_old_forward`. Pipelines take that wrapper
off and put it on again after every run, so a hook above it would be gone after the first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry, ModelHook

from lesa.errors import LesaError

AGAIN = "disable LESA and enable it again, after whatever changed the hooks"
_OFFLOADING = ("group_offloading", "lazy_prefetch_group_offloading")  # diffusers' names of hooks that move weights


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a hook was put among what wraps a module's forward."""

    above: Callable[..., Any] | None  # the forward that accelerate's wrapper under the hook wraps; None: no wrapper
    installed: Callable[..., Any] | None = None  # the module's forward with the hook in it; None: beneath a wrapper


class HookError(LesaError, RuntimeError):
    """The hooks of a transformer are not as LESA left them, or are called as they cannot be."""


class PlacedHook(ModelHook):
    """A hook that knows where it was put: the base of every hook here.

    `copy.deepcopy` of a hooked module copies the hook, but not diffusers' forward around it, which goes on calling the
    original's hook and so the original's weights. The copied hook is good for being removed alone.
    """

    placement = Placement(above=None)
    module: torch.nn.Module | None = None  # that it was put on; None in a copy

    def __deepcopy__(self, memo: dict[int, Any]) -> PlacedHook:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.fn_ref = copy.deepcopy(self.fn_ref, memo)
        copied.placement = copy.deepcopy(self.placement, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise HookError("a transformer with LESA on it cannot be pickled: call lesa.disable(pipe) first")

    def refuse_copies(self, module: torch.nn.Module) -> None:
        """Refuse a call that comes from a copy of the hooked module."""
        if module is not self.module:
            raise HookError(
                "this is a copy of a module that LESA is enabled on, and would run with the original's weights: call "
                "lesa.disable(pipe) on the copy's pipeline, then lesa.enable(pipe, bundle) if it is to be accelerated"
            )


def add_hook(module: torch.nn.Module, hook: PlacedHook, name: str, *, beneath_offload: bool = False) -> None:
    """Register `hook` as the outermost one of `module`.

    Args:
        beneath_offload: where accelerate offloads the module, stay beneath its wrapper: for a hook that is to
            outlive the wrapper and never skips the module itself.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    hook.module = module
    if beneath_offload and "_old_forward" in module.__dict__:
        with _without_offload_wrapper(module):
            registry.register_hook(hook, name)
        hook.placement = Placement(above=None)
    else:
        above = module.__dict__.get("_old_forward")
        registry.register_hook(hook, name)
        hook.placement = Placement(above, installed=module.forward)


@contextmanager
def _without_offload_wrapper(module: torch.nn.Module) -> Iterator[None]:
    """accelerate's wrapper lifted off the forward, and put back over whatever the forward is then."""
    wrapper, module.forward = module.forward, module._old_forward
    try:
        yield
    finally:
        module._old_forward, module.forward = module.forward, wrapper


def is_above_offload(module: torch.nn.Module, name: str) -> bool:
    """Whether the hook of that name comes before every offloading hook: what it skips then moves no weights."""
    order = module._diffusers_hook._hook_order
    outside = order[order.index(name) + 1 :]
    return not any(other in outside for other in _OFFLOADING) and not _is_wrapped(module, name)


def _is_wrapped(module: torch.nn.Module, name: str) -> bool:
    """Whether accelerate's wrapper is above the hook of that name."""
    kept, hook = module.__dict__.get("_old_forward"), module._diffusers_hook.get_hook(name)
    return kept is not None and (kept is not hook.placement.above or _is_dropped(module, hook))


def _is_dropped(module: torch.nn.Module, hook: PlacedHook) -> bool:
    """Whether the wrapper beneath was taken off, by which accelerate drops every forward that came above it."""
    if hook.placement.above is None:
        return False
    forward = module.__dict__.get("forward")
    while forward is not None and forward is not hook.placement.installed:
        forward = getattr(forward, "__wrapped__", None)
    return forward is None


def find_hook(module: torch.nn.Module, name: str) -> ModelHook | None:
    """The hook of that name on `module` itself."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def is_alive(hook: ModelHook | None) -> bool:
    """Whether the forward of a hook that replaces one is still called.

    diffusers' removal of an inner hook hands the inner forward to the next outer hook as its own, which silences that
    one: of a silenced hook `pre_forward` alone is called.
    """
    return hook is not None and getattr(hook.fn_ref.forward, "func", None) == getattr(
        hook, "new_forward", None
    )


def remove_hook(module: torch.nn.Module, name: str) -> None:
    """Remove the hook of that name from `module` itself, and silence no other."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None or name not in registry.hooks:
        return
    hook = registry.hooks[name]
    if not is_alive(hook):
        # What it was silenced with is the forward beneath; its own may lead through hooks that are gone.
        hook.fn_ref.original_forward = hook.fn_ref.forward
    index = registry._hook_order.index(name)
    outer = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
    kept = None if outer is None or outer.original_forward is None else outer.forward
    if _is_dropped(module, hook):
        own = module.forward
        registry.remove_hook(name, recurse=False)
        module.forward = own
    elif _is_wrapped(module, name):
        with _without_offload_wrapper(module):
            registry.remove_hook(name, recurse=False)
    else:
        registry.remove_hook(name, recurse=False)
    if outer is not None and kept is not None:
        # diffusers gives the inner forward to the outer hook as its own forward; a hook that replaces the forward calls
        # `original_forward`, so that is where it belongs.
        outer.original_forward, outer.forward = outer.forward, kept
    own = module.__dict__.get("forward")
    if not registry.hooks and getattr(own, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # nothing stays on the module


def forget_children(module: torch.nn.Module) -> None:
    """Drop the list of hooked children that diffusers keeps from the first run on."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()
