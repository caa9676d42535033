"""What predicts, as the sampler sees it: the protocol of a rule, and the K newest features that it looks back on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from lesa.errors import LesaError
from lesa.schedule import Schedule


class History:
    """Ring of the newest features, newest first.

    `memo` belongs to whoever predicts from this history: work that depends on the cached features alone (LESA's
    projection, Taylor's differences) is done once an anchor and is forgotten when a feature arrives.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise LesaError(f"history size must be at least 1, got {size}")
        self.size = size
        self.steps: tuple[int, ...] = ()
        self.features: tuple[torch.Tensor, ...] = ()
        self.memo: dict[Any, torch.Tensor] = {}

    def push(self, step: int, feature: torch.Tensor) -> None:
        """Add the feature [B, L, C] of `step`; the oldest leaves when the ring is full."""
        self.steps = (step, *self.steps)[: self.size]
        self.features = (feature, *self.features)[: self.size]
        self.memo = {}

    def reset(self) -> None:
        self.steps, self.features, self.memo = (), (), {}

    @property
    def nbytes(self) -> int:
        """Bytes held: features and memoised tensors."""
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.features}
        held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.memo.values()}
        return sum(held.values())


class Rule(Protocol):
    """Anything that predicts a feature from cached ones."""

    @property
    def name(self) -> str: ...

    @property
    def history_size(self) -> int:
        """Features it needs at most."""
        ...

    @property
    def keeps_predictions(self) -> bool:
        """Whether its own predictions enter the history."""
        ...

    def __call__(self, history: History, step: int) -> torch.Tensor:
        """The feature [B, L, C] at `step`; history features are left unmodified."""
        ...


RuleFactory = Callable[[Schedule, torch.Tensor], Rule]  # noise levels [S + 1] of the plain run
