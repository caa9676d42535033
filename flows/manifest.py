"""What a workload's bundle says of itself: gathered from the settings, the pipeline, the store and the report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from flows.revisions import revisions
from lesa.families import FAMILIES, TAP
from lesa.fingerprint import fingerprint
from lesa.params import Workload
from lesa.prompts import prompt_digests, prompts_digest, read_splits
from lesa.store import TrajectoryStore

LICENSE = "Apache-2.0"


def bundle_manifest(workload: Workload, pipe: Any, metrics: dict[str, Any]) -> dict[str, Any]:
    """The manifest for `lesa.bundle.write_bundle`.

    Args:
        pipe: the workload's pipeline.
        metrics: metrics.json of the evaluation; what it measured of LESA becomes the budgets' quality.

    Raises:
        ValueError: the evaluation lacks a budget.
    """
    model = workload.model
    splits = read_splits(workload.paths.prompts)
    used = [
        *splits["train"][: workload.record.train_prompts],
        *splits["validation"][: workload.record.validation_prompts],
    ]
    store = TrajectoryStore.open(workload.paths.trajectories)
    keys = sorted(store.keys())
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {
        "workload": workload.name,
        "created_from": revisions(workload=workload.name),
        "model": {
            "family": model.family,
            "pipeline_class": type(pipe).__name__,
            "transformer_class": type(pipe.transformer).__name__,
            "fingerprint": fingerprint(pipe.transformer),
            # Of a folder elsewhere only the name is published: the path is the machine's own affair.
            "source": Path(model.source).name if Path(model.source).is_absolute() else model.source,
            "revision": model.revision,
            "dtype": model.dtype,
        },
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": config},
        "tap": TAP,
        "branches": list(FAMILIES[model.family].branches),
        "call": dataclasses.asdict(workload.call),
        "num_inference_steps": workload.call.num_inference_steps,
        "sigmas": [float(sigma) for sigma in store.record(keys[0])["sigmas"]],
        "budgets": {
            name: {
                "full_steps": list(schedule.full_steps),
                "interval": workload.schedule.budgets[name].interval,
                "quality": budget_quality(metrics, name),
            }
            for name, schedule in workload.budgets().items()
        },
        "default_budget": workload.schedule.default_budget,
        "training": {
            "prompts_sha256": prompts_digest(used),
            "prompt_digests": prompt_digests(used),
            "num_trajectories": len(keys),
            "seed": workload.seed,
        },
        "evaluation": {
            "prompts_sha256": prompts_digest(splits["test"][: workload.evaluate.prompts]),
            "num_prompts": workload.evaluate.prompts,
            "seeds_per_prompt": workload.evaluate.seeds_per_prompt,
            "seed_offset": workload.evaluate.seed_offset,
        },
        "license": LICENSE,
        "base_license": None,
    }


def budget_quality(metrics: dict[str, Any], budget: str) -> dict[str, float]:
    """What was measured of LESA at a budget, without anything that depends on the machine's speed."""
    try:
        psnr = metrics["budgets"][budget]["lesa"]["psnr"]
        quality = {"psnr_mean": psnr["mean"], "psnr_p5": psnr["p5"], "psnr_low": psnr["low"], "psnr_high": psnr["high"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"the evaluation has no PSNR of lesa at budget {budget} ({error}); run it again") from None
    return {key: float(value) for key, value in quality.items() if math.isfinite(value)}


def read_metrics(workload: Workload) -> dict[str, Any]:
    """metrics.json of the workload's report; ValueError naming the stage to run when it is missing."""
    path = workload.paths.report / "metrics.json"
    try:
        metrics: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the evaluate stage first") from None
    return metrics


def registry_tags(manifest: dict[str, Any]) -> dict[str, str]:
    """Tags by which a puller chooses, without downloading anything."""
    budgets = manifest["budgets"]
    return {
        "schema": "1",
        "workload": manifest["workload"],
        "fingerprint": manifest["model"]["fingerprint"],
        "pipeline_class": manifest["model"]["pipeline_class"],
        "budgets": ",".join(budgets),
        "default_budget": manifest["default_budget"],
        "num_inference_steps": str(manifest["num_inference_steps"]),
        **{f"ratio.{name}": f"{_ratio(manifest, name):.2f}" for name in budgets},
        **{f"psnr.{name}": f"{entry['quality'].get('psnr_mean', math.nan):.3f}" for name, entry in budgets.items()},
        **{f"created_from.{key}": value for key, value in manifest["created_from"].items()},
    }


def _ratio(manifest: dict[str, Any], budget: str) -> float:
    return float(manifest["num_inference_steps"] / len(manifest["budgets"][budget]["full_steps"]))
