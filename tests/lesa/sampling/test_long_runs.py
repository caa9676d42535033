"""Sample after sample on one pipeline, plain, accelerated and adaptive in turn: nothing is kept of any of them.

LESA_SAMPLING_RUNS says how many, 100 where it is not set.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lesa
from lesa.bundle import Bundle, load_bundle
from tests.attacks.hostile import edit
from tests.helpers.bundles import CALL, make_bundle
from tests.helpers.tiny import PROMPTS, tiny_flux

RUNS = int(os.environ.get("LESA_SAMPLING_RUNS", "100"))
WARM_UP = 12  # runs in which libraries fill their caches
RESIDENT = 16 << 20  # bytes that the process may grow by: an allocator's play
BOUNDS = [None, None, None, 1e-9, 9.0, None]  # so narrow that each adaptive run changes over


@dataclass(frozen=True)
class Alive:
    """What a process holds."""

    tensors: int
    objects: int  # that the collector knows
    resident: int  # bytes

    @classmethod
    def now(cls) -> Alive:
        gc.collect()
        objects = gc.get_objects()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            tensors=sum(issubclass(type(each), torch.Tensor) for each in objects),
            objects=len(objects),
            resident=pages * os.sysconf("SC_PAGE_SIZE"),
        )


def bundle_that_changes_over(pipe: Any, folder: Path) -> Bundle:
    made = make_bundle(pipe, folder)
    edit(folder, lambda document: document["budgets"][made.manifest.default_budget].update(error_bounds=BOUNDS))
    return load_bundle(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_samples_leave_nothing_behind(tmp_path: Path) -> None:
    pipe = tiny_flux(num_layers=1, num_single_layers=1)
    bundle = bundle_that_changes_over(pipe, tmp_path / "bundle")
    call = {name: value for name, value in dataclasses.asdict(CALL).items() if value is not None}
    seen: dict[str, torch.Tensor] = {}

    def sample(kind: str, number: int) -> None:
        if kind != "plain":
            lesa.enable(pipe, bundle, adaptive=kind == "adaptive")
        generator = torch.Generator().manual_seed(number % len(PROMPTS))
        prompt = PROMPTS[number % len(PROMPTS)]
        latents = pipe(prompt, output_type="latent", generator=generator, **call).images
        if kind != "plain":
            statistics = lesa.summary(pipe)
            assert statistics.finished and (statistics.change is not None) == (kind == "adaptive")
            lesa.disable(pipe)
        known = seen.setdefault(f"{kind} {number % len(PROMPTS)}", latents)
        assert torch.equal(known, latents), f"{kind}: sample {number} is another one than before"

    kinds = ("plain", "accelerated", "adaptive")
    for number in range(WARM_UP):
        sample(kinds[number % 3], number // 3)
    before = Alive.now()
    measured = RUNS - RUNS % WARM_UP  # whole rounds: every kind with every prompt
    for number in range(measured):
        sample(kinds[number % 3], number // 3)
    after = Alive.now()
    assert after.tensors == before.tensors
    assert after.objects - before.objects < measured / 4, "less than an object in four runs"
    assert after.resident - before.resident < RESIDENT
