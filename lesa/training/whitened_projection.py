"""A projection in training: a change from where it starts, of whitened inputs, which make descent even.

Features of neighbouring full steps are nearly the same and the channels differ in size by orders of magnitude: an
optimiser that moves each number of `predictor.projection` by itself goes slowly along what they have in common. Here
the history of a channel, with a constant, is combined to inputs that go with none of the others and are of one size,
and outputs are in units of what the channel's prediction lacks; one learning rate suits all forms of W. Shapes: C
channels, K history entries, R = K + 1 regressors (the features, newest first, and a constant).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class WhitenedProjection(nn.Module):
    """Trainable numbers behind the tensors that `lesa.predictor.projection.project` takes.

    Until `whiten` is called, inputs are the features themselves.

    Args:
        start: tensors of a fresh projection, as `lesa.predictor.projection.initial_projection` gives them.
    """

    inputs: torch.Tensor
    unit: torch.Tensor

    def __init__(self, start: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = tuple(start)
        for name, tensor in start.items():
            self.register_buffer(f"start_{name}", tensor.clone())
        size, channels = start["scale"].shape
        self.register_buffer("inputs", torch.eye(size + 1).repeat(channels, 1, 1))
        self.register_buffer("unit", torch.ones(channels))
        moved = {"channel": torch.zeros(channels, size + 1)}
        moved |= {name: torch.zeros_like(start[name]) for name in ("weight", "down", "up") if name in start}
        self.moved = nn.ParameterDict(moved)
        self._fresh = True
        self._held: dict[str, torch.Tensor] | None = None

    def whiten(self, inputs: torch.Tensor, unit: torch.Tensor) -> None:
        """Set the combinations of inputs in which everything is learned from now on.

        Args:
            inputs: [C, R, R], a column each combination of regressors; the constant is in the last alone.
            unit: [C] by how much a parameter of one moves z.
        """
        with torch.no_grad():
            self.inputs.copy_(inputs)
            self.unit.copy_(unit)
            # A fresh `up` is zero, so `down` has no effect yet: its random directions become ones of whitened inputs.
            if "down" in self.names and self._fresh:
                down = self._by_channel(self.start_of("down"))
                self.start_of("down").copy_(self._in_features(down * 3**0.5).flatten(1))
            self._fresh = False

    def start_of(self, name: str) -> torch.Tensor:
        """The tensor before anything was learned."""
        return self.get_buffer(f"start_{name}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the tensors once for all that is predicted within: of one loss, before the optimiser's step."""
        before, self._held = self._held, self.tensors()
        try:
            yield
        finally:
            self._held = before

    def tensors(self) -> dict[str, torch.Tensor]:
        """The projection as it is now."""
        if self._held is not None:
            return self._held
        moved = self.unit[:, None] * (self.inputs @ self.moved["channel"][..., None])[..., 0]  # [C, R]
        tensors = {
            "scale": self.start_of("scale") + moved[:, :-1].T,
            "bias": self.start_of("bias") + moved[:, -1],
        }
        size, channels = tensors["scale"].shape
        # By the root of how many terms are summed up: numbers that move at random move a sum as far as one of them.
        if "down" in self.names:
            change = self._in_features(self._by_channel(self.moved["down"])).flatten(1)
            tensors["down"] = self.start_of("down") + change / (size * channels) ** 0.5
            rank = self.moved["up"].shape[1]
            tensors["up"] = self.start_of("up") + self.unit[:, None] * self.moved["up"] / rank**0.5
        elif "weight" in self.names:
            change = self._in_features(self._by_channel(self.moved["weight"])).flatten(1)
            tensors["weight"] = self.start_of("weight") + self.unit[:, None] * change / (size * channels) ** 0.5
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Start from these, exactly; what was learned since the old start is dropped."""
        with torch.no_grad():
            for name in self.names:
                self.start_of(name).copy_(tensors[name])
            for value in self.moved.values():
                value.zero_()
        self._fresh = False

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One AdamW group."""
        return [{"params": list(self.moved.parameters()), "lr": learning_rate}]

    def _by_channel(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, K, C] of a matrix [n, K C]."""
        return rows.unflatten(1, self.start_of("scale").shape)

    def _in_features(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights [n, K, C] of the combined inputs as weights of the features."""
        return torch.einsum("ckj,njc->nkc", self.inputs[:, :-1, :-1], rows)
