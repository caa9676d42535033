"""The small evaluator against pykan, which it replaces at sampling time, and against B-splines by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lesa.predictor.alpha import b_splines, kan, layer_shapes
from lesa.training.expert import _export_gate, _new_kan


@pytest.mark.parametrize(("inputs", "hidden", "grid"), [(2, 3, 3), (3, 8, 5), (4, 5, 12)])
@pytest.mark.parametrize("reach", [1.0, 4.0])  # inside the grid, and far beyond it
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_pykan(inputs: int, hidden: int, grid: int, reach: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(inputs)
    network = _new_kan(inputs, hidden, grid, generator)
    with torch.no_grad():
        for layer in network.act_fun:
            layer.coef.copy_(torch.randn(layer.coef.shape, generator=generator) / 2)
    nn.Module.to(network, dtype)  # pykan's own `to` takes a dtype for a device
    x = reach * (2 * torch.rand(200, inputs, generator=generator) - 1)
    x[0], x[1] = 1.0, -1.0  # the ends of the grid, which the trained range is scaled to
    x[2] = network.act_fun[0].grid[0, 4]  # a knot
    tensors = {f"kan.{name.removeprefix('kan.')}": t for name, t in _export_gate(network).items()}
    for layer_number, sizes in enumerate(((inputs, hidden), (hidden, 1))):
        for name, shape in layer_shapes(*sizes, grid).items():
            assert tuple(tensors[f"kan.{layer_number}.{name}"].shape) == shape
    with torch.no_grad():
        expected = network(x.to(dtype))
    torch.testing.assert_close(kan(x.to(dtype), tensors, "kan.", 2), expected, rtol=1e-6, atol=1e-6)


def test_cubic_splines_by_hand() -> None:
    grid = torch.arange(-3.0, 9.0)[None]  # spacing 1, so a knot sees 1/6, 4/6, 1/6
    values = b_splines(torch.tensor([[0.0], [0.5]]), grid)
    torch.testing.assert_close(values[0, 0], torch.tensor([1 / 6, 4 / 6, 1 / 6, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(values[1, 0], torch.tensor([1 / 48, 23 / 48, 23 / 48, 1 / 48, 0, 0, 0, 0]))


def test_splines_sum_to_one_inside_and_vanish_far_outside() -> None:
    grid = (torch.arange(12.0)[None] - 3) * 0.4 - 1  # five intervals of [-1, 1], three more on either side
    inside = torch.linspace(-1, 1, 41)[:, None]
    torch.testing.assert_close(b_splines(inside, grid).sum(dim=-1), torch.ones(41, 1))
    assert not b_splines(torch.tensor([[-3.0], [3.0]]), grid).any()


def test_one_layer_by_hand() -> None:
    tensors = {
        "g0.grid": torch.arange(-3.0, 5.0)[None],  # one interval, [0, 1]
        "g0.coef": torch.tensor([[[6.0, 12.0, 18.0, 24.0]]]),
        "g0.base": torch.tensor([[2.0]]),
    }
    # At 0: splines 1/6, 4/6, 1/6, 0 give 1 + 8 + 3; silu(0) is 0.
    torch.testing.assert_close(kan(torch.zeros(1, 1), tensors, "g", 1), torch.tensor([[12.0]]))
