"""The published format: manifest, reading and writing, budgets, card.

Imported by pull, sampling and all that follows.
"""

from lesa.bundle.format import Bundle, load_bundle, write_bundle
from lesa.bundle.manifest import BundleError

__all__ = ["Bundle", "BundleError", "load_bundle", "write_bundle"]
