"""The bill: passes through a transformer's blocks, counted by hooks in the process that makes them.

One forward is every block once, for one sample in one guidance branch. A call that runs a part of the blocks counts as
that part, and what is made again for a backward pass counts again. Embedders and output head, which predicted steps run
too, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lesa.models.families import blocks, family_of

if TYPE_CHECKING:
    import torch  # who adds bills up needs none of it


BACKWARD = 2.0  # forwards that a backward is the work of; fewer, since the model's weights are frozen


@dataclass(slots=True, eq=False)
class Bill:
    """What was computed."""

    forwards: float = 0.0
    backwards: float = 0.0

    def add(self, other: Bill) -> None:
        self.forwards += other.forwards
        self.backwards += other.backwards

    @property
    def work(self) -> float:
        """Everything in forwards."""
        return self.forwards + BACKWARD * self.backwards

    def to_dict(self) -> dict[str, float]:
        """Plain values; thousandths of a forward are rounding."""
        return {"forwards": round(self.forwards, 3), "backwards": round(self.backwards, 3)}


_open: list[Bill] = []  # those that are being written


@contextmanager
def counted() -> Iterator[Bill]:
    """A bill of all passes within the block through transformers that `watch` has been given; blocks may nest."""
    bill = Bill()
    _open.append(bill)
    try:
        yield bill
    finally:
        _open.remove(bill)


def charge(passes: Bill) -> None:
    """Put passes that another process has made on the bills of this one."""
    for bill in _open:
        bill.add(passes)


def watch(transformer: torch.nn.Module) -> None:
    """Count this transformer's passes from now on, whatever is hooked to it later."""
    from diffusers.utils.torch_utils import unwrap_module

    original = unwrap_module(transformer)
    every = blocks(original, family_of(original))
    for _, block, row in every:
        _watch_block(unwrap_module(block), row.hidden_index, 1.0 / len(every))


def _watch_block(block: torch.nn.Module, hidden_index: int, share: float) -> None:
    ran = 0  # samples of the call that is under way; a block that a hook skips never calls its first child

    def begin(module: torch.nn.Module, args: Any) -> None:
        nonlocal ran
        ran = 0

    def count_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal ran
        if _open:
            ran = len(args[0] if args else kwargs["hidden_states"])
            charge(Bill(forwards=share * ran))

    def count_backward(module: torch.nn.Module, args: Any, output: Any) -> None:
        if not ran:
            return
        hidden = output[hidden_index] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            passed = Bill(backwards=share * ran)
            # Activations that are made again are other tensors, which no gradient reaches: each pass counts once.
            hidden.register_hook(lambda gradient: charge(passed))

    block.register_forward_pre_hook(begin)
    next(block.children()).register_forward_pre_hook(count_forward, with_kwargs=True)
    block.register_forward_hook(count_backward)
