"""The report folder: a page with pictures for people, metrics and curves for DVC, samples for whoever checks.

index.html needs nothing from outside its folder and runs no script.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lesa import atomic
from lesa.evaluation import plots
from lesa.evaluation.bootstrap import Interval
from lesa.evaluation.results import Estimate, Results, Row
from lesa.evaluation.table import format_bytes, format_table

__all__ = ["format_table", "write_report"]

GRID_ROWS = 6  # prompts in the grids of methods
PROMPT_IMAGES = 32  # pictures in the grid of prompts
DIFFERENCE_GAIN = 8  # what differences are multiplied by to be seen
Curves = Mapping[str, Sequence[tuple[int, float]]]


def write_report(results: Results, folder: Path, training: Curves | None = None) -> Path:
    """Write every file of the report and return the page.

    Args:
        results: an evaluation with its pictures.
        folder: made where it is not there; files of other makers in it are left alone.
        training: loss curves, run -> [(optimiser step, loss)].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_json(folder / "metrics.json", results.metrics())
    atomic.write_json(folder / "results.json", results.to_json())
    atomic.write_bytes(folder / "samples.npz", _samples_file(results))
    for name, lines in _tables(results).items():
        atomic.write_bytes(folder / name, _csv(lines))
    images = _draw(results, folder, training or {})
    page = folder / "index.html"
    atomic.write_bytes(page, _page(results, images).encode())
    return page


def _samples_file(results: Results) -> bytes:
    """Arrays `<budget>/<method>/<metric>` [N] with `prompt`, `group`, `seed` [N], without pickle."""
    arrays: dict[str, np.ndarray] = {
        "prompt": np.array(results.prompts, dtype=np.str_),
        "group": results.groups,
        "seed": np.array(results.seeds, dtype=np.int64),
        "converged_index": np.array(results.converged_indices, dtype=np.int64),
    }
    for (budget, method), metrics in results.samples.items():
        for metric, values in metrics.items():
            arrays["/".join(part for part in (budget, method, metric) if part)] = values
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _tables(results: Results) -> dict[str, list[list[object]]]:
    """The curves as DVC plots them: one line a point, with its curve's name."""
    ratio: list[list[object]] = [
        ["method", "budget", "step_ratio", "wall_clock_ratio", "psnr", "psnr_low", "psnr_high"]
    ]
    error: list[list[object]] = [["budget", "method", "step", "relative_l1"]]
    alpha: list[list[object]] = [["budget", "method", "step", "alpha"]]
    for row in sorted(results.rows, key=lambda row: (row.method, row.step_ratio)):
        psnr = row.psnr
        ratio.append(
            [
                row.method,
                row.budget,
                round(row.step_ratio, 4),
                row.wall_clock_ratio or "",
                psnr.mean,
                psnr.low,
                psnr.high,
            ]
        )
    for row in results.rows:
        for step, value in enumerate(row.feature_error_by_step or ()):
            error.append([row.budget, row.method, step, value])
    for budget, curves in results.alphas.items():
        for method, values in curves.items():
            alpha += [[budget, method, step, value] for step, value in enumerate(values) if value == value]
    return {"psnr_vs_ratio.csv": ratio, "feature_error_by_step.csv": error, "alpha.csv": alpha}


