"""Resumable training state: a new folder a checkpoint, committed by rename; the two newest stay.

A checkpoint holds the experts, the optimiser, the iteration and the best state so far. Batches are drawn from
generators seeded by (seed, iteration), so the iteration is the whole of the RNG state and the data order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import nn

from lesa import atomic
from lesa.strict_json import parse

KEPT = 2
_MAX_RECORD = 1 << 16  # bytes of state.json
_NAME = re.compile(r"iteration-(\d{8})")


@dataclass
class TrainingState:
    """What a loop needs to go on."""

    iteration: int  # optimiser steps done
    best_loss: float | None  # lowest validation loss so far
    best: dict[str, torch.Tensor]  # the experts' state at that loss


def save_checkpoint(
    folder: Path, key: str, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState
) -> Path:
    """Commit `<folder>/iteration-<n>`; of what lies there, it and the newest one before it stay.

    A later iteration is torn or another run's, or this run would have gone on from it: it must not push ours out.

    Args:
        folder: of this training run alone.
        key: identity of the run (settings and data); a checkpoint of another is never resumed.
    """
    atomic.make_dirs(folder)
    tensors = {f"module/{name}": tensor.contiguous() for name, tensor in module.state_dict().items()}
    tensors |= {f"best/{name}": tensor.contiguous() for name, tensor in state.best.items()}
    tensors |= _optimizer_tensors(optimizer)
    data = serialise_tensors(tensors)
    final = folder / f"iteration-{state.iteration:08d}"
    record = {
        "key": key,
        "iteration": state.iteration,
        "best_loss": state.best_loss,
        "sha256": atomic.sha256_bytes(data),
    }
    with atomic.new_dir(final, replace=True) as partial:
        atomic.write_bytes(partial / "state.safetensors", data)
        atomic.write_json(partial / "state.json", record)
    names = [path for path in _checkpoints(folder) if path.name <= final.name]
    for old in set(_checkpoints(folder)) - set(names[:KEPT]):
        atomic.remove_dir(old)
    return final


def load_checkpoint(
    folder: Path, key: str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> TrainingState | None:
    """Restore the newest intact checkpoint of this run; None when there is none.

    A torn or altered checkpoint is passed over for the one before it, and so is one of other tensors: an earlier
    version of the experts wrote it.
    """
    if not folder.is_dir():
        return None
    atomic.sweep_partials(folder)
    for path in _checkpoints(folder):
        try:
            record = parse((path / "state.json").read_bytes(), max_bytes=_MAX_RECORD)
            data = (path / "state.safetensors").read_bytes()
            if record["key"] != key or record["sha256"] != atomic.sha256_bytes(data):
                continue
            tensors = parse_tensors(data)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
        held = _part(tensors, "module/")
        if _shapes(held) != _shapes(module.state_dict()):
            continue
        module.load_state_dict(held)
        _restore_optimizer(optimizer, tensors)
        return TrainingState(record["iteration"], record["best_loss"], _part(tensors, "best/"))
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"optimizer/{index}/{name}": value.contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in _part(tensors, "optimizer/").items():
        index, field = name.split("/")
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
