"""Which of a transformer's image tokens are the picture being made, told from the arguments of one call.

Editing pipelines append the tokens of reference pictures and throw away what the transformer says of them
(`noise_pred[:, : latents.size(1)]`): the first tokens are the ones to predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the tokens of the picture being made lie."""

    frames: int
    rows: int  # in tokens or, where the transformer makes the tokens itself, in latents
    columns: int
    latents_per_side: int  # 2 where 2 x 2 latents are packed into a token, 1 for latents
    num_tokens: int | None  # how many leading image tokens they are; None: all of them


def by_ids(given: Mapping[str, Any]) -> Grid | None:
    """FLUX: `img_ids` [L, 3] of picture, row and column; the picture being made is number 0 and comes first."""
    ids = given.get("img_ids")
    if not isinstance(ids, torch.Tensor):
        return None
    flat = ids[0] if ids.ndim == 3 else ids
    own = flat[flat[:, 0] == 0]
    rows, columns = (own[:, 1:3].amax(dim=0) + 1).int().tolist()
    return Grid(1, rows, columns, 2, len(own))


def by_shapes(given: Mapping[str, Any]) -> Grid | None:
    """Qwen-Image: `img_shapes`, a list of (frames, rows, columns) a sample, the picture being made first."""
    shapes = given.get("img_shapes")
    if not shapes:
        return None
    first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
    frames, rows, columns = (int(size) for size in first)
    return Grid(frames, rows, columns, 2, frames * rows * columns)


def by_latents(given: Mapping[str, Any]) -> Grid | None:
    """Video transformers that are given the latents themselves, `hidden_states` [B, C, F, H, W]."""
    latents = given.get("hidden_states")
    if not (isinstance(latents, torch.Tensor) and latents.ndim == 5):
        return None
    frames, rows, columns = latents.shape[2:]
    return Grid(frames, rows, columns, 1, None)
