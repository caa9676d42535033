"""The README.md of a bundle, written from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lesa.bundle.manifest import Manifest


def card(manifest: Manifest) -> str:
    """Markdown for people: what it fits, how to use it, how good it measured."""
    data = manifest.data
    model: Mapping[str, Any] = data["model"]
    revision = f" at {model['revision']}" if model["revision"] else ""
    is_video = data["call"].get("num_frames") is not None
    result, made = ("video", "frames") if is_video else ("image", "images")
    lines = [
        f"# LESA predictor for `{manifest.workload}`",
        "",
        "Predicts the last block's feature of a diffusion transformer at most sampler steps, so that the",
        "blocks run at a few steps only (LESA, arXiv 2602.20497). Numbers and text; no code.",
        "",
        "```python",
        "import lesa",
        f"from diffusers import {manifest.pipeline_class}",
        f'pipe = {manifest.pipeline_class}.from_pretrained("{model["source"]}")',
        'lesa.enable(pipe, "path/to/this/folder")',
        f"{result} = pipe(prompt, **lesa.call_kwargs(pipe)).{made}[0]",
        "```",
        "",
        "## Fits",
        "",
        f"- model: {model['source'] or 'not stated'}{revision}, {manifest.transformer_class}, "
        f"fingerprint `{manifest.fingerprint}`",
        f"- scheduler: {manifest.scheduler_class}, {_steps(manifest)}",
        "- call: " + ", ".join(f"{key} {value}" for key, value in data["call"].items() if value is not None),
        "",
        "## Budgets",
        "",
        "| budget | full steps | ratio | " + " | ".join(_measures(manifest)) + " |",
        "| --- | --- | --- | " + " | ".join("---" for _ in _measures(manifest)) + " |",
    ]
    for name, budget in manifest.budgets.items():
        mark = " (default)" if name == manifest.default_budget else ""
        cells = [_number(measure, budget.quality.get(measure)) for measure in _measures(manifest)]
        schedule = budget.schedule
        lines.append(
            f"| {name}{mark} | {schedule.num_full} of {schedule.num_steps} | {schedule.ratio:.2f}x | "
            + " | ".join(cells)
            + " |"
        )
    lines += [
        f"\nBudget {name} is left out: {'; '.join(map(str, reasons))}."
        for name, reasons in (data["evaluation"].get("left_out") or {}).items()
    ]
    lines += [
        "",
        "PSNR in dB against the same model without acceleration, held-out prompts and seeds. `outlier_share`: share of",
        "results below 30 dB, which are another picture; `outlier_share_high` is the upper end of its interval.",
        "",
        f"Licence of the predictor: {data['license'] or 'not stated'}; "
        f"of the base model: {data['base_license'] or 'not stated'}.",
    ]
    return "\n".join(lines) + "\n"


def _steps(manifest: Manifest) -> str:
    low, high = manifest.step_range
    own, counts = len(manifest.sigmas) - 1, manifest.predictor.step_counts
    if low == high:
        return f"{own} steps"
    return f"{low} to {high} steps (trained at {', '.join(map(str, counts))}; the figures below are at {own})"


def _measures(manifest: Manifest) -> list[str]:
    names = {name for budget in manifest.budgets.values() for name, v in budget.quality.items() if _plain(v)}
    return sorted(names) or ["quality"]


def _plain(value: Any) -> bool:
    return isinstance(value, int | float)


def _number(measure: str, value: Any) -> str:
    if not _plain(value):
        return "-"
    return f"{value:.1%}" if "share" in measure else f"{value:.2f}"
