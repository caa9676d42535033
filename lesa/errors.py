"""The one base of what this project refuses: input that cannot be used, in words that name the remedy.

A stage or a command that ends with one prints its message alone; any other exception is a fault of code, and its
traceback is shown.
"""

from __future__ import annotations

from typing import Any


class LesaError(ValueError):
    """Something that was given cannot be used; the message names every problem and what to do."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled as its class called with its message; most descendants are made of other arguments.
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[LesaError], args: tuple[Any, ...]) -> LesaError:
    """An error with its message, on its way from another process; its attributes follow."""
    return kind.__new__(kind, *args)
