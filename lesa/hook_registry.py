"""diffusers' hook registries, with the traps around removal: who is silenced when somebody's hook goes."""

from __future__ import annotations

import torch
from diffusers.hooks import HookRegistry, ModelHook


def add_hook(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` as the outermost one of `module`."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def find_hook(module: torch.nn.Module, name: str) -> ModelHook | None:
    """The hook of that name on `module` itself."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def is_alive(hook: ModelHook | None) -> bool:
    """Whether a hook that replaces the forward is still called.

    diffusers' removal of an inner hook hands the inner forward to the next outer hook as its own, which
    silences that one.
    """
    return hook is not None and getattr(hook.fn_ref.forward, "func", None) == getattr(
        hook, "new_forward", None
    )


def remove_hook(module: torch.nn.Module, name: str) -> None:
    """Remove the hook of that name from `module` itself, and silence no other."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None or name not in registry.hooks:
        return
    index = registry._hook_order.index(name)
    outer = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
    kept = None if outer is None or outer.original_forward is None else outer.forward
    registry.remove_hook(name, recurse=False)
    if outer is not None and kept is not None:
        # What was handed over belongs where an outer hook that replaces the forward looks for the original.
        outer.original_forward, outer.forward = outer.forward, kept
    own = module.__dict__.get("forward")
    if not registry.hooks and getattr(own, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # nothing stays on the module


def forget_children(module: torch.nn.Module) -> None:
    """Drop the list of hooked children that diffusers keeps from the first run on."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()
