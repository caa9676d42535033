"""A small evaluator of Kolmogorov-Arnold networks from their spline coefficients: alpha without pykan.

A layer maps x [N, I] to y [N, O] by `y_o = sum_i base_io silu(x_i) + sum_g coef_iog B_g(x_i)` with B-splines of order
`ORDER` on the extended grid of input i (KAN, arXiv 2404.19756, equations 2.10 to 2.13).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

ORDER = 3  # cubic, pykan's default


def layer_shapes(inputs: int, outputs: int, grid: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors for `grid` spline intervals."""
    return {
        "grid": (inputs, grid + 2 * ORDER + 1),
        "coef": (inputs, outputs, grid + ORDER),
        "base": (inputs, outputs),
    }


def kan(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], prefix: str, num_layers: int) -> torch.Tensor:
    """Evaluate the network whose layer l has tensors `{prefix}{l}.grid`, `.coef` and `.base`.

    Args:
        x: [N, I] inputs, inside the first layer's grid where the splines are to mean anything.

    Returns:
        [N, O] outputs.
    """
    for layer in range(num_layers):
        grid, coef, base = (tensors[f"{prefix}{layer}.{name}"] for name in ("grid", "coef", "base"))
        x = F.silu(x) @ base + torch.einsum("nig,iog->no", b_splines(x, grid), coef)
    return x


def b_splines(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Values [N, I, G] of the B-splines of order `ORDER` at x [N, I] on `grid` [I, G + ORDER + 1] (Cox-de Boor)."""
    x = x[:, :, None]
    knots = grid[None]
    value = ((x >= knots[:, :, :-1]) & (x < knots[:, :, 1:])).to(x.dtype)
    for order in range(1, ORDER + 1):
        left = (x - knots[:, :, : -(order + 1)]) / (knots[:, :, order:-1] - knots[:, :, : -(order + 1)])
        right = (knots[:, :, order + 1 :] - x) / (knots[:, :, order + 1 :] - knots[:, :, 1:-order])
        value = left * value[:, :, :-1] + right * value[:, :, 1:]
    return value
