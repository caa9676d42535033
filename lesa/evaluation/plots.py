"""The report's figures, drawn with matplotlib without a display."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lesa.evaluation.results import Results, Row
from lesa.schedule import stage_of_steps

DPI = 130
_STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "#222222"},
    "lesa": {"color": "#c1121f", "linewidth": 2.4, "zorder": 5},
    "lesa_ground_truth": {"color": "#e5989b", "linestyle": "--"},
    "champion": {"color": "#7f1d1d", "linestyle": ":"},
    "reuse": {"color": "#9a9a9a"},
    "taylor1": {"color": "#1d4ed8"},
    "taylor2": {"color": "#1d4ed8", "linestyle": ":"},
    "taylor1_own": {"color": "#60a5fa"},
    "taylor2_own": {"color": "#60a5fa", "linestyle": ":"},
    "hicache": {"color": "#0f766e"},
    "spectrum_blend": {"color": "#0891b2", "linestyle": "--"},
    "dmd": {"color": "#be185d"},
    "euler": {"color": "#15803d"},
    "unipc2": {"color": "#3f6212", "linestyle": "--"},
    "adams_bashforth2": {"color": "#65a30d"},
    "first_block_cache": {"color": "#d97706"},
    "first_block_cache_equal_time": {"color": "#fbbf24"},
    "mag_cache": {"color": "#7c3aed"},
    "mag_cache_equal_time": {"color": "#c4b5fd"},
}
_MARKERS = {"lesa": "*", "rule": "o", "solver": "s", "cache": "D"}


def psnr_against_ratio(results: Results, path: Path) -> None:
    """Every method's PSNR against its step ratio and against its wall-clock ratio."""
    axes_of = [("step_ratio", "step ratio: plain run's steps / computed steps (equal ones side by side)")]
    if any(row.wall_clock_ratio for row in results.rows):
        axes_of.append(("wall_clock_ratio", "wall-clock ratio of the whole pipeline call"))
    figure = Figure(figsize=(5.6 * len(axes_of) + 2.6, 5.0), layout="constrained")
    panels = figure.subplots(1, len(axes_of), squeeze=False, sharey=True)[0]
    shown: dict[str, Row] = {row.method: row for row in results.rows}
    fixed = max((row.step_ratio for row in results.rows if row.kind != "cache"), default=1.0)
    for axis, (attribute, label) in zip(panels, axes_of, strict=True):
        for number, (name, first) in enumerate(shown.items()):
            points = sorted(
                (getattr(row, attribute), row.psnr.mean, row.psnr.low, row.psnr.high)
                for row in results.rows
                if row.method == name and getattr(row, attribute) and row.step_ratio <= 1.5 * fixed
            )
            if not points:
                continue
            x, mean, low, high = (np.array(column) for column in zip(*points, strict=True))
            if attribute == "step_ratio":  # most methods share it: side by side rather than on top
                x = x + 0.055 * (number - len(shown) / 2)
            style = _style(name)
            axis.errorbar(
                x,
                mean,
                yerr=(mean - low, high - mean),
                marker=_MARKERS[first.kind],
                markersize=11 if first.kind == "lesa" else 6,
                capsize=2,
                elinewidth=0.9,
                label=first.label,
                **style,
            )
        axis.set_xlabel(label)
        _tidy(axis)
    panels[0].set_ylabel("PSNR to the plain run, dB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=DPI)


def error_by_step(results: Results, budget: str, path: Path) -> None:
    """Relative L1 error of the feature at every step; noise stages shaded, LESA's full steps ticked."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    axis = figure.subplots()
    rows = [row for row in results.at(budget) if row.feature_error_by_step]
    for row in rows:
        values = np.array(row.feature_error_by_step)
        axis.plot(np.where(values > 0, values, np.nan), label=row.label, **_style(row.method))
    axis.set_yscale("log")
    _shade_stages(axis, results)
    _tick_full_steps(axis, rows)
    axis.set_xlabel("sampler step, noisiest first; triangles: full steps of LESA")
    axis.set_ylabel("relative L1 error of the feature")
    _tidy(axis)
    figure.legend(loc="outside right upper", fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=DPI)


def alpha_curves(results: Results, path: Path) -> None:
    """Alpha of each expert at predicted steps, one panel a budget, beside first-order Taylor."""
    budgets = [budget for budget in results.budgets if budget in results.alphas]
    if not budgets:
        return
    figure = Figure(figsize=(10.5, 3.4 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), 1, squeeze=False)[:, 0]
    for axis, budget in zip(panels, budgets, strict=True):
        rows = {row.method: row for row in results.at(budget)}
        for name, values in sorted(results.alphas[budget].items(), key=lambda item: item[0] == "taylor1"):
            label = "first-order Taylor" if name == "taylor1" else rows[name].label
            marker = "" if name == "taylor1" else "."
            style = {"linewidth": 1.1, "zorder": 6} if name == "taylor1" else {}
            axis.plot(values, marker=marker, label=label, **(_style(name) | style))
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([-1, 0, 0.5, 1, 2, 5, 10], ["-1", "0", "0.5", "1", "2", "5", "10"])
        _shade_stages(axis, results)
        _tick_full_steps(axis, list(rows.values()))
        axis.set_ylabel(f"alpha at {budget}")
        _tidy(axis)
    panels[-1].set_xlabel("sampler step, noisiest first; triangles: full steps")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=DPI)


def method_grid(
    results: Results,
    budget: str,
    methods: Sequence[str],
    indices: Sequence[int],
    path: Path,
    *,
    gain: float = 0,
) -> None:
    """Images of the same prompt and noise in a row, the plain run first.

    Args:
        results: with images.
        budget: whose methods.
        methods: columns after the plain run.
        indices: samples of the first batch, the rows.
        path: PNG.
        gain: 0 for the images; otherwise what absolute differences from the plain run are multiplied by.
    """
    plain = results.images["", "plain"]
    columns = [("plain run", plain)]
    for name in methods:
        images = results.images[budget, name]
        shown = (images - plain).abs() * gain if gain else images
        columns.append((results.row(budget, name).label, shown))
    size, gap, left, above = 0.9, 0.07, 1.35, 1.4  # inches
    across, down = (size * side for side in _panel(plain[0]))
    width = left + (across + gap) * len(columns) + 0.4
    height = above + (down + gap) * len(indices)
    figure = Figure(figsize=(width, height))
    # One axis in inches for all: an image is drawn in a tenth of the time that an axis of its own takes.
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_axis_off()
    for column, (label, images) in enumerate(columns):
        x = left + column * (across + gap)
        sheet.text(
            x + 0.25 * across, height - above + 0.1, label.replace(", ", ",\n", 1), fontsize=7.5, rotation=38,
            ha="left", va="bottom",
        )  # fmt: skip
        for row, index in enumerate(indices):
            y = height - above - row * (down + gap) - down
            _show(sheet, images[index], (x, x + across, y, y + down))
    for row, index in enumerate(indices):
        middle = height - above - row * (down + gap) - down / 2
        sheet.text(left - 0.07, middle, _wrapped(results.prompts[index]), fontsize=6.5, ha="right", va="center")
    sheet.set(xlim=(0, width), ylim=(0, height))
    figure.savefig(path, dpi=DPI)


def prompt_grid(results: Results, indices: Sequence[int], path: Path) -> None:
    """Plain-run images with their prompts; green where the scorer reads what was asked, red where not."""
    images = results.images["", "plain"]
    read = results.samples["", "plain"].get("agreement")
    across, down = _panel(images[0])
    columns = round(8 / across)
    wide, high, above, gap = 1.3 * across, 1.3 * down, 0.5, 0.15  # inches
    width = gap + (wide + gap) * columns
    height = (high + above) * math.ceil(len(indices) / columns) + gap
    figure = Figure(figsize=(width, height))
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_axis_off()
    for number, index in enumerate(indices):
        line, column = divmod(number, columns)
        left, top = gap + column * (wide + gap), height - line * (high + above) - above
        _show(sheet, images[index], (left, left + wide, top - high, top))
        colour = "#222222" if read is None else "#15803d" if read[index] else "#c1121f"
        text = _wrapped(results.prompts[index])
        sheet.text(left + wide / 2, top + 0.04, text, fontsize=6.5, color=colour, ha="center", va="bottom")
    sheet.set(xlim=(0, width), ylim=(0, height))
    figure.savefig(path, dpi=DPI)


def training_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Loss against optimiser step, one line a run."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        axis.plot(steps, losses, label=name, linewidth=1.2)
    if all(loss > 0 for points in curves.values() for _, loss in points):
        axis.set_yscale("log")
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("loss")
    _tidy(axis)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def _show(sheet: Any, image: torch.Tensor, place: tuple[float, float, float, float]) -> None:
    """An image with its pixels as they are, in a thin frame so that white on white has an edge.

    Args:
        place: left, right, bottom and top on the sheet.
    """
    left, right, bottom, top = place
    sheet.imshow(_pixels(image), extent=place, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    frame = Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor="#b5b5b5", linewidth=0.5)
    sheet.add_patch(frame)


def _style(name: str) -> dict[str, Any]:
    return {"linewidth": 1.4, **_STYLES.get(name, {"color": "#0f766e"})}


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _shade_stages(axis: Any, results: Results) -> None:
    stages = stage_of_steps(torch.tensor(results.sigmas), results.boundaries)
    for stage in sorted(set(stages)):
        first, last = stages.index(stage), len(stages) - 1 - stages[::-1].index(stage)
        if stage % 2:
            axis.axvspan(first - 0.5, last + 0.5, color="#000000", alpha=0.06, linewidth=0)
        middle = (first + last) / 2
        axis.text(
            middle, 1.0, f"noise stage {stage}", transform=axis.get_xaxis_transform(), ha="center",
            va="bottom", fontsize=8, color="#555555",
        )  # fmt: skip
    axis.set_xlim(-0.5, len(stages) - 0.5)


def _tick_full_steps(axis: Any, rows: Sequence[Row]) -> None:
    full = next((row.full_steps for row in rows if row.kind == "lesa" and row.full_steps), ())
    axis.plot(
        full, [0.015] * len(full), "^", color="#c1121f", markersize=5, transform=axis.get_xaxis_transform(),
        clip_on=False,
    )  # fmt: skip


def _pixels(image: torch.Tensor) -> np.ndarray:
    """[H, W, 3] of an image [3, H, W]; of a video [F, 3, H, W] its first, middle and last frame, downwards."""
    if image.ndim == 4:
        image = torch.cat([image[0], image[len(image) // 2], image[-1]], dim=1)
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def _panel(image: torch.Tensor) -> tuple[float, float]:
    """Width and height of what `_pixels` shows, the shorter side as 1."""
    height, width, _ = _pixels(image).shape
    shorter = min(height, width)
    return width / shorter, height / shorter


def _wrapped(prompt: str, width: int = 22) -> str:
    return "\n".join(textwrap.wrap(prompt, width)[:3])
