"""Whether a pipeline's call is the one a bundle was made for, read from what its transformer is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lesa.families import Family, family_of
from lesa.params import CallParams
from lesa.run_check import FirstCall
from lesa.tokens import Grid

_CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")  # diffusers' names
_TOLERANCE = 2.0**-7  # relative: guidance and timesteps may come in bfloat16


def call_problems(pipe: Any, expected: CallParams, call: FirstCall) -> list[str]:
    """Every difference between the call under way and `expected`, in the pipeline's words.

    The strength of classifier-free guidance does not reach the transformer and is not seen here; whether
    there is an unconditional branch is.
    """
    given, family = call.kwargs, family_of(call.transformer)
    problems = _timestep_problems(family, call) + _controlnet_problems(pipe, given)
    grid = None if family.grid is None else family.grid(given)
    if grid is not None:
        for name, got in _size(pipe, grid).items():
            want = getattr(expected, name)
            if want is not None and _rounded(pipe, grid, name, want) != got:
                problems.append(f"{name}: got {got}, expected {want}")
    guidance = given.get("guidance")
    if isinstance(guidance, torch.Tensor) and expected.guidance_scale is not None:
        value = float(guidance.reshape(-1)[0]) / family.guidance_factor
        if not _close(value, expected.guidance_scale):
            problems.append(f"guidance_scale: got {value:g}, expected {expected.guidance_scale:g}")
    text = given.get("txt_ids")  # pipelines that have it pad the text to a fixed length
    if isinstance(text, torch.Tensor) and expected.max_sequence_length is not None:
        length = text.shape[-2]
        if length != expected.max_sequence_length:
            problems.append(f"max_sequence_length: got {length}, expected {expected.max_sequence_length}")
    return problems


def _timestep_problems(family: Family, call: FirstCall) -> list[str]:
    """A pipeline may step with another scheduler than the one that was given."""
    scheduler, timestep = call.scheduler, call.kwargs.get("timestep")
    if scheduler is None or not isinstance(timestep, torch.Tensor):
        return []
    step = scheduler.step_index
    step = (getattr(scheduler, "begin_index", None) or 0) if step is None else step
    want = float(scheduler.timesteps[step]) * family.timestep_factor
    got = float(timestep.reshape(-1)[0])
    return [] if _close(got, want) else [f"timestep: got {got:g}, the scheduler says {want:g} at step {step}"]


def _controlnet_problems(pipe: Any, given: Mapping[str, Any]) -> list[str]:
    """Another pipeline that shares the transformer may be the one that is called: nobody allowed that one."""
    if getattr(pipe, "controlnet", None) is not None or all(given.get(name) is None for name in _CONTROLNET):
        return []
    return [
        f"ControlNet: got its residuals, expected none from {type(pipe).__name__}; enable LESA on the pipeline "
        "that is called"
    ]


def _close(value: float, expected: float) -> bool:
    return abs(value - expected) <= _TOLERANCE * abs(expected)


def _size(pipe: Any, grid: Grid) -> dict[str, int]:
    """Height, width and frames in pixels."""
    pixels = _pixels(pipe, grid)
    size = {"height": grid.rows * pixels, "width": grid.columns * pixels}
    if grid.latents_per_side == 1:
        size["num_frames"] = (grid.frames - 1) * getattr(pipe, "vae_scale_factor_temporal", 1) + 1
    return size


def _pixels(pipe: Any, grid: Grid) -> int:
    """Of one cell of the grid, each way."""
    factor: int = getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_scale_factor", 8)
    return grid.latents_per_side * factor


def _rounded(pipe: Any, grid: Grid, name: str, want: int) -> int:
    """Pipelines round a size down to whole tokens."""
    if name == "num_frames":
        step = int(getattr(pipe, "vae_scale_factor_temporal", 1))
        return (want - 1) // step * step + 1
    pixels = _pixels(pipe, grid)
    return want // pixels * pixels
