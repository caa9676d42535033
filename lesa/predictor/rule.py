"""What predicts, as the sampler sees it: the protocol of a rule, and the K newest features that it looks back on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Protocol

import torch

from lesa.errors import LesaError
from lesa.schedule import Schedule

MemoKey = tuple[str, *tuple[int, ...]]  # a name that one rule alone uses, and which of its tensors of that name


class History:
    """Ring of the newest features, newest first.

    `memo` belongs to the rule that predicts from this history: work that depends on the cached features alone (LESA's
    projection, Taylor's differences) is done once an anchor and is forgotten when a feature arrives.

    Args:
        size: features at most.
        branch: index of its guidance branch, in the order of the branches' first calls in a run.
    """

    def __init__(self, size: int, branch: int = 0) -> None:
        if size < 1:
            raise LesaError(f"history size must be at least 1, got {size}")
        self.size, self.branch = size, branch
        self.steps: tuple[int, ...] = ()
        self.features: tuple[torch.Tensor, ...] = ()
        self.memo: dict[MemoKey, torch.Tensor] = {}

    def push(self, step: int, feature: torch.Tensor) -> None:
        """Add the feature [B, L, C] of `step`; the oldest leaves when the ring is full."""
        self.steps = (step, *self.steps)[: self.size]
        self.features = (feature, *self.features)[: self.size]
        self.memo = {}

    def reset(self) -> None:
        self.steps, self.features, self.memo = (), (), {}

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Features and memoised tensors."""
        yield from self.features
        yield from self.memo.values()

    @property
    def nbytes(self) -> int:
        """Bytes held, each storage once."""
        storages = [tensor.untyped_storage() for tensor in self.held_tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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

    @property
    def stages(self) -> Sequence[int] | None:
        """Noise stage of each step; None where the rule has no stages."""
        ...

    @property
    def sizes(self) -> Sequence[int] | None:
        """Features that a prediction needs, of each noise stage; None where one is enough."""
        ...

    def __call__(self, history: History, step: int) -> torch.Tensor:
        """The feature [B, L, C] at `step`; history features are left unmodified."""
        ...


class WithoutStages:
    """Base of rules that are the same at all noise levels and predict from as many features as there are."""

    stages: ClassVar[None] = None
    sizes: ClassVar[None] = None


RuleFactory = Callable[[Schedule, torch.Tensor], Rule]  # noise levels [S + 1] of the plain run
