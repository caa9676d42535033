"""What a method's runs gave, and how the samples of a measurement are shared out to processes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch

from lesa.flops import ModelFlops
from lesa.params import EvaluateParams

Key = tuple[str, str]  # budget and name of a method
PLAIN: Key = ("", "plain")
_BY_BATCH = ("psnr", "ssim", "agreement", "converged", "seconds")  # what a method has of each of its batches


@dataclass(slots=True)
class Measured:
    """What is gathered of one method while batches pass; of the first batch of all it is looked into the run."""

    psnr: list[torch.Tensor] = field(default_factory=list)
    ssim: list[torch.Tensor] = field(default_factory=list)
    agreement: list[torch.Tensor] = field(default_factory=list)
    converged: list[torch.Tensor] = field(default_factory=list)  # PSNR to the converged run, of samples that have one
    seconds: list[float] = field(default_factory=list)  # of timed calls, plain ones in step
    calls: int = 0
    computed: int = 0
    pictures: torch.Tensor | None = None  # of the first batch
    feature_errors: tuple[float, ...] | None = None  # [S] relative L1, where its steps are the plain run's
    peak_bytes: int = 0

    def extend(self, later: Measured) -> None:
        """Add what a later part found."""
        for name in _BY_BATCH:
            getattr(self, name).extend(getattr(later, name))
        self.calls += later.calls
        self.computed += later.computed


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one process measures of all samples."""

    starts: tuple[int, ...]  # the first sample of each of its batches
    timed: tuple[int, ...]  # those of them whose calls are timed: whole ones, none of them looked into
    further: int = 0  # timed calls of everything beside them


@dataclass(kw_only=True, slots=True)
class MeasuredPart:
    """What one process found, or several once joined."""

    found: dict[Key, Measured]
    sigmas: torch.Tensor  # [S + 1] of the plain run
    model: ModelFlops | None  # of whoever had the first batch
    threads: int  # of torch


def converged_indices(num_samples: int, fraction: float) -> list[int]:
    """Samples spread evenly over all of them; at least two where any are wanted."""
    count = min(num_samples, max(2, round(fraction * num_samples))) if fraction > 0 else 0
    return [(2 * i + 1) * num_samples // (2 * count) for i in range(count)]


def share_out(num_samples: int, settings: EvaluateParams, processes: int = 1, timing: bool = True) -> list[Part]:
    """Batches in order, about as many to each of at most so many processes.

    The first batch of all is never timed, since it is looked into. Where that leaves fewer timed calls than are
    wanted, the first process makes the others.
    """
    starts = range(0, num_samples, settings.batch_size)
    count = min(processes, len(starts))
    parts = []
    for index in range(count):
        own = starts[index * len(starts) // count : (index + 1) * len(starts) // count]
        timed = [start for start in own if start + settings.batch_size <= num_samples and start > 0]
        parts.append(Part(starts=tuple(own), timed=tuple(timed) if timing else ()))
    missing = settings.wall_clock_repeats - sum(len(part.timed) for part in parts) if timing else 0
    parts[0] = Part(starts=parts[0].starts, timed=parts[0].timed, further=max(0, missing))
    return parts


def join(parts: Sequence[MeasuredPart]) -> MeasuredPart:
    """All parts as one; they come in the order of their samples."""
    first, *later = parts
    joined = {key: copy(found) for key, found in first.found.items()}
    for found in joined.values():
        for name in _BY_BATCH:
            setattr(found, name, list(getattr(found, name)))
    for part in later:
        for key, found in part.found.items():
            joined[key].extend(found)
    return replace(first, found=joined)
