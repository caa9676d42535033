"""z = W [h_t, ..., h_{t-K+1}] + b: the linear projection of the history (LESA, arXiv 2602.20497).

Three forms of W share a per-channel part, which holds the start as first-order extrapolation:
    per_channel  z_c = sum_k scale_kc h_kc + bias_c
    low_rank     the same + up (down [h])
    dense        the same + weight [h]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
import torch.nn.functional as F


def projection_shapes(kind: str, channels: int, history_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a projection's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"scale": (history_size, channels), "bias": (channels,)}
    if kind == "dense":
        shapes["weight"] = (channels, history_size * channels)
    elif kind == "low_rank":
        shapes |= {"down": (rank, history_size * channels), "up": (channels, rank)}
    return shapes


def initial_projection(
    kind: str, channels: int, history_size: int, rank: int, start: str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tensors of a fresh projection: newest minus second newest (`extrapolation`), or `random`."""
    shapes = projection_shapes(kind, channels, history_size, rank)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    bound = (history_size * channels) ** -0.5

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) * bound

    if start == "extrapolation":
        tensors["scale"][0], tensors["scale"][1] = 1.0, -1.0
    else:
        tensors["scale"] = draw(shapes["scale"])
        if kind == "dense":
            tensors["weight"] = draw(shapes["weight"])
    if kind == "low_rank":  # one factor must not be zero, or neither ever learns
        tensors["down"] = draw(shapes["down"])
    return tensors


def project(features: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """z [..., C] of a history of K features [..., C], newest first."""
    scaled = [scale * feature for scale, feature in zip(tensors["scale"], features, strict=True)]
    z = reduce(torch.add, scaled) + tensors["bias"]
    if "weight" in tensors:
        z = z + F.linear(torch.cat(list(features), dim=-1), tensors["weight"])
    elif "down" in tensors:
        z = z + F.linear(F.linear(torch.cat(list(features), dim=-1), tensors["down"]), tensors["up"])
    return z


def fold(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same projection for sampling: a dense weight swallows the per-channel part, one matrix product is left."""
    if "weight" not in tensors:
        return dict(tensors)
    if "scale" not in tensors:
        return {"folded": tensors["weight"]}
    history_size, channels = tensors["scale"].shape
    weight = tensors["weight"].clone().view(channels, history_size, channels)
    index = torch.arange(channels)
    for k in range(history_size):
        weight[index, k, index] += tensors["scale"][k]
    return {"folded": weight.view(channels, -1), "bias": tensors["bias"]}


def without_channel_part(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices alone, where the per-channel part and the bias are kept elsewhere; empty where there are none."""
    return {name: tensor for name, tensor in tensors.items() if name in ("weight", "down", "up")}


def project_folded(features: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`project` for tensors that went through `fold`."""
    if "folded" in tensors:
        return F.linear(torch.cat(list(features), dim=-1), tensors["folded"], tensors.get("bias"))
    if "scale" not in tensors:
        return F.linear(F.linear(torch.cat(list(features), dim=-1), tensors["down"]), tensors["up"])
    return project(features, tensors)
