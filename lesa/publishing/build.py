"""From a trained predictor and the pipeline it was trained for to the published folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lesa.bundle import Bundle, write_bundle
from lesa.bundle.format import WRITTEN
from lesa.models.families import FAMILIES, TAP
from lesa.models.fingerprint import fingerprint
from lesa.params import ModelParams, Workload
from lesa.predictor.predictor import Predictor
from lesa.recording.dataset import Splits, Trajectories, trajectories_digest
from lesa.recording.prompts import prompt_digests, prompts_digest


def make_bundle(
    folder: Path,
    workload: Workload,
    pipe: Any,
    predictor: Predictor,
    train: Trajectories,
    validation: Trajectories,
    *,
    quality: Mapping[str, Mapping[str, Any]],
    error_bounds: Mapping[str, Sequence[float | None]],
    evaluation: Mapping[str, Any],
    created_from: Mapping[str, Any],
    others: Mapping[int, Splits] | None = None,
) -> Bundle:
    """Write the bundle of a workload.

    Args:
        folder: where; an existing bundle is replaced.
        pipe: the loaded pipeline: class, scheduler and fingerprint are read from it.
        quality: what was measured, for each budget (psnr_mean, psnr_p5 in dB, ...).
        error_bounds: of each budget, by full step (`lesa.publishing.bounds.bounds_by_budget`).
        evaluation: how it was measured (prompt digest, counts, seeds).
        created_from: revisions of the code and the data.
        others: trajectories of further numbers of steps that it was trained on; of `train`'s prompts and noise.
    """
    further = [data for count in sorted(others or {}) for data in (others or {})[count]]
    manifest = {
        "workload": workload.name,
        "created_from": dict(created_from),
        "model": _model(workload.model, pipe),
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            "config": {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")},
        },
        "tap": TAP,
        "branches": _branches(workload.model.family, num_branches=max(train.branch) + 1),
        "call": dataclasses.asdict(workload.call),
        "num_inference_steps": workload.call.num_inference_steps,
        "sigmas": [float(sigma) for sigma in train.sigmas],
        "budgets": {
            name: {
                "full_steps": list(schedule.full_steps),
                "interval": workload.schedule.budgets[name].interval,
                "quality": dict(quality.get(name, {})),
                "error_bounds": list(error_bounds[name]),
            }
            for name, schedule in workload.budgets().items()
        },
        "default_budget": workload.schedule.default_budget,
        "training": _training(train, validation, further) | {"seed": workload.seed},
        "evaluation": dict(evaluation),
        "license": "Apache-2.0",
        "base_license": None,
    }
    return write_bundle(folder, manifest, predictor)


def with_budgets(
    bundle: Bundle, budgets: Sequence[str], left_out: Mapping[str, Sequence[str]], folder: Path
) -> Bundle:
    """The bundle with some of its budgets, written to `folder`; its manifest and card name the others and why.

    Args:
        budgets: those that stay, the default one among them.
        left_out: the reasons for each other one.
    """
    data = {key: value for key, value in bundle.manifest.data.items() if key not in WRITTEN}
    return write_bundle(
        folder,
        {
            **data,
            "budgets": {name: data["budgets"][name] for name in budgets},
            "evaluation": data["evaluation"] | {"left_out": {name: list(why) for name, why in left_out.items()}},
        },
        bundle.predictor,
    )


def _model(model: ModelParams, pipe: Any) -> dict[str, Any]:
    return {
        "family": model.family,
        "pipeline_class": type(pipe).__name__,
        "transformer_class": type(pipe.transformer).__name__,
        "fingerprint": fingerprint(pipe.transformer),
        "source": _public(model.source),
        "revision": model.revision,
        "dtype": model.dtype,
    }


def _training(train: Trajectories, validation: Trajectories, further: Sequence[Trajectories]) -> dict[str, Any]:
    """What the predictor was trained on; `further` is train and validation in turn, of other numbers of steps."""
    prompts, seeds = [*train.prompts, *validation.prompts], (*train.seeds, *validation.seeds)
    return {
        "num_trajectories": sum(len(set(data.keys)) for data in (train, *further[::2])),
        "num_validation_trajectories": sum(len(set(data.keys)) for data in (validation, *further[1::2])),
        "trajectories_sha256": trajectories_digest(train, validation, *further),
        "prompts_sha256": prompts_digest(prompts),
        "prompt_digests": prompt_digests(prompts),
        "noise_seeds": [min(seeds), max(seeds)],
    }


def _branches(family: str, num_branches: int) -> list[str]:
    """Names of the transformer's calls a step, as they were recorded: guidance decides how many there are."""
    usual = FAMILIES[family].branches
    if num_branches == len(usual):
        return list(usual)
    return ["denoise"] if num_branches == 1 else ["cond", "uncond"]


def _public(source: str) -> str:
    """A source as it may be published: of an absolute folder the name alone, which says nothing of the machine."""
    return Path(source).name if Path(source).is_absolute() else source
