"""The report folder: a page with figures for people, beside the files for programs (`lesa.evaluation.exports`).

index.html needs nothing from outside its folder and runs no script. How it looks stands in report.html.jinja.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from lesa import atomic
from lesa.evaluation import plots
from lesa.evaluation.exports import write_exports
from lesa.evaluation.results import Results, Row
from lesa.evaluation.table import format_bytes
from lesa.metrics import OUTLIER_DB
from lesa.models.bill import Bill

GRID_ROWS = 6  # prompts in the grids of methods
PROMPT_IMAGES = 32  # images in the grid of prompts
DIFFERENCE_GAIN = 8  # what differences are multiplied by to be seen
Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the page."""

    section: str  # heading; figures of one section follow each other
    name: str  # of its file in the report folder
    caption: str
    draw: Callable[[Path], None]  # writes the file


def write_report(results: Results, folder: Path, training: Curves | None = None) -> Path:
    """Write every file of the report and return the page.

    Args:
        results: an evaluation with its images.
        folder: made where it is not there; files of other makers in it are left alone.
        training: loss curves, run -> [(optimiser step, loss)].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_exports(results, folder)
    figures = [*_image_figures(results), *_curve_figures(results, training or {})]
    for figure in figures:
        figure.draw(folder / figure.name)
    page = folder / "index.html"
    atomic.write_bytes(page, _page(results, figures).encode())
    return page


def _image_figures(results: Results) -> list[Figure]:
    """What every method draws, and what the model draws, on the first batch."""
    indices = _spread(results)
    figures = []
    for budget in results.budgets:
        methods = [row.method for row in sorted(results.at(budget), key=_grid_order)]
        section, slug = f"Images at {budget}", budget.replace(".", "_")
        grid = partial(plots.method_grid, results, budget, methods, indices[:GRID_ROWS])
        figures += [
            Figure(
                section, f"grid_{slug}.png", "Same prompt and same noise in every row; the plain run first.", grid
            ),
            Figure(
                section,
                f"difference_{slug}.png",
                f"Absolute difference from the plain run, times {DIFFERENCE_GAIN}; black is no difference.",
                partial(grid, gain=DIFFERENCE_GAIN),
            ),
        ]
    is_scored = "agreement" in results.samples["", "plain"]
    scored = "; green where the scorer reads what was asked for, red where it does not." if is_scored else "."
    prompts = partial(plots.prompt_grid, results, indices[:PROMPT_IMAGES])
    caption = f"Images of the plain run with their prompts{scored}"
    return [*figures, Figure("What the model draws", "prompts.png", caption, prompts)]


def _curve_figures(results: Results, training: Curves) -> list[Figure]:
    figures = [
        Figure(
            "Quality against speed",
            "psnr_vs_ratio.png",
            "Mean PSNR with 95% intervals over prompts. Further right is faster, higher is closer to plain. "
            "Cache settings that compute next to nothing are in the tables alone.",
            partial(plots.psnr_against_ratio, results),
        )
    ]
    figures += [
        Figure(
            "Error of the feature, step by step",
            f"error_{budget.replace('.', '_')}.png",
            f"Budget {budget}: distance of the run's feature from the plain run's at the same step. At full "
            "steps what is left is drift, since the runs have parted before.",
            partial(plots.error_by_step, results, budget),
        )
        for budget in results.budgets
    ]
    if results.alphas:
        caption = (
            "Alpha, how far each prediction goes along the projected history, beside first-order Taylor. "
            "Both multiply a difference of cached features; training may have changed the scale of LESA's."
        )
        figures.append(
            Figure("What the experts learned", "alpha.png", caption, partial(plots.alpha_curves, results))
        )
    if training:
        caption = "Loss of the closed loop at every budget (the logarithm of a squared error may be negative)."
        figures.append(Figure("Training", "training.png", caption, partial(plots.training_curves, training)))
    return figures


def _spread(results: Results) -> list[int]:
    """Samples of the first batch, a different prompt each as long as there are any."""
    available = len(results.images["", "plain"])
    first: dict[int, int] = {}
    for index in range(available):
        first.setdefault(int(results.groups[index]), index)
    leading = list(first.values())
    return leading + [index for index in range(available) if index not in set(leading)]


def _grid_order(row: Row) -> tuple[int, float]:
    return (("lesa", "rule", "solver", "cache").index(row.kind), -row.psnr.mean)


def _page(results: Results, figures: Sequence[Figure]) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("lesa.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        outlier_db=OUTLIER_DB,
        title=f"LESA on {results.about.get('workload', 'a bundle')}",
        leads=_leads(results),
        facts=_facts(results),
        bill=_bill(results),
        tables=[_table(results, budget) for budget in results.budgets],
        figures=figures,
    )


def _leads(results: Results) -> list[dict[str, Any]]:
    """LESA beside the best of its peers, for each budget that has both: two rows and their paired difference."""
    leads = []
    for budget in results.budgets:
        rows = {row.method: row for row in results.at(budget)}
        peers = [row for row in rows.values() if row.kind != "lesa"]
        if "lesa" in rows and peers:
            best = max(peers, key=lambda row: row.psnr.mean)
            gain = results.difference(budget, "lesa", best.method)
            leads.append({"ours": rows["lesa"], "best": best, "gain": gain})
    return leads


def _facts(results: Results) -> list[tuple[str, str]]:
    """How it was measured, by name."""
    counts, call = results.counts, results.call
    frames = f", {call['num_frames']} frames" if call.get("num_frames") else ""
    guidance = [
        f"{name.replace('_', ' ')} {call[name]:g}"
        for name in ("guidance_scale", "true_cfg_scale")
        if call.get(name)
    ]
    size = f"{call['width']} x {call['height']} pixels{frames}"
    converged = f"{counts['converged_steps']} steps from the same noise, {counts['converged_samples']} samples"
    timing = (
        f"whole pipeline call at {counts['batch_size']} samples a call, each beside a plain call; "
        f"median of {counts['timed_calls']}; {_processes(counts)}"
    )
    facts = [
        ("Samples", f"{counts['samples']} of {counts['prompts']} held-out prompts, a noise seed each"),
        ("Plain run", ", ".join([f"{len(results.sigmas) - 1} steps", size, *guidance])),
        ("Converged run", converged if counts["converged_samples"] else "not measured"),
        ("Intervals", f"95%, bootstrap over prompts with seeds nested, {counts['resamples']} resamples"),
        ("Features", f"error and bytes on {counts['feature_samples']} samples"),
        ("Wall clock", timing if counts["timed_calls"] else "not measured"),
    ]
    if "bundle" in results.about:
        facts.append(("Bundle", f"manifest sha256 {results.about['bundle']}"))
    return facts


_MAKING = ("record", "search", "train_stage2")  # stages whose passes are the price of a predictor


def _bill(results: Results) -> dict[str, Any] | None:
    """What the transformer computed, by stage, and the work of making the predictor beside what it gains."""
    if not results.bills:
        return None
    bills = {stage: Bill(**values) for stage, values in results.bills.items()}
    branches = 2 if (results.call.get("true_cfg_scale") or 0.0) > 1.0 else 1
    run = float(branches * results.call["num_inference_steps"])
    making = sum(bill.work for stage, bill in bills.items() if stage in _MAKING) / run
    lead = next((lead for lead in _leads(results) if lead["ours"].budget == results.about.get("default_budget")), None)
    gain = lead["gain"].mean if lead else 0.0
    return {
        "lines": [
            {"stage": stage, "forwards": bill.forwards, "backwards": bill.backwards, "runs": bill.work / run}
            for stage, bill in bills.items()
        ],
        "making": making,
        "runs_a_db": making / gain if gain > 0 else None,
        "budget": results.about.get("default_budget"),
    }


def _processes(counts: Mapping[str, int]) -> str:
    """What ran at the same time as a timed call."""
    threads = f"{counts['threads']} thread{'s' if counts['threads'] > 1 else ''}"
    return f"{counts['processes']} processes at once, {threads} each" if counts["processes"] > 1 else threads


def _table(results: Results, budget: str) -> dict[str, Any]:
    """The lines of a budget's table, best first, each with what LESA gains over it."""
    rows = sorted(results.at(budget), key=lambda row: -row.psnr.mean)
    has_ours = any(row.method == "lesa" for row in rows)
    gains = results.differences(budget) if has_ours else {}
    converged = results.differences(budget, metric="converged_psnr") if has_ours else {}
    lines = [
        {
            "row": row,
            "gain": gains.get(row.method),
            "converged_gain": converged.get(row.method),
            "kept": "–" if row.bytes_kept is None else format_bytes(row.bytes_kept),
            "settings": ", ".join(f"{key} {value}" for key, value in row.settings.items()),
        }
        for row in rows
    ]
    return {"budget": budget, "lines": lines, "has_agreement": any(row.agreement for row in rows)}
