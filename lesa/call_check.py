"""Whether a pipeline's call is the one a bundle was made for, read from what its transformer is given."""

from __future__ import annotations

from typing import Any

import torch

from lesa.params import CallParams
from lesa.run_check import FirstCall

_GUIDANCE_TOLERANCE = 2.0**-7  # relative: guidance may come in bfloat16


def call_problems(pipe: Any, expected: CallParams, call: FirstCall) -> list[str]:
    """Every difference between the call under way and `expected`, in the pipeline's words.

    The strength of classifier-free guidance does not reach the transformer and is not seen here; whether
    there is an unconditional branch is.
    """
    given = call.kwargs
    problems = []
    for name, got in _size(pipe, given).items():
        want = getattr(expected, name)
        if want is not None and _rounded(pipe, given, name, want) != got:
            problems.append(f"{name}: got {got}, expected {want}")
    guidance = given.get("guidance")
    if isinstance(guidance, torch.Tensor) and expected.guidance_scale is not None:
        value = float(guidance.reshape(-1)[0])
        scales = (expected.guidance_scale, 1000 * expected.guidance_scale)  # HunyuanVideo passes the latter
        if all(abs(value - scale) > _GUIDANCE_TOLERANCE * abs(scale) for scale in scales):
            problems.append(f"guidance_scale: got {value:g}, expected {expected.guidance_scale:g}")
    text = given.get("txt_ids")  # pipelines that have it pad the text to a fixed length
    if isinstance(text, torch.Tensor) and expected.max_sequence_length is not None:
        length = text.shape[-2]
        if length != expected.max_sequence_length:
            problems.append(f"max_sequence_length: got {length}, expected {expected.max_sequence_length}")
    return problems


def _size(pipe: Any, given: Any) -> dict[str, int]:
    """Height, width and frames in pixels, as far as the transformer's arguments tell."""
    pixels = _pixels_per_token(pipe, given)
    ids, shapes, hidden = given.get("img_ids"), given.get("img_shapes"), given.get("hidden_states")
    if isinstance(ids, torch.Tensor):
        rows, columns = (ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(dim=0) + 1).int().tolist()
    elif shapes:
        first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        _, rows, columns = first
    elif isinstance(hidden, torch.Tensor) and hidden.ndim == 5:
        frames, rows, columns = hidden.shape[2:]
        step = getattr(pipe, "vae_scale_factor_temporal", 1)
        return {"height": rows * pixels, "width": columns * pixels, "num_frames": (frames - 1) * step + 1}
    else:
        return {}
    return {"height": rows * pixels, "width": columns * pixels}


def _pixels_per_token(pipe: Any, given: Any) -> int:
    if "img_ids" in given or "img_shapes" in given:
        return 2 * int(getattr(pipe, "vae_scale_factor", 8))  # 2 x 2 latents are packed into a token
    return int(getattr(pipe, "vae_scale_factor_spatial", 8))


def _rounded(pipe: Any, given: Any, name: str, want: int) -> int:
    """Pipelines round a size down to whole tokens."""
    if name == "num_frames":
        step = int(getattr(pipe, "vae_scale_factor_temporal", 1))
        return (want - 1) // step * step + 1
    pixels = _pixels_per_token(pipe, given)
    return want // pixels * pixels
