"""Recording in this process through the driver that the record stage uses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch

from lesa.params import Workload
from lesa.recording.drive import LocalRecorder, drive
from lesa.recording.plan import RecordingSize
from lesa.recording.record import CONDITIONING
from lesa.recording.store import TrajectoryStore


def record(workload: Workload, pipe: Any, store: TrajectoryStore | None = None) -> dict[str, Any]:
    """Record a workload with a loaded pipeline; what `drive` returns."""
    store = store or TrajectoryStore.create(workload.paths.trajectories)
    recorder = LocalRecorder(pipe, workload.recording, store)
    return drive(workload.recording, store, closing(recorder), logging.getLogger("tests.recording"))


def measured_size(workload: Workload, pipe: Any) -> RecordingSize:
    """The size of one trajectory, as a recorder measures it before it records."""
    return LocalRecorder(pipe, workload.recording, TrajectoryStore.create(workload.paths.trajectories)).describe()[1]


def transformer_arguments(
    record: Mapping[str, Any], context: Mapping[str, torch.Tensor], branch: int = 0
) -> dict[str, Any]:
    """Keyword arguments that the transformer was called with, all but hidden_states and timestep."""
    prefix = CONDITIONING if branch == 0 else f"{CONDITIONING}{branch}."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in context.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }
    return {**record["call_kwargs"][branch], **tensors}
