"""The K newest cached features of one sampler run and branch."""

from __future__ import annotations

from typing import Any

import torch


class History:
    """Ring of the newest features, newest first.

    `memo` belongs to whoever predicts from this history: work that depends on the cached features alone (LESA's
    projection, Taylor's differences) is done once an anchor and is forgotten when a feature arrives.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"history size must be at least 1, got {size}")
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
