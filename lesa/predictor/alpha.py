"""alpha = KAN(dt_0, ..., dt_{K-1}): how far along z a prediction goes (LESA, arXiv 2602.20497).

`dt_i` is the noise level of the i-th newest history entry minus that of the predicted step: offsets in sigma, so that
one expert serves any step count. Offsets are scaled to [-1, 1] by the range seen in training (`low`, `high`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from lesa.schedule import Schedule

KAN_LAYERS = 2  # history offsets -> hidden -> alpha
MIN_RANGE = 1e-5  # a narrower range of offsets is one point and rounding: scaled up, it would be noise


def gate_shapes(kind: str, history_size: int, hidden: int, grid: int, num_steps: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a gate's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"low": (history_size,), "high": (history_size,)}
    if kind == "kan":
        for layer, (inputs, outputs) in enumerate(((history_size, hidden), (hidden, 1))):
            shapes |= {f"kan.{layer}.{name}": shape for name, shape in layer_shapes(inputs, outputs, grid).items()}
    elif kind == "mlp":
        shapes |= {
            "mlp.in.weight": (hidden, history_size),
            "mlp.in.bias": (hidden,),
            "mlp.out.weight": (1, hidden),
            "mlp.out.bias": (1,),
        }
    else:
        shapes["table"] = (num_steps,)
    return shapes


def history_steps(schedule: Schedule, step: int, size: int, history: str) -> tuple[int, ...]:
    """The steps a prediction of `step` looks back on, newest first: full steps, or simply the steps before."""
    if history == "full_steps":
        return schedule.anchors(step, size)
    return tuple(range(step - 1, max(step - 1 - size, -1), -1))


def time_offsets(sigmas: torch.Tensor, step: int, past: Sequence[int]) -> torch.Tensor:
    """[K] noise-level offsets of the history steps `past` (newest first) from `step`; all positive."""
    return sigmas[list(past)] - sigmas[step]


def linear_alpha(dt: torch.Tensor) -> torch.Tensor:
    """[N] alphas of first-order extrapolation for offsets [N, K]: `dt_0 / (dt_1 - dt_0)`."""
    return dt[:, 0] / (dt[:, 1] - dt[:, 0])


def scale_offsets(dt: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Offsets [N, K] scaled to [-1, 1] by the trained range; a range of one point maps to 0."""
    wide = high - low > MIN_RANGE
    width = torch.where(wide, high - low, torch.ones_like(high))
    return torch.where(wide, 2 * (dt - low) / width - 1, torch.zeros_like(dt))


def evaluate_alpha(
    kind: str, tensors: Mapping[str, torch.Tensor], dt: torch.Tensor, steps: Sequence[int]
) -> torch.Tensor:
    """[N] alphas for offsets [N, K] of the given step indices, from exported tensors."""
    if kind == "table":
        return tensors["table"][list(steps)]
    x = scale_offsets(dt, tensors["low"], tensors["high"])
    if kind == "kan":
        return kan(x, tensors, "kan.", KAN_LAYERS)[:, 0]
    hidden = torch.tanh(x @ tensors["mlp.in.weight"].T + tensors["mlp.in.bias"])
    return (hidden @ tensors["mlp.out.weight"].T + tensors["mlp.out.bias"])[:, 0]


def out_of_range(dt: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """[N] whether any offset lies outside the trained range by more than rounding."""
    slack = 1e-3 * (high - low).clamp_min(1e-3)
    return ((dt < low - slack) | (dt > high + slack)).any(dim=1)


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
