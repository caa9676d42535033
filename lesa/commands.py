"""What the commands that load a pipeline do: `lesa sample` and `lesa compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from lesa.bundle import Bundle, load_bundle
from lesa.bundle.manifest import Manifest
from lesa.errors import LesaError
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import EvaluateParams, ModelParams
from lesa.params_file import load_params
from lesa.pull import pull
from lesa.recording.prompts import read_prompts
from lesa.sampling.enable import REGISTRY_PREFIX, enable, summary


def save_images(images: torch.Tensor, seeds: Sequence[int], folder: Path) -> list[Path]:
    """Write `000-seed<seed>.png` (videos: one file a frame) and return the paths.

    Args:
        pictures: [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].
        seeds: the noise seed of each.
        folder: made if it is not there; files of the same name are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, (picture, seed) in enumerate(zip(images, seeds, strict=True)):
        frames = picture if picture.ndim == 4 else picture[None]
        for number, frame in enumerate(frames):
            suffix = f"-frame{number:04d}" if picture.ndim == 4 else ""
            path = folder / f"{index:03d}-seed{seed}{suffix}.png"
            array = (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            Image.fromarray(array).save(path)
            written.append(path)
    return written


def model_of(manifest: Manifest, base: str | None = None, revision: str | None = None) -> ModelParams:
    """Where the pipeline of a bundle comes from, as `load_pipeline` takes it.

    Args:
        manifest: of the bundle.
        base: pipeline folder or hub id; None takes what the bundle was made from.
        revision: commit of a hub id; None takes the bundle's, where the model is the bundle's too.

    Raises:
        LesaError: the bundle does not say where its model is.
    """
    model = manifest.data["model"]
    source = base or model["source"]
    if source is None:
        raise LesaError("the bundle does not say where its model is: give the pipeline folder or hub id")
    if revision is None and source == model["source"]:
        revision = model["revision"]
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if model["dtype"] == "bfloat16" else "float32"
    return ModelParams(family=manifest.family, source=source, revision=revision, dtype=dtype)


def load(source: str, digest: str | None = None) -> Bundle:
    """A bundle from a folder or a registry address."""
    if not source.startswith(REGISTRY_PREFIX):
        return load_bundle(source, expected_digest=digest)
    folder = pull(source)
    return load_bundle(folder, expected_digest=digest or folder.name)


def run_sample(arguments: argparse.Namespace) -> int:
    """Draw one picture a prompt, write PNG files, show the run."""
    prompts = [*arguments.prompts, *arguments.prompt]
    if not prompts:
        raise LesaError("give at least one prompt")
    bundle = load(arguments.bundle)
    call = bundle.manifest.call
    if arguments.steps is not None:
        low, high = bundle.manifest.step_range
        if (not arguments.plain and not low <= arguments.steps <= high) or arguments.steps < 1:
            raise LesaError(f"--steps: got {arguments.steps}, the bundle serves {low} to {high}")
        call = dataclasses.replace(call, num_inference_steps=arguments.steps)
    pipe = _pipeline(bundle, arguments)
    if not arguments.plain:
        enable(
            pipe,
            bundle,
            budget=arguments.budget,
            interval=arguments.interval,
            full_steps=arguments.full_steps,
            min_psnr=arguments.min_psnr,
            max_loss_db=arguments.max_loss_db,
            allow=arguments.allow,
            adaptive=arguments.adaptive,
        )
    seeds = [arguments.seed + index for index in range(len(prompts))]
    images = sample(pipe, prompts, seeds, call, batch_size=arguments.batch_size)
    for path in save_images(images, seeds, arguments.out):
        print(path, file=sys.stderr if arguments.json else sys.stdout)
    if not arguments.plain:
        statistics = summary(pipe)
        print(json.dumps(statistics.to_dict(), indent=2) if arguments.json else f"\n{statistics}")
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """Judge a bundle against its peers and print the table, or every number as JSON."""
    from lesa.evaluation.compare import compare, load_scorer
    from lesa.evaluation.table import format_table
    from lesa.models.fingerprint import fingerprint
    from lesa.peers.lineup import peers_from_file
    from lesa.peers.tuning import TUNING_SAMPLES

    if arguments.seeds < 1 or arguments.num_prompts < 1:
        raise LesaError("--seeds and --num-prompts: must be at least 1")
    bundle = load(arguments.bundle)
    settings, tuning, scorer = EvaluateParams(), [], None
    if Path("params.yaml").is_file():
        workload = load_params("params.yaml", bundle.manifest.workload)
        settings, tuning = workload.evaluate, read_prompts(workload.paths.prompts, "train")[:TUNING_SAMPLES]
        scorer = load_scorer(workload) if workload.scorer and Path(workload.scorer).is_dir() else None
        held_out = read_prompts(workload.paths.prompts, "test")
    if arguments.prompts is not None:
        held_out = _lines(arguments.prompts)
    elif not Path("params.yaml").is_file():
        raise LesaError("--prompts: give a file of held-out prompts (there is no params.yaml here)")
    judged, pipe, peers = held_out[: arguments.num_prompts], _pipeline(bundle, arguments), []
    if arguments.peers is not None:
        budgets = {name: budget.schedule for name, budget in bundle.manifest.budgets.items()}
        peers = peers_from_file(arguments.peers, budgets, judged, fingerprint(pipe.transformer))
    results = compare(
        bundle,
        pipe,
        judged,
        arguments.seeds,
        arguments.seed,
        tuning_prompts=[] if arguments.fast else tuning,
        further=peers,
        settings=dataclasses.replace(settings, batch_size=arguments.batch_size),
        scorer=scorer,
        report=None if arguments.json else _progress,
    )
    print(json.dumps(results.to_json(), indent=2) if arguments.json else format_table(results))
    return 0


def _pipeline(bundle: Bundle, arguments: argparse.Namespace) -> Any:
    """The pipeline that the bundle was made for."""
    return load_pipeline(model_of(bundle.manifest, arguments.base, arguments.revision), arguments.device)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _progress(step: int, values: dict[str, float]) -> None:
    shown = " ".join(f"{name} {value:g}" for name, value in values.items())
    print(f"  {step}: {shown}", file=sys.stderr)
