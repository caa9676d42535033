"""How fast the first training step is at a published model's width: synthetic trajectories, no model needed.

python -m benchmarks.studies.training_speed --device cuda    # C = 3072, 4096 tokens of which 512 are kept
python -m benchmarks.studies.training_speed --channels 128 --tokens 16 --trajectories 64 --device cpu

Times the closed form of the step weights, and optimiser steps of one expert, and notes the peak memory of the device.
Results: benchmarks/results/training_speed.json, with chip, date and command.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.results_files import facts
from lesa.atomic import write_json
from lesa.models.output_head import OutputHead, freeze
from lesa.models.pipelines import pick_device
from lesa.params import BudgetParams, GroundTruthParams, PredictorParams, ScheduleParams
from lesa.params_file import load_params
from lesa.recording.dataset import Trajectories
from lesa.training.experts import Job, new_expert
from lesa.training.ground_truth import step_weights_of_stage, train_expert
from lesa.training.jobs import expert_design

OUT = Path("benchmarks/results/training_speed.json")
FULL_STEPS = (0, 1, 6, 11, 18, 25, 31, 37, 43, 48)  # ten of fifty


class _Modulate(nn.Module):
    """What `norm_out` costs: a normalisation, and a scale and shift from the conditioning."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(channels, elementwise_affine=False), nn.Linear(channels, 2 * channels)

    def forward(self, feature: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(temb).chunk(2, dim=-1)
        return self.norm(feature) * (1 + scale[:, None]) + shift[:, None]


def synthetic(count: int, steps: int, tokens: int, channels: int, seed: int) -> Trajectories:
    """Features that bend with the noise level, in bfloat16 as a store holds them."""
    generator = torch.Generator().manual_seed(seed)
    sigmas = torch.cat([torch.linspace(1, 1 / steps, steps), torch.zeros(1)])
    features = torch.empty(count, steps, tokens, channels, dtype=torch.bfloat16)
    at = sigmas[:-1, None, None]
    for index in range(count):
        start, slope, bend = torch.randn(3, tokens, channels, generator=generator)
        features[index] = (start + slope * at + bend * at**2).bfloat16()
    return Trajectories(
        store=None,  # type: ignore[arg-type]  # all of it is in memory
        keys=tuple(f"{seed}-{index}" for index in range(count)),
        branch=(0,) * count,
        prompts=tuple(f"prompt {seed} {index}" for index in range(count)),
        seeds=tuple(range(count)),
        sigmas=sigmas,
        temb=torch.randn(count, steps, channels, generator=generator),
        latents=torch.zeros(count, tokens, 64),
        features=features,
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the closed form, seconds an optimiser step, peak memory."""
    device = pick_device(options.device)
    workload = load_params("params.yaml")
    workload = dataclasses.replace(
        workload,
        call=dataclasses.replace(workload.call, num_inference_steps=50),
        schedule=ScheduleParams(budgets={"5x": BudgetParams(full_steps=FULL_STEPS)}, default_budget="5x"),
        predictor=PredictorParams(
            kind="per_step", history_sizes=(2, 2, 2), projection="low_rank", rank=options.channels // 4
        ),
    )
    design = expert_design(workload)
    settings = GroundTruthParams(
        iterations=options.iterations, batch_size=options.batch, checkpoint_every=options.iterations
    )
    train = synthetic(options.trajectories, 50, options.tokens, options.channels, seed=0)
    validation = synthetic(max(1, options.trajectories // 8), 50, options.tokens, options.channels, seed=1)
    head = freeze(OutputHead(_Modulate(options.channels), nn.Linear(options.channels, 64)))
    job = Job("5x", 1)
    expert = new_expert(design, job, train.sigmas, options.channels).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step_weights_of_stage(design, job, expert, train)
    closed_form = time.perf_counter() - started
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train_expert(
            design,
            settings,
            job,
            train,
            validation,
            head,
            device=device,
            work_dir=Path(folder),
            report=lambda step, values: rates.append(values["iterations_per_second"]),
        )
    steady = sorted(rates[len(rates) // 2 :])
    return {
        "closed_form_seconds": closed_form,
        "optimiser_steps_per_second": steady[len(steady) // 2],
        "trainable_numbers": sum(p.numel() for p in expert.parameters() if p.requires_grad),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.training_speed", description=__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--channels", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=512, help="kept of each feature")
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    figures = measure(options)
    record = {
        **facts("benchmarks.studies.training_speed", arguments, pick_device(options.device)),
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        **figures,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, record, sort_keys=False)
    for key, value in figures.items():
        print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
