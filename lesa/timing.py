"""Seconds of a whole pipeline call: text encoders, sampler and decoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from lesa.params import CallParams
from lesa.pipelines import sample


def timed_sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    batch_size: int,
) -> tuple[torch.Tensor, float]:
    """Pictures in [0, 1] and the seconds they took; the device is waited for on both sides."""
    _wait()
    started = time.perf_counter()
    images = sample(pipe, prompts, seeds, call, batch_size=batch_size)
    _wait()
    return images, time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
