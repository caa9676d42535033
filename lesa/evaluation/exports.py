"""What an evaluation leaves for programs: metrics and curves for DVC, every sample for a check by hand."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lesa import atomic
from lesa.evaluation.results import Results

Lines = list[list[object]]  # of a CSV file, the heading first


def write_exports(results: Results, folder: Path) -> None:
    """Write metrics.json, results.json, samples.npz and one CSV file for each kind of curve."""
    atomic.write_json(folder / "metrics.json", results.metrics())
    atomic.write_json(folder / "results.json", results.to_json())
    atomic.write_bytes(folder / "samples.npz", _samples_file(results))
    curves = {
        "psnr_vs_ratio.csv": _ratio_lines(results),
        "feature_error_by_step.csv": _feature_error_lines(results),
        "alpha.csv": _alpha_lines(results),
    }
    for name, lines in curves.items():
        atomic.write_bytes(folder / name, _csv(lines))


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


def _ratio_lines(results: Results) -> Lines:
    """PSNR against speed: a line for each method and budget, so that a method's points make its curve."""
    lines: Lines = [["method", "budget", "step_ratio", "wall_clock_ratio", "psnr", "psnr_low", "psnr_high"]]
    for row in sorted(results.rows, key=lambda row: (row.method, row.step_ratio)):
        speed = [round(row.step_ratio, 4), row.wall_clock_ratio or ""]
        lines.append([row.method, row.budget, *speed, row.psnr.mean, row.psnr.low, row.psnr.high])
    return lines


def _feature_error_lines(results: Results) -> Lines:
    lines: Lines = [["budget", "method", "step", "relative_l1"]]
    for row in results.rows:
        for step, value in enumerate(row.feature_error_by_step or ()):
            lines.append([row.budget, row.method, step, value])
    return lines


def _alpha_lines(results: Results) -> Lines:
    """Predicted steps alone: alpha is NaN at full ones."""
    lines: Lines = [["budget", "method", "step", "alpha"]]
    for budget, curves in results.alphas.items():
        for method, values in curves.items():
            lines += [[budget, method, step, value] for step, value in enumerate(values) if value == value]
    return lines


def _csv(lines: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
