"""How hard a sample is at each budget, as the feature of its first full step tells.

Samples that few full steps reproduce badly are hard for every schedule, more so the more their pictures differ, and
step 0, which every schedule computes, knows much of it. Mean and deviation of its feature over the image tokens go
through a ridge regression to the PSNR that each budget will reach, fitted on training runs.

Shapes: N samples, C channels, M budgets. PSNR in dB, of the pictures to the unaccelerated run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # relative to the regressors' variance
_LEAST_SCALE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Difficulty:
    """A fitted regression; float32 on the CPU."""

    center: torch.Tensor  # [2 C]
    scale: torch.Tensor  # [2 C]
    weights: torch.Tensor  # [2 C, M]
    intercept: torch.Tensor  # [M]

    def expected(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """PSNR [N, M] in dB, of step 0's feature [N, L, C] of each guidance branch."""
        return self.of_pooled(pooled(features))

    def of_pooled(self, regressors: torch.Tensor) -> torch.Tensor:
        """`expected`, of what `pooled` says."""
        return (regressors.cpu() - self.center) / self.scale @ self.weights + self.intercept

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in ("center", "scale", "weights", "intercept")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], channels: int, budgets: int) -> Difficulty:
        """Checked tensors.

        Raises:
            ValueError: naming every tensor that is missing, unknown, of another shape or not finite.
        """
        pool = (2 * channels,)
        shapes = {"center": pool, "scale": pool, "weights": (*pool, budgets), "intercept": (budgets,)}
        problems = [f"{name}: missing" for name in shapes if name not in tensors]
        problems += [f"{name}: unknown" for name in tensors if name not in shapes]
        for name, value in tensors.items():
            if name in shapes and tuple(value.shape) != shapes[name]:
                problems.append(f"{name}: has shape {tuple(value.shape)}, expected {shapes[name]}")
            elif not torch.isfinite(value).all():
                problems.append(f"{name}: is not finite")
        if not problems and not bool((tensors["scale"] > 0).all()):
            problems.append("scale: must be above zero")
        if problems:
            raise ValueError("difficulty: " + "; ".join(problems))
        return cls(**{name: value.float() for name, value in tensors.items()})


def pooled(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean and deviation [N, 2 C] over the tokens of features [N, L, C], the mean over guidance branches."""
    with torch.no_grad():
        held = [feature.detach().float() for feature in features]
        parts = [torch.cat([f.mean(dim=1), f.std(dim=1, correction=0)], dim=1) for f in held]
        return torch.stack(parts).mean(dim=0)


def fit(regressors: torch.Tensor, quality: torch.Tensor) -> tuple[Difficulty, torch.Tensor]:
    """The regression with the ridge that predicts left-out samples best.

    Args:
        regressors: [N, 2 C] of `pooled`.
        quality: PSNR [N, M] in dB.

    Returns:
        The regression, and what it says [N, M] of each sample when fitted without it.
    """
    raw, values = regressors.double(), quality.double()
    count = len(raw)
    center, scale = raw.mean(dim=0), raw.std(dim=0, correction=0).clamp_min(_LEAST_SCALE)
    mean = values.mean(dim=0)
    u, singular, vt = torch.linalg.svd((raw - center) / scale, full_matrices=False)
    along = u.T @ (values - mean)
    best: tuple[float, float, torch.Tensor] | None = None
    for ridge in RIDGES:
        shrunk = singular**2 / (singular**2 + count * ridge)
        leverage = (u**2 @ shrunk + 1 / count)[:, None].clamp_max(1 - 1e-9)
        residual = (values - mean - u @ (shrunk[:, None] * along)) / (1 - leverage)  # of each sample left out
        error = float((residual**2).mean())
        if best is None or error < best[0]:
            best = (error, ridge, values - residual)
    assert best is not None
    _, ridge, left_out = best
    weights = vt.T @ ((singular / (singular**2 + count * ridge))[:, None] * along)
    fitted = Difficulty(center.float(), scale.float(), weights.float(), mean.float())
    return fitted, left_out.float()
