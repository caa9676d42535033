"""What users of a bundle get, measured as anybody would: enable, call, compare with the plain run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lesa
from lesa import metrics
from lesa.bundle import Bundle
from lesa.models.pipelines import sample


def mean_psnr(pipe: Any, bundle: Bundle, budget: str, prompts: Sequence[str], seeds: Sequence[int]) -> float:
    """dB to the plain run of the same noise."""
    call = bundle.manifest.call
    plain = sample(pipe, prompts, seeds, call, batch_size=2)
    lesa.enable(pipe, bundle, budget=budget)
    try:
        images = sample(pipe, prompts, seeds, call, batch_size=2)
    finally:
        lesa.disable(pipe)
    return float(metrics.psnr(images, plain).mean())
