"""Bundles for tests: a predictor that extrapolates, with a manifest that fits a tiny pipeline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lesa.bundle import Bundle, write_bundle
from lesa.models.families import TAP, family_of
from lesa.models.fingerprint import fingerprint
from lesa.params import CallParams
from lesa.predictor.alpha import gate_shapes, linear_alpha, time_offsets
from lesa.predictor.predictor import Predictor
from lesa.predictor.projection import initial_projection
from lesa.predictor.spec import PredictorSpec, Variant
from lesa.schedule import Schedule

NUM_STEPS = 10
CALL = CallParams(
    height=16, width=16, num_inference_steps=NUM_STEPS, guidance_scale=3.5, max_sequence_length=16
)
BUDGETS = {"1.67x": 3, "1.43x": 2}  # name -> interval; three warm-up steps


def extrapolating(channels: int, sigmas: torch.Tensor, schedule: Schedule) -> Predictor:
    """First-order extrapolation in sigma: what a fresh predictor is before training, in closed form."""
    spec = PredictorSpec(
        channels=channels,
        num_steps=schedule.num_steps,
        boundaries=(0.5,),
        history_sizes=(2, 2),
        variants=(Variant(name="1.67x", full_steps=schedule.full_steps),),
        projection="per_channel",
        gate="table",
    )
    table = torch.zeros(schedule.num_steps)
    for step in range(2, schedule.num_steps):
        table[step] = linear_alpha(time_offsets(sigmas, step, schedule.anchors(step, 2))[None])[0]
    tensors = {}
    for stage, size in enumerate(spec.history_sizes):
        start = initial_projection(
            spec.projection, channels, size, spec.rank, "extrapolation", torch.Generator()
        )
        gate = {
            name: torch.zeros(shape)
            for name, shape in gate_shapes("table", size, spec.hidden, spec.grid, spec.num_steps).items()
        }
        gate["high"] += 1.0  # offsets of noise levels lie in [0, 1]
        gate["table"] = table.clone()
        tensors |= {f"1.67x/{stage}/projection.{name}": value for name, value in start.items()}
        tensors |= {f"1.67x/{stage}/gate.{name}": value for name, value in gate.items()}
    return Predictor(spec, tensors)


def run_sigmas(pipe: Any, call: CallParams = CALL) -> torch.Tensor:
    """[S + 1] noise levels of a run of `call`."""
    arguments = {k: v for k, v in dataclasses.asdict(call).items() if v is not None}
    pipe("a thin seven", output_type="latent", generator=torch.Generator().manual_seed(0), **arguments)
    return pipe.scheduler.sigmas.clone()


def manifest_for(
    pipe: Any, sigmas: torch.Tensor, call: CallParams = CALL, branches: Sequence[str] = ("denoise",)
) -> dict[str, Any]:
    """What `write_bundle` wants to know of a pipeline."""
    num_steps = len(sigmas) - 1
    return {
        "workload": "tiny",
        "created_from": {"git": "0" * 40},
        "model": {
            "family": family_of(pipe.transformer).name,
            "pipeline_class": type(pipe).__name__,
            "transformer_class": type(pipe.transformer).__name__,
            "fingerprint": fingerprint(pipe.transformer),
            "source": "data/base/tiny",
            "revision": None,
            "dtype": "float32",
        },
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            "config": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
        },
        "tap": TAP,
        "branches": list(branches),
        "call": dataclasses.asdict(call),
        "num_inference_steps": num_steps,
        "sigmas": sigmas.tolist(),
        "budgets": {
            name: {
                "full_steps": list(Schedule.uniform(num_steps, interval).full_steps),
                "interval": interval,
                "quality": {"psnr_mean": 24.0 + Schedule.uniform(num_steps, interval).num_full, "psnr_p5": 25.0},
                "error_bounds": [None] * Schedule.uniform(num_steps, interval).num_full,
            }
            for name, interval in BUDGETS.items()
        },
        "default_budget": "1.67x",
        "training": {"num_trajectories": 0},
        "evaluation": {},
        "license": "Apache-2.0",
        "base_license": None,
    }


def make_bundle(
    pipe: Any,
    folder: Path,
    call: CallParams = CALL,
    *,
    sigmas: torch.Tensor | None = None,  # [S + 1] noise levels of a run; None: of a run from a prompt alone
    branches: Sequence[str] = ("denoise",),
) -> Bundle:
    """A bundle in `folder` that fits `pipe`."""
    levels = run_sigmas(pipe, call) if sigmas is None else sigmas
    schedule = Schedule.uniform(len(levels) - 1, BUDGETS["1.67x"])
    predictor = extrapolating(pipe.transformer.norm_out.linear.in_features, levels, schedule)
    return write_bundle(folder, manifest_for(pipe, levels, call, branches), predictor)


def placeholder_bundle(folder: Path, content: str) -> Path:
    """A folder with a bundle's file names, for a registry that does not look inside."""
    folder = folder / content
    folder.mkdir()
    for name in ("manifest.json", "weights.safetensors", "README.md"):
        (folder / name).write_text(json.dumps({"content": content}))
    return folder
