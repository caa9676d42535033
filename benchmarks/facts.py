"""What every file of timings states: date, chip, versions, command; and how seconds are taken."""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch


def facts(module: str, arguments: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """Date, chip, versions and command of a measurement.

    Args:
        module: as in `python -m <module>`.
        arguments: of `main`; None takes the command line's.
        device: what was measured on.
    """
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "command": " ".join([f"python -m {module}", *given]),
    }


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: CUDA events around it on a GPU, the host's clock elsewhere."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
