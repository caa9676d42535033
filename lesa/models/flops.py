"""Floating-point operations of full and predicted steps, counted on the meta device: no weights needed.

A multiply-add is two operations, as the papers count. `torch.utils.flop_counter` counts matrix products,
convolutions and attention; element-wise work of the transformer is left out there, that of the rules is
added here by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch.utils.flop_counter import FlopCounterMode

from lesa.errors import LesaError
from lesa.models.families import blocks, family_of
from lesa.predictor.spec import PredictorSpec
from lesa.schedule import Schedule, stage_of_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """One call of a transformer, for one sample and one guidance branch."""

    total: float  # full step
    head: float  # what is left at a predicted step: embedders, norm_out, proj_out
    blocks: tuple[float, ...]  # each block, in execution order: some caches run the first or last ones at every step
    tokens: int  # image tokens L of the tapped feature
    channels: int  # width C of the tapped feature


class CallShapes:
    """Remembers the first call of a transformer as tensors without memory; use as a forward pre-hook."""

    def __init__(self) -> None:
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.call is None:
            self.call = (_on_meta(args), _on_meta(kwargs))


def count_transformer(
    transformer: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> ModelFlops:
    """Operations of `transformer(*args, **kwargs)` divided by the batch size of `hidden_states`.

    The transformer's class is built anew from its configuration on the meta device; `args` and `kwargs` may
    be meta tensors, since only shapes count.

    Raises:
        ValueError: for a transformer outside the table of families.
    """
    original = unwrap_module(transformer)
    family = family_of(original)
    with torch.device("meta"):
        model = type(original).from_config(original.config).eval()
    rows = blocks(model, family)
    tapped: list[torch.Size] = []
    model.norm_out.register_forward_pre_hook(lambda _, inputs: tapped.append(inputs[0].shape))
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(*_on_meta(args), **_on_meta(dict(kwargs)))
    by_module = {
        name.removeprefix(type(model).__name__ + "."): float(sum(operations.values()))
        for name, operations in counter.get_flop_counts().items()
    }
    batch, tokens, channels = tapped[0]
    total = float(counter.get_total_flops())
    inside = sum(by_module.get(name, 0.0) for name, _, _ in rows)
    return ModelFlops(
        total=total / batch,
        head=(total - inside) / batch,
        blocks=tuple(by_module.get(name, 0.0) / batch for name, _, _ in rows),
        tokens=int(tokens),
        channels=int(channels),
    )


def predictor_flops(spec: PredictorSpec, schedule: Schedule, sigmas: torch.Tensor, *, tokens: int) -> float:
    """Operations of a LESA predictor in one run, for one sample and one branch.

    z = W [h] is computed once an anchor and noise stage, then every predicted step is one multiply-add an
    element; alpha is evaluated when the schedule is fixed, once for all runs, and is not counted. With kind
    `per_step` the per-channel part is folded into the steps' own weights: differences once an anchor, then K
    multiply-adds, z, the bias and the feature itself.

    Args:
        spec: widths, history, projection.
        schedule: which steps are predicted.
        sigmas: [S + 1] noise levels.
        tokens: L of the tapped feature.
    """
    variant = spec.variant_for(schedule)
    kind = spec.kind_of(variant)
    sizes, stages = spec.sizes_of(variant), stage_of_steps(sigmas, spec.boundaries)
    projected = set()
    for step in schedule.predicted_steps:
        anchor = schedule.anchors(step, 1)[0] if spec.history == "full_steps" else step - 1
        projected.add((anchor, stages[step]))
    products = sum(_projection_flops(spec, kind, sizes[stage]) for _, stage in projected)
    if kind == "lesa":
        return tokens * (products + 2.0 * spec.channels * len(schedule.predicted_steps))
    differences = (spec.step_history - 1.0) * spec.channels * len({anchor for anchor, _ in projected})
    terms = 2.0 * spec.step_history + (0.0 if spec.projection == "per_channel" else 2.0) + 1.0
    return tokens * (products + differences + terms * spec.channels * len(schedule.predicted_steps))


def predictor_bytes(spec: PredictorSpec, *, tokens: int, element_size: int = 2) -> dict[str, int]:
    """Memory that one run with a predictor keeps, for one sample and branch: `features`, `derived`, `weights`.

    Derived is what is remembered between the steps after an anchor (z, differences); weights are those of one budget.

    Args:
        spec: the predictor.
        tokens: L of the tapped feature.
        element_size: bytes of a number; 2 in bfloat16.
    """
    per_step = spec.kind == "per_step"
    size = max(*spec.history_sizes, spec.step_history if per_step else 1)
    matrices = 0 if per_step and spec.projection == "per_channel" else 1
    derived = (size - 1 if per_step else 0) + matrices
    weights = spec.num_steps * (size + 1) * spec.channels if per_step else 0
    for history in spec.history_sizes:
        if spec.projection == "dense":
            weights += history * spec.channels**2
        elif spec.projection == "low_rank":
            weights += spec.rank * spec.channels * (history + 1)
        if not per_step:
            weights += (history + 1) * spec.channels
    feature = tokens * spec.channels * element_size
    return {"features": size * feature, "derived": derived * feature, "weights": weights * element_size}


def taylor_flops(order: int, schedule: Schedule, *, tokens: int, channels: int) -> float:
    """Operations of TaylorSeer's rule in one run: differences once an anchor, multiply-adds once a step."""
    anchors = {schedule.anchors(step, 1)[0] for step in schedule.predicted_steps}
    return 2.0 * order * tokens * channels * (len(anchors) + len(schedule.predicted_steps))


def _projection_flops(spec: PredictorSpec, kind: str, history_size: int) -> float:
    """Operations of one token's z."""
    channels, inputs = float(spec.channels), float(history_size * spec.channels)
    if spec.projection == "dense":  # the per-channel part is folded into the matrix
        return 2.0 * inputs * channels
    per_channel = 2.0 * inputs if kind == "lesa" else 0.0  # else folded into the steps' own weights
    if spec.projection == "low_rank":
        return per_channel + 2.0 * spec.rank * (inputs + channels)
    return per_channel


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, tuple | list):
        return type(value)(_on_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return value


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
        raise LesaError(f"{family.name}: how it is called is not known here; add a row to lesa.models.flops")
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
