"""What a bundle says of how good it is and where it is from, and the tags by which a puller chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lesa.errors import LesaError
from lesa.params import Workload
from lesa.recording.prompts import prompts_digest, read_splits
from lesa.strict_json import StrictJsonError, parse

MAX_METRICS = 16 << 20  # bytes of metrics.json
QUALITY = {
    "psnr_mean": ("psnr", "mean"),
    "psnr_p5": ("psnr", "p5"),
    "psnr_low": ("psnr", "low"),
    "psnr_high": ("psnr", "high"),
    "outlier_share": ("outlier_share", "mean"),
    "outlier_share_high": ("outlier_share", "high"),
}  # key in the manifest -> keys in metrics.json


def read_metrics(workload: Workload) -> dict[str, Any]:
    """metrics.json of the workload's report; LesaError naming the stage to run when it is missing or torn."""
    path = workload.paths.report / "metrics.json"
    try:
        return parse(path.read_bytes(), max_bytes=MAX_METRICS)
    except FileNotFoundError:
        raise LesaError(f"{path} does not exist: run the evaluate stage first") from None
    except StrictJsonError as error:
        raise LesaError(f"{path}: {error}: run the evaluate stage again") from None


def budget_quality(workload: Workload, metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What was measured of LESA at every budget; nothing that depends on the machine's speed.

    Raises:
        ValueError: naming the budgets that were not measured.
    """
    quality, missing = {}, []
    for budget in workload.schedule.budgets:
        try:
            ours = metrics["budgets"][budget]["lesa"]
            quality[budget] = {name: float(ours[group][key]) for name, (group, key) in QUALITY.items()}
        except (KeyError, TypeError):
            missing.append(budget)
    if missing:
        raise LesaError(f"the evaluation did not measure budgets {', '.join(missing)}: run it again")
    return quality


def evaluation_facts(workload: Workload) -> dict[str, Any]:
    """How the quality was measured."""
    settings = workload.evaluate
    test = read_splits(workload.paths.prompts)["test"][: settings.prompts]
    return {
        "prompts_sha256": prompts_digest(test),
        "num_prompts": len(test),
        "seeds_per_prompt": settings.seeds_per_prompt,
        "seed_offset": settings.seed_offset,
    }


def registry_tags(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a registered version: enough to choose by, without downloading anything."""
    budgets, steps = manifest["budgets"], manifest["num_inference_steps"]
    tags = {
        "schema": str(manifest["schema"]),
        "workload": manifest["workload"],
        "fingerprint": manifest["model"]["fingerprint"],
        "pipeline_class": manifest["model"]["pipeline_class"],
        "budgets": ",".join(budgets),
        "default_budget": manifest["default_budget"],
        "num_inference_steps": str(steps),
        "step_range": "-".join(map(str, manifest["step_range"])),
    }
    for name, budget in budgets.items():
        tags[f"ratio.{name}"] = f"{steps / len(budget['full_steps']):.2f}"
        tags[f"psnr.{name}"] = f"{budget['quality'].get('psnr_mean', math.nan):.3f}"
        tags[f"outliers.{name}"] = f"{budget['quality'].get('outlier_share', math.nan):.4f}"
    return tags | {f"created_from.{key}": str(value) for key, value in manifest["created_from"].items()}
