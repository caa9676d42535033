"""Learnable stage-aware predictors that make diffusion transformers sample several times faster (LESA).

lesa.enable(pipe, "models:/lesa-flux-digits@champion")   # or a bundle folder
image = pipe("a thin seven", **lesa.call_kwargs(pipe)).images[0]
print(lesa.summary(pipe))
lesa.disable(pipe)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lesa.sampling.enable import call_kwargs, disable, enable, summary
    from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache, remove_lesa_cache
    from lesa.schedule import Schedule

__all__ = [
    "LesaCacheConfig",
    "Schedule",
    "apply_lesa_cache",
    "call_kwargs",
    "disable",
    "enable",
    "remove_lesa_cache",
    "summary",
]

_HOMES = {
    "LesaCacheConfig": "lesa.sampling.hook",
    "Schedule": "lesa.schedule",
    "apply_lesa_cache": "lesa.sampling.hook",
    "call_kwargs": "lesa.sampling.enable",
    "disable": "lesa.sampling.enable",
    "enable": "lesa.sampling.enable",
    "remove_lesa_cache": "lesa.sampling.hook",
    "summary": "lesa.sampling.enable",
}


def __getattr__(name: str) -> Any:
    # Torch and diffusers take seconds to import: only what is used brings them in.
    if name not in _HOMES:
        raise AttributeError(f"module 'lesa' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
