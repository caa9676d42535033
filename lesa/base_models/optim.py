"""What the small training loops of this package share: an optimiser and its learning-rate curve."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

Report = Callable[[int, dict[str, float]], None]

MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iterates bring all singular values near 1
NUM_ITERATIONS = 5


class Optimiser:
    """AdamW, and Muon for `matrices`; linear warm-up, cosine decay to a hundredth, clipped gradients."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],  # AdamW's
        *,
        learning_rate: float,
        num_steps: int,
        matrices: Iterable[nn.Parameter] = (),  # Muon's, each two-dimensional
        matrix_learning_rate: float = 0.0,  # in AdamW's measure: an update has RMS 0.2 times it
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup: float = 0.05,  # share of num_steps
        clip: float = 1.0,  # largest norm of the whole gradient
    ) -> None:
        adam = torch.optim.AdamW(
            list(parameters), lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        self.optimisers: list[torch.optim.Optimizer] = [adam]
        matrices = list(matrices)
        if matrices:
            self.optimisers.append(Muon(matrices, lr=matrix_learning_rate, weight_decay=weight_decay))
        self.parameters = [p for o in self.optimisers for group in o.param_groups for p in group["params"]]
        self.clip = clip
        num_warmup = max(1, round(warmup * num_steps))

        def factor(step: int) -> float:
            decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
            return min(1.0, (step + 1) / num_warmup) * (0.01 + 0.99 * decay)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimisers]

    @property
    def learning_rate(self) -> float:
        """AdamW's rate at the next step."""
        return float(self.schedules[0].get_last_lr()[0])

    def step(self, loss: torch.Tensor) -> None:
        """Backpropagate `loss` and update. Raises FloatingPointError when the loss is not finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"training loss became {loss.item()}: lower learning_rate")
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for optimiser, schedule in zip(self.optimisers, self.schedules, strict=True):
            optimiser.step()
            schedule.step()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), equal shapes in one batched product.

    torch.optim.Muon does the same a matrix at a time in bf16, which is slow for many small matrices and
    slower still on processors without bf16 arithmetic.
    """

    def __init__(self, params: Sequence[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        assert all(p.ndim == 2 for p in params), "Muon updates matrices"
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, members in by_shape.items():
                state = self.state[members[0]]
                gradients = torch.stack([p.grad for p in members if p.grad is not None])
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradients)
                momentum = state["momentum"].lerp_(gradients, 1 - MUON_MOMENTUM)
                update = orthogonalise(gradients.lerp(momentum, MUON_MOMENTUM))
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for p, change in zip(members, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=size)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """For [B, M, N], about U V^T of each matrix's singular value decomposition U S V^T."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x


def pick(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` indices below `size`, drawn with replacement on the CPU: the same on every device."""
    return torch.randint(size, (count,), generator=generator)
