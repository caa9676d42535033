"""One trainable expert: a projection of the history and the gate that gives alpha. The only importer of pykan."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lesa.errors import LesaError
from lesa.params import PredictorParams
from lesa.predictor import projection as projections
from lesa.predictor.alpha import linear_alpha, scale_offsets
from lesa.training.whitened_projection import WhitenedProjection

WARM_START_ITERATIONS = 200
WARM_START_TOLERANCE = 0.02  # of the largest alpha: a start further from first-order extrapolation is refused


class Expert(nn.Module):
    """`h_hat = h_t + alpha z` with z and alpha trainable (LESA, arXiv 2602.20497).

    Args:
        params: form of projection and gate.
        channels: C.
        history_size: K.
        offsets: [N, K] noise-level offsets of every step it may be asked for; they fix the gate's input range and
            the points at which the gate starts as first-order extrapolation.
        steps: N step indices of those offsets.
        num_steps: steps of a run (length of a `table` gate).
        relative: whether the gate multiplies first-order extrapolation instead of giving alpha itself (`MIXED`).
        seed: of the initial values.
    """

    def __init__(
        self,
        params: PredictorParams,
        *,
        channels: int,
        history_size: int,
        offsets: torch.Tensor,
        steps: Sequence[int],
        num_steps: int,
        relative: bool = False,
        seed: int,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kind, self.relative = params.gate, relative
        initial = projections.initial_projection(
            params.projection, channels, history_size, params.rank, params.start, generator
        )
        self.projection = WhitenedProjection(initial)
        offsets = offsets.float()
        self.register_buffer("low", offsets.amin(dim=0))
        self.register_buffer("high", offsets.amax(dim=0))
        self.gate = _new_gate(params, history_size, num_steps, generator)
        if params.start == "extrapolation":
            self._start_as_extrapolation(offsets, steps)

    def alpha(self, offsets: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
        """[N] alphas for offsets [N, K] of the given steps."""
        value = self._gate_value(offsets, steps)
        return value * linear_alpha(offsets) if self.relative else value

    def _gate_value(self, offsets: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
        if isinstance(self.gate, _Table):
            return self.gate(steps)
        return self.gate(scale_offsets(offsets, self.low, self.high))[:, 0]

    def project(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """z of K features [..., C], newest first."""
        return projections.project(features, self.projection.tensors())

    def export(self) -> dict[str, torch.Tensor]:
        """Tensors by the names `lesa.predictor.predictor.Predictor` knows, without the expert's prefix."""
        tensors = {f"projection.{name}": value for name, value in self.projection.tensors().items()}
        tensors |= {"gate.low": self.low, "gate.high": self.high}
        tensors |= {f"gate.{name}": value for name, value in _export_gate(self.gate).items()}
        return {name: value.detach().cpu().clone() for name, value in tensors.items()}

    def load_export(self, projection: Mapping[str, torch.Tensor], gate: Mapping[str, torch.Tensor]) -> None:
        """Take over exported tensors, as `export` gives them, without their `projection.` and `gate.` prefixes."""
        with torch.no_grad():
            self.projection.load(projection)
            self.low.copy_(gate["low"])
            self.high.copy_(gate["high"])
            _import_gate(self.gate, gate)

    def parameter_groups(self, learning_rate: float, gate_learning_rate: float) -> list[dict[str, Any]]:
        """Projection and gate as AdamW groups: their natural step sizes differ by orders of magnitude."""
        trainable = [parameter for parameter in self.gate.parameters() if parameter.requires_grad]
        return [
            *self.projection.parameter_groups(learning_rate),
            {"params": trainable, "lr": gate_learning_rate, "weight_decay": 0.0},
        ]

    def _start_as_extrapolation(self, offsets: torch.Tensor, steps: Sequence[int]) -> None:
        """Fit the gate so that alpha is `dt_0 / (dt_1 - dt_0)` at the given offsets."""
        target = torch.ones(len(offsets)) if self.relative else linear_alpha(offsets)
        if isinstance(self.gate, _Table):
            self.gate.set(steps, target)
            return
        optimizer = torch.optim.LBFGS(
            [p for p in self.gate.parameters() if p.requires_grad],
            max_iter=WARM_START_ITERATIONS,
            history_size=50,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (self._gate_value(offsets, steps) - target).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            error, largest = (self._gate_value(offsets, steps) - target).abs().max(), target.abs().max()
        if not error <= WARM_START_TOLERANCE * largest:
            raise LesaError(
                f"predictor.start: the gate ({self.kind}) misses first-order extrapolation by {float(error):.3g} where "
                f"alpha reaches {float(largest):.3g}: raise predictor.hidden or predictor.grid, or start random"
            )


class _Table(nn.Module):
    """A scalar for each step, whatever its time offsets."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(num_steps))

    def set(self, steps: Sequence[int], values: torch.Tensor) -> None:
        with torch.no_grad():
            self.values[list(steps)] = values

    def forward(self, steps: Sequence[int]) -> torch.Tensor:
        return self.values[list(steps)]


def _new_gate(params: PredictorParams, history_size: int, num_steps: int, generator: torch.Generator) -> nn.Module:
    if params.gate == "table":
        return _Table(num_steps)
    if params.gate == "mlp":
        linear = nn.utils.skip_init  # draws nothing from the global generator
        network = nn.Sequential(
            linear(nn.Linear, history_size, params.hidden), nn.Tanh(), linear(nn.Linear, params.hidden, 1)
        )
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * history_size**-0.5)
        return network
    return _new_kan(history_size, params.hidden, params.grid, generator)


def _new_kan(inputs: int, hidden: int, grid: int, generator: torch.Generator) -> nn.Module:
    """A pykan network with our own seeded initial values, and the global seeds left as they were.

    pykan's constructor resets every global seed and, unless told otherwise, writes checkpoints; its own initial
    values come from a least-squares fit that is not reproducible to the bit.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    from kan import KAN

    try:
        network = KAN(
            width=[inputs, hidden, 1],
            grid=grid,
            k=3,
            symbolic_enabled=False,
            save_act=False,
            auto_save=False,
            seed=0,
        )
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
    for parameter in network.symbolic_fun.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for layer in network.act_fun:
            width = layer.coef.shape[0] ** -0.5
            layer.coef.copy_(0.1 * (2 * torch.rand(layer.coef.shape, generator=generator) - 1))
            layer.scale_base.copy_((2 * torch.rand(layer.scale_base.shape, generator=generator) - 1) * width)
            # Redundant beside coef: fixed at one, an export holds every number and can be trained further.
            layer.scale_sp.fill_(1.0).requires_grad_(False)
    return network


def _export_gate(gate: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(gate, _Table):
        return {"table": gate.values.detach().clone()}
    if isinstance(gate, nn.Sequential):
        first, last = gate[0], gate[2]
        return {
            "mlp.in.weight": first.weight.detach().clone(),
            "mlp.in.bias": first.bias.detach().clone(),
            "mlp.out.weight": last.weight.detach().clone(),
            "mlp.out.bias": last.bias.detach().clone(),
        }
    tensors = {}
    for index, layer in enumerate(gate.act_fun):
        tensors[f"kan.{index}.grid"] = layer.grid.detach().clone()
        tensors[f"kan.{index}.coef"] = layer.coef.detach().clone()
        tensors[f"kan.{index}.base"] = layer.scale_base.detach().clone()
    return tensors


def _import_gate(gate: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    if isinstance(gate, _Table):
        gate.values.copy_(tensors["table"])
    elif isinstance(gate, nn.Sequential):
        for name, layer in (("in", gate[0]), ("out", gate[2])):
            layer.weight.copy_(tensors[f"mlp.{name}.weight"])
            layer.bias.copy_(tensors[f"mlp.{name}.bias"])
    else:
        for index, layer in enumerate(gate.act_fun):
            layer.grid.copy_(tensors[f"kan.{index}.grid"])
            layer.coef.copy_(tensors[f"kan.{index}.coef"])
            layer.scale_base.copy_(tensors[f"kan.{index}.base"])
