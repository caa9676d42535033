"""A workload's model without its weights: from the headers of its files, or from the table of published models."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lesa.errors import LesaError
from lesa.models.families import FAMILIES
from lesa.models.flops import Grid
from lesa.models.published import FRAMES_PER_LATENT, PIXELS_PER_TOKEN, PRESETS, Preset, meta_transformer
from lesa.params import CallParams, ModelParams

_MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format
_QWEN_TEXT = 128  # tokens of a prompt of ordinary length; its pipeline pads to no fixed number


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a pipeline consists of."""

    name: str
    transformer: torch.nn.Module  # on the meta device
    numbers: dict[str, int]  # parameters of every part
    grid: Grid  # image tokens of the workload's call
    text_tokens: int
    is_local: bool
    preset: Preset | None  # of a published model


def model_facts(workload: str, model: ModelParams, call: CallParams, *, is_trained_here: bool = False) -> ModelFacts:
    """The facts of a workload's model.

    Args:
        workload: its name.
        is_trained_here: whether the workload's first stage makes the model, for the message where it is absent.

    Raises:
        ValueError: neither a folder here nor a published model.
    """
    folder = Path(model.source)
    preset = preset_of(workload, model.source)
    if (folder / "model_index.json").is_file():
        transformer = _from_folder(folder, FAMILIES[model.family].transformer_class)
        numbers = {part.name: _numbers(part) for part in sorted(folder.iterdir()) if part.is_dir()}
        numbers = {name: count for name, count in numbers.items() if count}
        if "transformer" not in numbers:
            raise LesaError(f"{folder}/transformer: no weights in safetensors files")
        pixels, frames = _autoencoder(folder)
    elif preset is not None:
        transformer = meta_transformer(preset.name)
        numbers = {"transformer": sum(p.numel() for p in transformer.parameters()), **preset.parts}
        pixels, frames = PIXELS_PER_TOKEN, FRAMES_PER_LATENT
    elif is_trained_here:
        raise LesaError(
            f"model.source: {folder} is not here; make it first: python -m flows.base --workload {workload}"
        )
    else:
        known = ", ".join(p.source for p in PRESETS.values() if p.source)
        raise LesaError(
            f"model.source: {model.source} is no pipeline folder here and none of {known}: "
            "its size is not known before it is there"
        )
    return ModelFacts(
        name=preset.name if preset is not None else model.source,
        transformer=transformer,
        numbers=numbers,
        grid=_grid(call, pixels, frames),
        text_tokens=_text_tokens(model.family, call.max_sequence_length),
        is_local=model.source.startswith(("data/", "/", "./", "../")) or folder.is_dir(),
        preset=preset,
    )


def preset_of(workload: str, source: str) -> Preset | None:
    """The published model of a workload: by its hub id, or by the workload's name where that has none."""
    for preset in PRESETS.values():
        if preset.source == source or (preset.source is None and preset.name == workload):
            return preset
    return None


def _grid(call: CallParams, pixels_per_token: int, frames_per_latent: int) -> Grid:
    frames = 1 if call.num_frames is None else (call.num_frames - 1) // frames_per_latent + 1
    return frames, call.height // pixels_per_token, call.width // pixels_per_token


def _text_tokens(family: str, max_sequence_length: int | None) -> int:
    if family == "qwen-image":
        return min(_QWEN_TEXT, max_sequence_length or _QWEN_TEXT)
    return max_sequence_length or {"flux": 512, "hunyuan-video": 256}.get(family, 512)


def _from_folder(folder: Path, class_name: str) -> torch.nn.Module:
    import diffusers

    path = folder / "transformer/config.json"
    config = _json(path)
    if (name := config.get("_class_name")) != class_name:
        raise LesaError(f"{folder}: transformer: got {name!r}, the workload's family has {class_name!r}")
    try:
        with torch.device("meta"):
            return getattr(diffusers, class_name).from_config(config)
    except (TypeError, RuntimeError) as error:
        raise LesaError(f"{path}: no {class_name} can be made from it ({error})") from None


def _autoencoder(folder: Path) -> tuple[int, int]:
    """Pixels a token (patches of 2) and frames a latent frame."""
    path = folder / "vae/config.json"
    config = _json(path)
    if "spatial_compression_ratio" in config:
        return 2 * config["spatial_compression_ratio"], config["temporal_compression_ratio"]
    if "temperal_downsample" in config:
        return 2 * 2 ** len(config["temperal_downsample"]), FRAMES_PER_LATENT
    if "block_out_channels" not in config:
        raise LesaError(f"{path}: says nothing of how much smaller the latents are than the image")
    return 2 ** len(config["block_out_channels"]), FRAMES_PER_LATENT


def _numbers(part: Path) -> int:
    """Parameters in a folder's safetensors files, from their headers."""
    return sum(_numbers_of_file(path) for path in sorted(part.glob("*.safetensors")))


def _numbers_of_file(path: Path) -> int:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise LesaError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != whole:
            raise LesaError(f"{path.stat().st_size} bytes, its header says {whole}")
        return sum(math.prod(entry["shape"]) for entry in header.values())
    except (ValueError, struct.error, AttributeError, KeyError, TypeError) as error:
        raise LesaError(f"{path}: not a safetensors file, or a torn one ({error})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LesaError(f"{path} does not exist: it belongs to every saved pipeline") from None
    except ValueError as error:
        raise LesaError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise LesaError(f"{path}: must be an object")
    return value
