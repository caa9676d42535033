"""What the commands of `lesa` do; `lesa.cli` parses their arguments and imports this module when one runs.

What takes seconds to import (torch, diffusers) is imported in the functions that need it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lesa.errors import LesaError
from lesa.locks import Locked

if TYPE_CHECKING:
    import torch

    from lesa.bundle import Bundle
    from lesa.bundle.manifest import Manifest
    from lesa.params import CallParams, ModelParams
    from lesa.recording.store import TrajectoryStore
    from lesa.schedule import Schedule


def sample(arguments: argparse.Namespace) -> int:
    """Draw one image a prompt, write PNG files, show the run."""
    prompts = [*arguments.prompts, *arguments.prompt]
    if not prompts:
        raise LesaError("give at least one prompt")
    bundle = _load_bundle(arguments.bundle)
    call = _call_of(bundle.manifest, arguments)
    seeds = [arguments.seed + index for index in range(len(prompts))]
    names = [f"{index:03d}-seed{seed}-{_kind_of(bundle.manifest, arguments)}" for index, seed in enumerate(seeds)]
    if not arguments.overwrite:
        _refuse_existing(arguments.out, names)
    from lesa.models.pipelines import sample as draw
    from lesa.sampling.enable import enable, summary

    pipe = _load_pipeline(bundle, arguments)
    if not arguments.plain:
        enable(
            pipe,
            bundle,
            budget=arguments.budget,
            interval=arguments.interval,
            full_steps=arguments.full_steps,
            min_psnr=arguments.min_psnr,
            max_loss_db=arguments.max_loss_db,
            max_outlier_share=arguments.max_outlier_share,
            allow=arguments.allow,
            adaptive=arguments.adaptive,
        )
    images = draw(pipe, prompts, seeds, call, batch_size=arguments.batch_size)
    for path in save_images(images, names, arguments.out):
        print(path, file=sys.stderr if arguments.json else sys.stdout)
    if not arguments.plain:
        statistics = summary(pipe)
        print(json.dumps(statistics.to_dict(), indent=2) if arguments.json else f"\n{statistics}")
    return 0


def _kind_of(manifest: Manifest, arguments: argparse.Namespace) -> str:
    """How a sample is drawn, for its file's name: `plain`, `5x`, `interval7`, `full10`, `5x-28steps`, `5x-adaptive`."""
    from lesa.bundle.budgets import choose_schedule

    if arguments.plain:
        kind = "plain"
    elif arguments.full_steps is not None:
        kind = f"full{len(set(arguments.full_steps))}"
    elif arguments.interval is not None:
        kind = f"interval{arguments.interval}"
    else:
        wish = {name: getattr(arguments, name) for name in ("budget", "min_psnr", "max_loss_db", "max_outlier_share")}
        _, kind = choose_schedule(manifest, **wish)
    steps = f"-{arguments.steps}steps" if arguments.steps is not None else ""
    return kind + steps + ("-adaptive" if arguments.adaptive and not arguments.plain else "")


def _refuse_existing(folder: Path, names: Sequence[str]) -> None:
    """Before anything is loaded: files that the samples of these names would replace."""
    patterns = [f"{name}{suffix}.png" for name in names for suffix in ("", "-frame*")]
    there = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise LesaError(
            f"{folder} has {', '.join(there[:3])}{more} already: give another folder (--out), another --seed, "
            "or --overwrite"
        )


def _call_of(manifest: Manifest, arguments: argparse.Namespace) -> CallParams:
    """The bundle's call, with the steps that are asked for where it serves so many."""
    if arguments.steps is None:
        return manifest.call
    low, high = manifest.step_range
    if (not arguments.plain and not low <= arguments.steps <= high) or arguments.steps < 1:
        raise LesaError(f"--steps: got {arguments.steps}, the bundle serves {low} to {high}")
    return dataclasses.replace(manifest.call, num_inference_steps=arguments.steps)


