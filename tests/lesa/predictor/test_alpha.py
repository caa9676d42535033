"""What gives alpha: offsets in noise level, their scaling, and the three gates."""

from __future__ import annotations

import math

import pytest
import torch

from lesa.predictor.alpha import (
    evaluate_alpha,
    gate_shapes,
    history_steps,
    linear_alpha,
    out_of_range,
    scale_offsets,
    time_offsets,
)
from lesa.predictor.spec import GATES
from lesa.schedule import Schedule

SCHEDULE = Schedule.uniform(12, 4, warmup_steps=2)  # full 0 1 2 6 10


def test_history_steps_of_either_reading() -> None:
    assert history_steps(SCHEDULE, 8, 3, "full_steps") == (6, 2, 1)
    assert history_steps(SCHEDULE, 8, 3, "steps") == (7, 6, 5)
    assert history_steps(SCHEDULE, 2, 3, "full_steps") == (1, 0)
    assert history_steps(SCHEDULE, 2, 3, "steps") == (1, 0)
    assert history_steps(SCHEDULE, 3, 3, "steps") == (2, 1, 0)
    assert history_steps(SCHEDULE, 0, 3, "steps") == ()


def test_offsets_are_noise_levels_above_the_step() -> None:
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert time_offsets(sigmas, 3, (2, 0)).tolist() == [0.25, 0.75]


def test_linear_alpha_extrapolates_lines_exactly() -> None:
    sigmas = torch.tensor([1.0, 0.9, 0.65, 0.3, 0.0])
    line = 3.0 - 2.0 * sigmas
    dt = time_offsets(sigmas, 3, (2, 1))[None]
    assert float(linear_alpha(dt)) == pytest.approx(0.35 / 0.25)
    predicted = line[2] + linear_alpha(dt)[0] * (line[2] - line[1])
    assert float(predicted) == pytest.approx(float(line[3]))


def test_scaling_maps_the_trained_range_to_one() -> None:
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.2])
    scaled = scale_offsets(torch.tensor([[0.1, 0.2], [0.2, 0.2], [0.3, 0.7]]), low, high)
    torch.testing.assert_close(scaled, torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))


def test_a_range_of_rounding_errors_is_one_point() -> None:
    """Equal steps in sigma give equal offsets but for the last bit; scaled up, it would decide alpha."""
    line = torch.linspace(1, 0, 51)
    dt = torch.stack([time_offsets(line, step, (step - 1, step - 2)) for step in range(2, 50)])
    low, high = dt.amin(dim=0), dt.amax(dim=0)
    assert (high > low).any()
    assert not scale_offsets(dt, low, high).any()
    assert not scale_offsets(dt.double(), low.double(), high.double()).any()


def test_out_of_range_tells_more_than_rounding() -> None:
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.2])
    dt = torch.tensor([[0.1, 0.2], [0.3 + 1e-7, 0.2 - 1e-7], [0.31, 0.2], [0.2, 0.21], [0.05, 0.2]])
    assert out_of_range(dt, low, high).tolist() == [False, False, True, True, True]


def test_each_gate_by_hand() -> None:
    bounds = {"low": torch.tensor([0.0]), "high": torch.tensor([2.0])}
    dt = torch.tensor([[1.0], [2.0]])  # scaled: 0 and 1
    table = bounds | {"table": torch.tensor([5.0, 6.0, 7.0])}
    assert evaluate_alpha("table", table, dt, [2, 0]).tolist() == [7.0, 5.0]
    mlp = bounds | {
        "mlp.in.weight": torch.tensor([[2.0]]),
        "mlp.in.bias": torch.tensor([0.5]),
        "mlp.out.weight": torch.tensor([[3.0]]),
        "mlp.out.bias": torch.tensor([-1.0]),
    }
    expected = torch.tensor([3 * math.tanh(0.5) - 1, 3 * math.tanh(2.5) - 1])
    torch.testing.assert_close(evaluate_alpha("mlp", mlp, dt, [0, 1]), expected)
    # Constant coefficients give a constant inside the grid, here one interval [-1, 1]; base adds silu.
    grid = (torch.arange(8.0)[None] - 3) * 2 - 1
    layer = {"grid": grid, "coef": torch.full((1, 1, 4), 0.5), "base": torch.ones(1, 1)}
    kan = bounds | {f"kan.{i}.{name}": t for i in (0, 1) for name, t in layer.items()}
    inner = 0.5  # at 0, where silu is 0
    expected = torch.tensor([0.5 + inner / (1 + math.exp(-inner))])
    torch.testing.assert_close(evaluate_alpha("kan", kan, torch.tensor([[1.0]]), [0]), expected)


@pytest.mark.parametrize("kind", GATES)
def test_shapes_are_those_alpha_reads(kind: str) -> None:
    shapes = gate_shapes(kind, 3, 4, 5, 12)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for layer in (0, 1) if kind == "kan" else ():
        tensors[f"kan.{layer}.grid"] = (
            torch.arange(shapes[f"kan.{layer}.grid"][1]).float().expand(shapes[f"kan.{layer}.grid"])
        )
    assert evaluate_alpha(kind, tensors, torch.rand(6, 3), range(6)).tolist() == [0.0] * 6
