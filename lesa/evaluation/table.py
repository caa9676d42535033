"""The comparison as text, for terminals and logs."""

from __future__ import annotations

from collections.abc import Sequence

from lesa.evaluation.results import Estimate, Results, Row
from lesa.metrics import OUTLIER_DB

_COLUMNS = (
    "method",
    "steps",
    "PSNR dB [95%]",
    "p5",
    "other",
    "LESA minus",
    "SSIM",
    "to conv.",
    "feature",
    "time",
    "FLOPs",
    "kept",
)


def format_table(results: Results) -> str:
    """One table a budget: every method, best PSNR first, with what LESA has over it."""
    counts = results.counts
    lines = [
        f"{counts['samples']} samples of {counts['prompts']} prompts; PSNR and SSIM to the plain run of "
        f"{len(results.sigmas) - 1} steps, 95% intervals over prompts",
    ]
    for budget in results.budgets:
        rows = sorted(results.at(budget), key=lambda row: -row.psnr.mean)
        has_agreement = any(row.agreement for row in rows)
        gains = results.differences(budget) if any(row.method == "lesa" for row in rows) else {}
        headings = [*_COLUMNS, *(["as prompted"] if has_agreement else [])]
        cells = []
        for row in rows:
            gain = gains.get(row.method)
            cells.append(
                [
                    row.label,
                    _number(row.computed_steps, 1).removesuffix(".0"),
                    f"{row.psnr.mean:.2f} [{row.psnr.low:.2f}, {row.psnr.high:.2f}]",
                    f"{row.psnr.p5:.2f}",
                    f"{row.outliers.mean:.1%}",
                    f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]" if gain else "",
                    f"{row.ssim.mean:.4f}",
                    _mean(row.converged_psnr, 2),
                    _number(row.feature_error, 4),
                    _times(row.wall_clock_ratio),
                    _times(row.flops_ratio),
                    format_bytes(row.bytes_kept),
                    *([_mean(row.agreement, 3)] if has_agreement else []),
                ]
            )
        lines += ["", f"budget {budget} ({_steps(rows)})", *_aligned(headings, cells)]
    lines += ["", f"other: share below {OUTLIER_DB:g} dB, another picture; LESA's is {_outliers(results)}"]
    plain = results.estimate("", "plain", "converged_psnr")
    if plain is not None:
        lines += [
            "",
            f"to conv.: PSNR to a run of {counts['converged_steps']} steps on "
            f"{counts['converged_samples']} samples; the plain run itself has {plain.mean:.2f} dB",
        ]
    asked = results.estimate("", "plain", "agreement")
    if asked is not None:
        lines.append(f"as prompted: share that the scorer reads as prompted; plain run {asked.mean:.3f}")
    return "\n".join(lines)


def _outliers(results: Results) -> str:
    ours = [row for row in results.rows if row.method == "lesa"]
    return ", ".join(f"{row.outliers.mean:.1%} (up to {row.outliers.high:.1%}) at {row.budget}" for row in ours) or "-"


def _steps(rows: Sequence[Row]) -> str:
    ours = [row for row in rows if row.kind == "lesa" and row.full_steps]
    if not ours:
        return "all methods"
    return f"{len(ours[0].full_steps or ())} full of {ours[0].num_steps} steps"


def _aligned(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (headings, *cells)) for i in range(len(headings))]
    lines = []
    for row in (headings, ["-" * width for width in widths], *cells):
        first, *others = row
        padded = [
            first.ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True)),
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def _mean(value: Estimate | None, digits: int) -> str:
    return "-" if value is None else f"{value.mean:.{digits}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def format_bytes(value: int | None) -> str:
    """For people; "-" where nothing was measured."""
    if value is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"