def save_images(images: torch.Tensor, names: Sequence[str], folder: Path) -> list[Path]:
    """Write `<name>.png` (videos: `<name>-frame<number>.png`, one a frame) and return the paths.

    Args:
        images: [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].
        names: of the files, one each.
        folder: made if it is not there; files of the same name are replaced.
    """
    import torch
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for image, name in zip(images, names, strict=True):
        frames = image if image.ndim == 4 else image[None]
        for number, frame in enumerate(frames):
            suffix = f"-frame{number:04d}" if image.ndim == 4 else ""
            path = folder / f"{name}{suffix}.png"
            array = (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            Image.fromarray(array).save(path)
            written.append(path)
    return written


def compare(arguments: argparse.Namespace) -> int:
    """Judge a bundle against its peers and print the table, or every number as JSON."""
    if arguments.seeds < 1 or arguments.num_prompts < 1:
        raise LesaError("--seeds and --num-prompts: must be at least 1")
    from lesa.evaluation import compare as evaluation
    from lesa.evaluation.table import format_table
    from lesa.models.fingerprint import fingerprint
    from lesa.params import EvaluateParams
    from lesa.params_file import load_params
    from lesa.peers.lineup import peers_from_file
    from lesa.peers.tuning import TUNING_SAMPLES
    from lesa.recording.prompts import read_prompts

    bundle = _load_bundle(arguments.bundle)
    settings, tuning, scorer = EvaluateParams(), [], None
    if Path("params.yaml").is_file():
        workload = load_params("params.yaml", bundle.manifest.workload)
        settings = workload.evaluate
        tuning = read_prompts(workload.paths.prompts, "train")[:TUNING_SAMPLES]
        has_scorer = workload.scorer is not None and Path(workload.scorer).is_dir()
        scorer = evaluation.load_scorer(workload.scorer) if has_scorer else None
        held_out = read_prompts(workload.paths.prompts, "test")
    if arguments.prompts is not None:
        held_out = _lines(arguments.prompts)
    elif not Path("params.yaml").is_file():
        raise LesaError("--prompts: give a file of held-out prompts (there is no params.yaml here)")
    judged, pipe, peers = held_out[: arguments.num_prompts], _load_pipeline(bundle, arguments), []
    if arguments.peers is not None:
        budgets = {name: budget.schedule for name, budget in bundle.manifest.budgets.items()}
        peers = peers_from_file(arguments.peers, budgets, judged, fingerprint(pipe.transformer))
    results = evaluation.compare(
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


def schedule(arguments: argparse.Namespace) -> int:
    """Print which steps are full: of a rule, of a list, of a bundle's budgets."""
    from lesa.schedule import Schedule, picture

    rows: list[tuple[str, Schedule]] = []
    if arguments.bundle is not None:
        budgets = _load_bundle(arguments.bundle).manifest.budgets
        if arguments.budget is not None and arguments.budget not in budgets:
            raise LesaError(f"budget: {arguments.budget!r} is not one of {', '.join(budgets)}")
        rows += [(name, budget.schedule) for name, budget in budgets.items() if arguments.budget in (None, name)]
    elif arguments.budget is not None:
        raise LesaError("--budget needs --bundle")
    for interval in arguments.interval:
        uniform = Schedule.uniform(arguments.steps, interval, arguments.warmup, arguments.cooldown)
        rows.append((f"interval {interval}", uniform))
    if arguments.full_steps is not None:
        rows.append(("full steps", Schedule.explicit(arguments.steps, arguments.full_steps)))
    if not rows:
        raise LesaError("give --interval, --full-steps or --bundle")
    width = max(len(name) for name, _ in rows)
    for name, row in rows:
        print(f"{name:<{width}}  {picture(row)}  {row}")
    return 0


def flops(arguments: argparse.Namespace) -> int:
    """Count what a schedule saves at the published models' true size."""
    from lesa.models.published import PRESETS, family_flops
    from lesa.schedule import Schedule

    uniform = (arguments.steps, arguments.interval, arguments.warmup)
    if arguments.budget is not None and uniform != (None, None, None):
        raise LesaError("give --budget, or --interval, --steps and --warmup")
    spec, budget_schedule = None, None
    if arguments.bundle is not None:
        from lesa.bundle.budgets import choose_schedule

        manifest = _load_bundle(arguments.bundle).manifest
        spec = manifest.predictor
        budget_schedule, _ = choose_schedule(manifest, budget=arguments.budget)
    elif arguments.budget is not None:
        raise LesaError("--budget needs --bundle")
    results = []
    for name in [arguments.family] if arguments.family else list(PRESETS):
        counted = budget_schedule
        if name in PRESETS and uniform != (None, None, None):
            preset = PRESETS[name]
            usual = (preset.num_inference_steps, preset.interval, preset.warmup_steps)
            counted = Schedule.uniform(*(b if a is None else a for a, b in zip(uniform, usual, strict=True)))
        results.append(family_flops(name, counted, spec))
    if arguments.json:
        print(json.dumps([result.to_dict() for result in results], indent=2))
    else:
        print("\n\n".join(str(result) for result in results))
    return 0


def bundle_show(arguments: argparse.Namespace) -> int:
    """Print a verified bundle's card, or its manifest as JSON."""
    from lesa.bundle.card import card

    bundle = _load_bundle(arguments.bundle, arguments.digest)
    if arguments.json:
        print(json.dumps(bundle.manifest.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(f"{bundle.path}\nmanifest sha256:{bundle.digest}\n\n{card(bundle.manifest)}", end="")
    return 0


def bundle_verify(arguments: argparse.Namespace) -> int:
    """Check every byte of a bundle; 1 where something is wrong with it."""
    from lesa.bundle import BundleError

    try:
        bundle = _load_bundle(arguments.bundle, arguments.digest)
    except BundleError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"path": str(bundle.path), "digest": bundle.digest, "problems": []}))
    else:
        pinned = "" if arguments.digest else " (not pinned: compare it with where you had the bundle from)"
        print(f"{bundle.path}: good, manifest sha256:{bundle.digest}{pinned}")
    return 0


def store_verify(arguments: argparse.Namespace) -> int:
    """Check every trajectory of a store against its digests; 1 where one is damaged."""
    from lesa.recording.ledger import Ledger
    from lesa.recording.store import TrajectoryStore

    store = TrajectoryStore.open(arguments.store)
    damaged = Ledger(store).verify(store.keys())
    problems = [*store.strangers(), *damaged.values()]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{arguments.store}: {len(store.keys())} trajectories, {len(problems)} problem(s)")
    if damaged:
        _note_damage(store, damaged)
    return 1 if problems else 0


def _note_damage(store: TrajectoryStore, keys: Iterable[str]) -> None:
    """The next recording reads these again, also where size and times of their files tell nothing."""
    from lesa.recording.ledger import Ledger

    try:
        with store.writer_lock():
            ledger = Ledger(store)
            ledger.forget(keys)
            ledger.save()
    except (OSError, Locked) as error:
        print(f"not noted for the record stage: {error}", file=sys.stderr)
    print("the record stage records damaged ones anew: dvc repro --force --single-item record, or the workload's own")


def store_drop_pruned(arguments: argparse.Namespace) -> int:
    """Delete the trajectories that were pruned from a store and are kept beside it."""
    from lesa.atomic import format_bytes
    from lesa.recording.pruned import PrunedTrajectories
    from lesa.recording.store import TrajectoryStore

    store = TrajectoryStore.open(arguments.store)
    with store.writer_lock():
        pruned = PrunedTrajectories(store)
        size = format_bytes(pruned.size(pruned.keys()))
        print(f"{pruned.path}: {len(pruned.drop())} trajectories deleted, {size}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Print what this machine has and, for a workload, what that takes; 1 where it is not enough."""
    from lesa.doctor.machine import examine, format_facts

    name = arguments.workload or arguments.name
    if arguments.workload and arguments.name not in (None, arguments.workload):
        raise LesaError(f"give one workload, got {arguments.name!r} and {arguments.workload!r}")
    facts = examine()
    if name is None:
        print(json.dumps(facts, indent=2) if arguments.json else format_facts(facts))
        return 0
    from lesa.doctor.readiness import examine_workload, format_readiness
    from lesa.params_file import load_params

    readiness = examine_workload(load_params("params.yaml", name))
    if arguments.json:
        print(json.dumps({**facts, **readiness}, indent=2))
    else:
        print(f"{format_facts(facts)}\n{format_readiness(readiness)}")
    return 0 if readiness["ready"] else 1


def migrate(arguments: argparse.Namespace) -> int:
    """Move the keys of an older settings file to where they stand now; 1 where `--check` finds some."""
    from lesa.doctor.migration import migrate_params

    moves = migrate_params(arguments.file, write=not arguments.check)
    print("\n".join(moves) or f"{arguments.file}: nothing to move")
    return 1 if moves and arguments.check else 0


def _load_bundle(source: str, digest: str | None = None) -> Bundle:
    from lesa.pull import bundle_from

    return bundle_from(source, digest)


def _load_pipeline(bundle: Bundle, arguments: argparse.Namespace) -> Any:
    """The pipeline that the bundle was made for."""
    from lesa.models.pipelines import load_pipeline

    return load_pipeline(_model_of(bundle.manifest, arguments.base, arguments.revision), arguments.device)


def _model_of(manifest: Manifest, base: str | None, revision: str | None) -> ModelParams:
    """Where the pipeline of a bundle comes from, as `load_pipeline` takes it.

    Args:
        manifest: of the bundle.
        base: pipeline folder or hub id; None takes what the bundle was made from.
        revision: commit of a hub id; None takes the bundle's, where the model is the bundle's too.

    Raises:
        LesaError: the bundle does not say where its model is.
    """
    from lesa.params import ModelParams

    model = manifest.data["model"]
    source = base or model["source"]
    if source is None:
        raise LesaError("the bundle does not say where its model is: give the pipeline folder or hub id")
    if revision is None and source == model["source"]:
        revision = model["revision"]
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if model["dtype"] == "bfloat16" else "float32"
    return ModelParams(family=manifest.family, source=source, revision=revision, dtype=dtype)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _progress(step: int, values: dict[str, float]) -> None:
    shown = " ".join(f"{name} {value:g}" for name, value in values.items())
    print(f"  {step}: {shown}", file=sys.stderr)
