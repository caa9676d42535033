"""What the small training loops of this package share: one optimiser, one learning-rate curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

Report = Callable[[int, dict[str, float]], None]


class Optimiser:
    """AdamW with linear warm-up, cosine decay to a hundredth and clipping of the gradient's norm."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        num_steps: int,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup: float = 0.05,  # share of num_steps
        clip: float = 1.0,
    ) -> None:
        self.parameters = list(parameters)
        self.clip = clip
        self.adam = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        num_warmup = max(1, round(warmup * num_steps))

        def factor(step: int) -> float:
            decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
            return min(1.0, (step + 1) / num_warmup) * (0.01 + 0.99 * decay)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, factor)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def step(self, loss: torch.Tensor) -> None:
        """Backpropagate `loss` and update. Raises FloatingPointError when the loss is not finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"training loss became {loss.item()}: lower learning_rate")
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.adam.step()
        self.schedule.step()


def pick(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` indices below `size`, drawn with replacement on the CPU: the same on every device."""
    return torch.randint(size, (count,), generator=generator)
