"""Kept results: facts of the measurement, the document as JSON with its table beside it, and checks over rows."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import torch

from lesa.atomic import write_bytes, write_json
from lesa.evaluation.bootstrap import paired_interval
from lesa.evaluation.results import Results
from lesa.params import Workload


def keep(path: Path, document: Mapping[str, Any], table: str) -> None:
    """Write `path` and the same name ending in `.md`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), dict(document), sort_keys=False)
    write_bytes(path.with_suffix(".md"), table.encode())


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


Changes = Mapping[str, Mapping[str, Any]]  # section -> setting -> value


def changed(workload: Workload, changes: Changes) -> Workload:
    """The workload with some settings of some sections replaced."""
    sections = {name: dataclasses.replace(getattr(workload, name), **values) for name, values in changes.items()}
    return dataclasses.replace(workload, **sections)


def failed_searches(results: Results) -> list[str]:
    """A line for every row of a peer whose mean PSNR is lower than the same peer's with fewer computed steps.

    Each names the better row with the most steps, and the paired difference with its 95% interval.
    """
    lines = []
    for name in dict.fromkeys(row.method for row in results.rows if row.kind != "lesa"):
        rows = sorted((row for row in results.rows if row.method == name), key=lambda row: row.computed_steps)
        worse = {}
        for fewer, more in combinations(rows, 2):
            if fewer.computed_steps < more.computed_steps and fewer.psnr.mean > more.psnr.mean:
                worse[more.budget] = (fewer, more)
        for fewer, more in worse.values():
            pair = (results.values(more.budget, name), results.values(fewer.budget, name))
            gap = paired_interval(*pair, results.groups, results.resamples)
            lines.append(
                f"{more.budget}/{name}: {more.psnr.mean:.2f} dB with {more.computed_steps:g} computed steps, "
                f"{fewer.psnr.mean:.2f} dB with {fewer.computed_steps:g} at {fewer.budget} "
                f"({gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]): worse with more, search it again"
            )
    return lines


def warned(results: Results) -> list[str]:
    """`failed_searches`, also on stderr."""
    lines = failed_searches(results)
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    return lines
