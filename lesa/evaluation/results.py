"""What an evaluation found: one row a method and budget, with the samples behind it, and its plain forms.

`to_json` is what `lesa compare --json` prints, `metrics` what DVC compares between revisions; both hold
plain values and None where nothing was measured. Decibels are dB, bytes are bytes, ratios are plain run over
method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lesa.evaluation.bootstrap import Interval, interval, paired_interval

SCHEMA = 1
Samples = dict[str, NDArray[np.float64]]  # "psnr", "ssim", "agreement", "converged_psnr" -> [N]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over samples with its 95% interval, and the 5th percentile of the samples."""

    mean: float
    low: float
    high: float
    p5: float

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "p5": self.p5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method at one budget."""

    budget: str
    method: str
    label: str
    kind: str
    num_steps: int  # sampler steps of its run
    computed_steps: float  # steps at which every block ran; a mean for adaptive caches
    step_ratio: float  # plain run's steps over computed steps
    psnr: Estimate  # to the plain run
    outliers: Interval  # share of samples below `lesa.metrics.OUTLIER_DB`: another picture
    ssim: Estimate
    agreement: Estimate | None  # share of images that the scorer reads as prompted
    converged_psnr: Estimate | None  # to the converged run
    feature_error: float | None  # mean relative L1 of the feature at predicted steps
    feature_error_by_step: tuple[float, ...] | None
    wall_clock_ratio: float | None  # whole pipeline call; median of paired runs
    wall_clock_range: tuple[float, float] | None
    flops_ratio: float | None
    bytes_kept: int | None  # features and what is derived from them, a sample
    weight_bytes: int  # of the predictor
    settings: Mapping[str, Any]
    full_steps: tuple[int, ...] | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "method": self.method,
            "label": self.label,
            "kind": self.kind,
            "num_steps": self.num_steps,
            "computed_steps": self.computed_steps,
            "step_ratio": self.step_ratio,
            "psnr": self.psnr.to_dict(),
            "outlier_share": self.outliers._asdict(),
            "ssim": self.ssim.to_dict(),
            "agreement": self.agreement.to_dict() if self.agreement else None,
            "converged_psnr": self.converged_psnr.to_dict() if self.converged_psnr else None,
            "feature_error": self.feature_error,
            "feature_error_by_step": _listed(self.feature_error_by_step),
            "wall_clock_ratio": self.wall_clock_ratio,
            "wall_clock_range": _listed(self.wall_clock_range),
            "flops_ratio": self.flops_ratio,
            "bytes_kept": self.bytes_kept,
            "weight_bytes": self.weight_bytes,
            "settings": dict(self.settings),
            "full_steps": _listed(self.full_steps),
        }


@dataclass(frozen=True, kw_only=True)
class Results:
    """An evaluation.

    `samples` and `images` are keyed by (budget, method); ("", "plain") is the plain run.
    """

    rows: tuple[Row, ...]
    groups: NDArray[np.int64]  # prompt of each sample
    prompts: tuple[str, ...]  # of each sample
    seeds: tuple[int, ...]
    samples: Mapping[tuple[str, str], Samples] = field(repr=False)
    converged_indices: tuple[int, ...]  # samples that have a converged run
    counts: Mapping[str, int]
    call: Mapping[str, Any]
    sigmas: tuple[float, ...]  # [S + 1] of the plain run
    boundaries: tuple[float, ...] = ()  # noise levels between the predictor's stages
    alphas: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)  # budget -> name -> [S]
    images: Mapping[tuple[str, str], torch.Tensor] = field(default_factory=dict, repr=False)
    resamples: int = 2000
    about: Mapping[str, Any] = field(default_factory=dict)  # what was judged: workload, bundle
    bills: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # stage -> passes, as `lesa.models.bill`

    @property
    def budgets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.budget for row in self.rows))

    def row(self, budget: str, method: str) -> Row:
        """`KeyError` where there is none."""
        for row in self.rows:
            if (row.budget, row.method) == (budget, method):
                return row
        raise KeyError(f"no row of {method!r} at budget {budget!r}")

    def at(self, budget: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.budget == budget)

    def values(self, budget: str, method: str, metric: str = "psnr") -> NDArray[np.float64]:
        """[N] of each sample; `("", "plain")` is the plain run (agreement and converged_psnr only)."""
        return self.samples[budget, method][metric]

    def estimate(self, budget: str, method: str, metric: str) -> Estimate | None:
        """None where the metric was not measured."""
        values = self.samples.get((budget, method), {}).get(metric)
        return None if values is None else estimate(values, self._groups_of(values), self.resamples)

    def difference(self, budget: str, method: str, against: str, metric: str = "psnr") -> Interval:
        """Mean of `method - against` over the same samples, with its 95% interval."""
        ours, theirs = self.values(budget, method, metric), self.values(budget, against, metric)
        return paired_interval(ours, theirs, self._groups_of(ours), self.resamples)

    def differences(self, budget: str, method: str = "lesa", metric: str = "psnr") -> dict[str, Interval]:
        """`difference` against every other method of the budget that has the metric."""
        others = [row.method for row in self.at(budget) if row.method != method]
        return {
            other: self.difference(budget, method, other, metric)
            for other in others
            if metric in self.samples[budget, other] and metric in self.samples[budget, method]
        }

    def _groups_of(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """The prompts of all samples, or of those that have a converged run."""
        is_part = len(values) != len(self.groups)
        return self.groups[list(self.converged_indices)] if is_part else self.groups

    def plain(self) -> dict[str, Any]:
        """The plain run beside the converged one, and as the scorer reads it."""
        named = {metric: self.estimate("", "plain", metric) for metric in ("agreement", "converged_psnr")}
        return {metric: found.to_dict() if found else None for metric, found in named.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything but samples and images, as plain values without NaN."""
        return _plain(
            {
                "schema": SCHEMA,
                "about": dict(self.about),
                "counts": dict(self.counts),
                "call": dict(self.call),
                "sigmas": list(self.sigmas),
                "boundaries": list(self.boundaries),
                "plain": self.plain(),
                "rows": [row.to_dict() for row in self.rows],
                "differences": [
                    {"budget": budget, "method": name, "against": other, "metric": metric, **found._asdict()}
                    for budget in self.budgets
                    for name in _learned(self.at(budget))
                    for metric in ("psnr", "converged_psnr")
                    for other, found in self.differences(budget, name, metric).items()
                ],
                "alphas": {budget: dict(curves) for budget, curves in self.alphas.items()},
            }
        )

    def metrics(self) -> dict[str, Any]:
        """Numbers by budget and method, for `dvc metrics show` and for the manifest of a bundle."""
        budgets: dict[str, Any] = {}
        for budget in self.budgets:
            budgets[budget] = {row.method: _row_metrics(row) for row in self.at(budget)}
            for name in _learned(self.at(budget)):
                gains = self.differences(budget, name)
                budgets[budget][name]["psnr_gain"] = {
                    other: {"mean": gain.mean, "low": gain.low, "high": gain.high}
                    for other, gain in gains.items()
                }
        bills = {stage: dict(bill) for stage, bill in self.bills.items()}
        return _plain({"counts": dict(self.counts), "plain": self.plain(), "budgets": budgets, "bills": bills})


def estimate(values: NDArray[np.float64], groups: NDArray[np.int64], resamples: int) -> Estimate:
    """Mean with interval, and the 5th percentile, of one metric."""
    mean, low, high = interval(values, groups, resamples)
    return Estimate(mean=mean, low=low, high=high, p5=float(np.percentile(values, 5)))


def _row_metrics(row: Row) -> dict[str, Any]:
    return {
        "computed_steps": row.computed_steps,
        "psnr": row.psnr.to_dict(),
        "outlier_share": row.outliers._asdict(),
        "ssim": row.ssim.mean,
        "agreement": row.agreement.mean if row.agreement else None,
        "converged_psnr": row.converged_psnr.mean if row.converged_psnr else None,
        "feature_error": row.feature_error,
        "wall_clock_ratio": row.wall_clock_ratio,
        "flops_ratio": row.flops_ratio,
        "bytes_kept": row.bytes_kept,
    }


def _learned(rows: Sequence[Row]) -> list[str]:
    return [row.method for row in rows if row.kind == "lesa"]


def _listed(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is not a number was not measured."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
