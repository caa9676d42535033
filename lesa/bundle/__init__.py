"""The published format: manifest, reading and writing, budgets, card.

Imported by pull, sampling and all that follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lesa.bundle.manifest import BundleError

if TYPE_CHECKING:
    from lesa.bundle.format import Bundle, load_bundle, write_bundle

__all__ = ["Bundle", "BundleError", "load_bundle", "write_bundle"]


def __getattr__(name: str) -> Any:
    # Weights take torch, seconds to import; the registry reads manifests alone.
    if name not in __all__:
        raise AttributeError(f"module 'lesa.bundle' has no attribute {name!r}")
    from lesa.bundle import format

    return getattr(format, name)