def _csv(lines: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _draw(results: Results, folder: Path, training: Curves) -> list[tuple[str, str, str]]:
    """Draws everything; returns section, file name and caption in the page's order."""
    drawn: list[tuple[str, str, str]] = []

    def add(section: str, name: str, caption: str, draw: Callable[[Path], None]) -> None:
        draw(folder / name)
        drawn.append((section, name, caption))

    indices = _spread(results)
    for budget in results.budgets:
        methods = [row.method for row in sorted(results.at(budget), key=_grid_order)]
        slug = budget.replace(".", "_")
        add(
            f"Pictures at {budget}",
            f"grid_{slug}.png",
            "Same prompt and same noise in every row; the plain run first.",
            partial(plots.method_grid, results, budget, methods, indices[:GRID_ROWS]),
        )
        add(
            f"Pictures at {budget}",
            f"difference_{slug}.png",
            f"Absolute difference from the plain run, times {DIFFERENCE_GAIN}; black is no difference.",
            partial(plots.method_grid, results, budget, methods, indices[:GRID_ROWS], gain=DIFFERENCE_GAIN),
        )
    add(
        "What the model draws",
        "prompts.png",
        "Plain-run pictures with their prompts"
        + (
            "; green where the scorer reads what was asked for, red where it does not."
            if "agreement" in results.samples["", "plain"]
            else "."
        ),
        partial(plots.prompt_grid, results, indices[:PROMPT_IMAGES]),
    )
    add(
        "Quality against speed",
        "psnr_vs_ratio.png",
        "Mean PSNR with 95% intervals over prompts. Further right is faster, higher is closer to plain. "
        "Cache settings that compute next to nothing are in the tables alone.",
        partial(plots.psnr_against_ratio, results),
    )
    for budget in results.budgets:
        add(
            "Error of the feature, step by step",
            f"error_{budget.replace('.', '_')}.png",
            f"Budget {budget}: distance of the run's feature from the plain run's at the same step. At full "
            "steps what is left is drift, since the runs have parted before.",
            partial(plots.error_by_step, results, budget),
        )
    if results.alphas:
        add(
            "What the experts learned",
            "alpha.png",
            "Alpha, how far each prediction goes along the projected history, beside first-order Taylor. "
            "Both multiply a difference of cached features; training may have changed the scale of LESA's.",
            partial(plots.alpha_curves, results),
        )
    if training:
        add(
            "Training",
            "training.png",
            "Loss of the closed loop at every budget (the logarithm of a squared error may be negative).",
            partial(plots.training_curves, training),
        )
    return drawn


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


def _page(results: Results, images: Sequence[tuple[str, str, str]]) -> str:
    about = results.about
    title = f"LESA on {about.get('workload', 'a bundle')}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=lead>{_lead(results)}</p>",
        "<h2>What was measured</h2>",
        _measured(results),
    ]
    for budget in results.budgets:
        parts += [f"<h2>Budget {html.escape(budget)}</h2>", _table(results, budget)]
    parts.append(_legend())
    section = ""
    for heading, name, caption in images:
        if heading != section:
            parts.append(f"<h2>{html.escape(heading)}</h2>")
            section = heading
        alt = html.escape(caption, quote=True)
        parts.append(
            f'<figure><img src="{name}" alt="{alt}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def _lead(results: Results) -> str:
    """One sentence a budget: LESA beside the best of its peers."""
    sentences = []
    for budget in results.budgets:
        rows = {row.method: row for row in results.at(budget)}
        peers = [row for row in rows.values() if row.kind != "lesa"]
        if "lesa" not in rows or not peers:
            continue
        ours, best = rows["lesa"], max(peers, key=lambda row: row.psnr.mean)
        gain = results.difference(budget, "lesa", best.method)
        sentences.append(
            f"With {ours.computed_steps:g} of {ours.num_steps} steps computed, LESA is at "
            f"<b>{ours.psnr.mean:.2f} dB</b> to the plain run; the best of the others, "
            f"{html.escape(best.label)}, is at {best.psnr.mean:.2f} dB (difference {_interval(gain)})."
        )
    return " ".join(sentences)


def _measured(results: Results) -> str:
    counts, call = results.counts, results.call
    size = f"{call['width']} x {call['height']} pixels" + (
        f", {call['num_frames']} frames" if call.get("num_frames") else ""
    )
    guidance = [
        f"{name.replace('_', ' ')} {call[name]:g}"
        for name in ("guidance_scale", "true_cfg_scale")
        if call.get(name)
    ]
    facts = [
        ("Samples", f"{counts['samples']} of {counts['prompts']} held-out prompts, a noise seed each"),
        ("Plain run", ", ".join([f"{len(results.sigmas) - 1} steps", size, *guidance])),
        (
            "Converged run",
            f"{counts['converged_steps']} steps from the same noise, {counts['converged_samples']} samples"
            if counts["converged_samples"]
            else "not measured",
        ),
        ("Intervals", f"95%, bootstrap over prompts with seeds nested, {counts['resamples']} resamples"),
        ("Features", f"error and bytes on {counts['feature_samples']} samples"),
        (
            "Wall clock",
            f"whole pipeline call at {counts['batch_size']} samples a call, each beside a plain call; "
            f"median of {counts['timed_calls']}; {_processes(counts)}"
            if counts["timed_calls"]
            else "not measured",
        ),
    ]
    if "bundle" in results.about:
        facts.append(("Bundle", f"manifest sha256 {results.about['bundle']}"))
    rows = "".join(f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts)
    return f'<table class="facts">{rows}</table>'


def _processes(counts: Mapping[str, int]) -> str:
    """What ran at the same time as a timed call."""
    threads = f"{counts['threads']} thread{'s' if counts['threads'] > 1 else ''}"
    return f"{counts['processes']} processes at once, {threads} each" if counts["processes"] > 1 else threads


def _table(results: Results, budget: str) -> str:
    rows = sorted(results.at(budget), key=lambda row: -row.psnr.mean)
    has_ours = any(row.method == "lesa" for row in rows)
    gains = results.differences(budget) if has_ours else {}
    closer = results.differences(budget, metric="converged_psnr") if has_ours else {}
    has_agreement = any(row.agreement for row in rows)
    headings = [
        "method",
        "computed steps",
        "PSNR, dB",
        "5th percentile",
        "LESA minus this, dB",
        "SSIM",
        "PSNR to converged, dB",
        "LESA minus this",
        "feature error",
        "wall clock",
        "FLOPs",
        "kept a sample",
    ] + (["as prompted"] if has_agreement else [])
    lines = []
    for row in rows:
        gain, close = gains.get(row.method), closer.get(row.method)
        cells = [
            f"{row.computed_steps:.1f}".removesuffix(".0"),
            _estimate(row.psnr, 2),
            f"{row.psnr.p5:.2f}",
            _signed(gain),
            f"{row.ssim.mean:.4f}",
            _estimate(row.converged_psnr, 2),
            _signed(close),
            "–" if row.feature_error is None else f"{row.feature_error:.4f}",
            "–" if row.wall_clock_ratio is None else f"{row.wall_clock_ratio:.2f}x",
            "–" if row.flops_ratio is None else f"{row.flops_ratio:.2f}x",
            "–" if row.bytes_kept is None else format_bytes(row.bytes_kept),
        ] + ([f"{row.agreement.mean:.3f}" if row.agreement else "–"] if has_agreement else [])
        tag = ' class="ours"' if row.method == "lesa" else ""
        tip = html.escape(", ".join(f"{key} {value}" for key, value in row.settings.items()), quote=True)
        lines.append(
            f'<tr{tag}><th title="{tip}">{html.escape(row.label)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _legend() -> str:
    return (
        "<p class=note>Intervals are 95%. Differences are paired: same prompts, same noise. Solvers with "
        "fewer steps owe nothing to the plain run's own error, so the distance to a converged run is shown "
        "for everybody. Threshold caches were tuned on training prompts until they are no faster than LESA, "
        "but never to fewer computed steps; where equal time means fewer steps, that setting is a row of its "
        "own. \u201cIts own full steps\u201d: TaylorSeer's published rule with as many full steps. FLOPs "
        "include the predictor's. Hover over a method for its settings.</p>"
    )


def _estimate(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.{digits}f} <small>[{value.low:.{digits}f}, {value.high:.{digits}f}]</small>"


def _signed(value: Interval | None) -> str:
    if value is None:
        return ""
    colour = "better" if value.low > 0 else "worse" if value.high < 0 else ""
    return f'<span class="{colour}">{_interval(value)}</span>'


def _interval(value: Interval) -> str:
    return f"{value.mean:+.2f} <small>[{value.low:+.2f}, {value.high:+.2f}]</small>"


_STYLE = """:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --line:
#d8dee4;
  --ours: #fff1f0; --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line:
#30363d;
  --ours: #2d1517; --good: #3fb950; --bad: #f85149; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom:
.25rem; } .lead { font-size: 1.05rem; max-width: 60rem; }
.note, figcaption { color: var(--soft); font-size: .87rem; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
} thead th { white-space: normal; vertical-align: bottom; color: var(--soft); font-weight: 600; }
tbody th, .facts th, thead th:first-child { text-align: left; font-weight: 500; }
.facts td { text-align: left; white-space: normal; }
.ours th, .ours td { background: var(--ours); font-weight: 650; }
small { color: var(--soft); font-weight: 400; }
.better { color: var(--good); } .worse { color: var(--bad); }
figure { margin: 0 0 1.4rem; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius:
6px; }
"""
