"""The commands that load a pipeline: `lesa sample` and `lesa compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from lesa.acceleration import REGISTRY_PREFIX, enable, summary
from lesa.bundle import Bundle, load_bundle
from lesa.params import EvaluateParams, load_params
from lesa.pictures import save_pictures
from lesa.pipelines import load_pipeline, sample
from lesa.prompts import read_prompts
from lesa.pull import pull
from lesa.sources import source_of

_NUM_TUNING = 16  # training prompts that the threshold caches are tuned on


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
        raise ValueError("give at least one prompt")
    bundle = load(arguments.bundle)
    call = bundle.manifest.call
    if arguments.steps is not None:
        low, high = bundle.manifest.step_range
        if (not arguments.plain and not low <= arguments.steps <= high) or arguments.steps < 1:
            raise ValueError(f"--steps: got {arguments.steps}, the bundle serves {low} to {high}")
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
    pictures = sample(pipe, prompts, seeds, call, batch_size=arguments.batch_size)
    for path in save_pictures(pictures, seeds, arguments.out):
        print(path, file=sys.stderr if arguments.json else sys.stdout)
    if not arguments.plain:
        statistics = summary(pipe)
        print(json.dumps(statistics.to_dict(), indent=2) if arguments.json else f"\n{statistics}")
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """Judge a bundle against its peers and print the table, or every number as JSON."""
    from lesa.evaluate import compare
    from lesa.evaluate_jobs import load_scorer
    from lesa.fingerprint import fingerprint
    from lesa.fixed_peers import peers_from_file
    from lesa.table import format_table

    if arguments.seeds < 1 or arguments.num_prompts < 1:
        raise ValueError("--seeds and --num-prompts: must be at least 1")
    bundle = load(arguments.bundle)
    settings, tuning, scorer = EvaluateParams(), [], None
    if Path("params.yaml").is_file():
        workload = load_params("params.yaml", bundle.manifest.workload)
        settings, tuning = workload.evaluate, read_prompts(workload.paths.prompts, "train")[:_NUM_TUNING]
        scorer = load_scorer(workload) if workload.scorer and Path(workload.scorer).is_dir() else None
        held_out = read_prompts(workload.paths.prompts, "test")
    if arguments.prompts is not None:
        held_out = _lines(arguments.prompts)
    elif not Path("params.yaml").is_file():
        raise ValueError("--prompts: give a file of held-out prompts (there is no params.yaml here)")
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
    return load_pipeline(source_of(bundle.manifest, arguments.base, arguments.revision, arguments.device))


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _progress(step: int, values: dict[str, float]) -> None:
    shown = " ".join(f"{name} {value:g}" for name, value in values.items())
    print(f"  {step}: {shown}", file=sys.stderr)
