"""The one base of what this project refuses: input that cannot be used, in words that name the remedy.

A stage or a command that ends with one prints its message alone; any other exception is a fault of code, and its
traceback is shown.
"""

from __future__ import annotations


class LesaError(ValueError):
    """Something that was given cannot be used; the message names every problem and what to do."""
