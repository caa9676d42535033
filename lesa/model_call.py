"""What a transformer is called with, made up from its configuration: to count on the meta device, or to time.

Shapes: B samples, L image tokens, T text tokens.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from lesa.families import family_of

Grid = tuple[int, int, int]  # image tokens: latent frames, rows, columns
_TIMESTEP_STEPS = 1000.0  # HunyuanVideo takes timesteps and guidance in thousands, the others in units


def call_inputs(
    transformer: torch.nn.Module,
    grid: Grid,
    text_tokens: int,
    *,
    batch: int = 1,
    guidance: float = 3.5,  # for models with distilled guidance
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of one call at the first step, drawn from torch's global generator.

    Raises:
        ValueError: a transformer outside the table of families, or a family without a row here.
    """
    family = family_of(transformer)
    if family.name not in _CALLS:
        raise ValueError(f"{family.name}: how it is called is not known here; add a row to lesa.model_call")
    make = _Make(batch, device, dtype)
    return _CALLS[family.name](transformer.config, grid, text_tokens, guidance, make)


class _Make:
    """Tensors of a call."""

    def __init__(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.batch, self._kind = batch, {"device": device, "dtype": dtype}

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, *shape, **self._kind)

    def full(self, value: float, *shape: int) -> torch.Tensor:
        return torch.full((self.batch, *shape), value, **self._kind)

    def positions(self, grid: Grid) -> torch.Tensor:
        """[L, 3]: nothing, row, column."""
        _, rows, columns = grid
        ids = torch.zeros(rows, columns, 3, **self._kind)
        ids[..., 1] += torch.arange(rows, **self._kind)[:, None]
        ids[..., 2] += torch.arange(columns, **self._kind)[None, :]
        return ids.reshape(rows * columns, 3)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, **self._kind)


def _flux(config: Any, grid: Grid, text: int, guidance: float, make: _Make) -> dict[str, Any]:
    return {
        "hidden_states": make.noise(prod(grid), config.in_channels),
        "encoder_hidden_states": make.noise(text, config.joint_attention_dim),
        "pooled_projections": make.noise(config.pooled_projection_dim),
        "timestep": make.full(1.0),
        "img_ids": make.positions(grid),
        "txt_ids": make.zeros(text, 3),
        "guidance": make.full(guidance) if config.guidance_embeds else None,
    }


def _qwen(config: Any, grid: Grid, text: int, guidance: float, make: _Make) -> dict[str, Any]:
    return {
        "hidden_states": make.noise(prod(grid), config.in_channels),
        "encoder_hidden_states": make.noise(text, config.joint_attention_dim),
        "timestep": make.full(1.0),
        "img_shapes": [[grid]] * make.batch,
    }


def _hunyuan(config: Any, grid: Grid, text: int, guidance: float, make: _Make) -> dict[str, Any]:
    frames, rows, columns = grid
    steps, patch = config.patch_size_t, config.patch_size
    return {
        "hidden_states": make.noise(config.in_channels, frames * steps, rows * patch, columns * patch),
        "encoder_hidden_states": make.noise(text, config.text_embed_dim),
        "encoder_attention_mask": make.full(1.0, text),
        "pooled_projections": make.noise(config.pooled_projection_dim),
        "timestep": make.full(_TIMESTEP_STEPS),
        "guidance": make.full(guidance * _TIMESTEP_STEPS) if config.guidance_embeds else None,
    }


_CALLS = {"flux": _flux, "qwen-image": _qwen, "hunyuan-video": _hunyuan}
