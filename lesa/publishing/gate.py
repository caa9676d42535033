"""The gate: may this candidate become champion? A pure function over what was measured for this decision.

Two conditions, against the champion and against every peer, on the same samples:
  at the default budget the lower end of the paired 95% interval of the mean PSNR difference is above zero;
  at no budget is the 5th percentile lower by more than the tolerance.
Whatever is missing, not finite or not comparable speaks against the candidate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lesa.evaluation.bootstrap import paired_interval

Psnr = Mapping[str, Sequence[float]]  # budget -> decibels, one a sample, in the order of the samples


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What was decided and why; `to_dict` is what is recorded."""

    promote: bool
    reasons: tuple[str, ...]  # every reason against, or the one for
    numbers: dict[str, Any]  # per opponent and budget: means, paired interval, 5th percentiles

    def to_dict(self) -> dict[str, Any]:
        return {"promote": self.promote, "reasons": list(self.reasons), "numbers": self.numbers}


def decide(
    candidate: Psnr,
    champion: Psnr | None,
    peers: Mapping[str, Psnr],
    *,
    groups: Sequence[int],
    default_budget: str,
    tail_tolerance_db: float = 0.5,
) -> Decision:
    """Judges a candidate.

    Args:
        candidate: PSNR of the candidate at each of its budgets.
        champion: PSNR of the champion on the same samples and schedules; None when there is none, or when it
            was made for another transformer and so cannot run here.
        peers: PSNR of every peer, by name, at the budgets where it exists: not every peer's rule can make
            every number of full steps. At every budget there must be one.
        groups: the prompt of each sample; the interval resamples prompts, not samples.
        default_budget: the budget that must win.
        tail_tolerance_db: how much lower the 5th percentile may be.

    Returns:
        promote is True only if every comparison was made and won.
    """
    reasons: list[str] = []
    numbers: dict[str, Any] = {}
    if default_budget not in candidate:
        reasons.append(f"candidate: not measured at the default budget {default_budget}")
    for budget, values in candidate.items():
        reasons += _defects("candidate", budget, values, groups)
    for budget in candidate:
        if not any(budget in measured for measured in peers.values()):
            reasons.append(f"peers: none was measured at budget {budget}")
    opponents = {**({"champion": champion} if champion is not None else {}), **peers}
    if reasons:
        return Decision(promote=False, reasons=tuple(reasons), numbers=numbers)
    for name, theirs in opponents.items():
        numbers[name] = {}
        for budget, ours in candidate.items():
            if budget not in theirs and name != "champion":
                continue
            if budget not in theirs:
                reasons.append(f"{name}: not measured at budget {budget}")
                continue
            defects = _defects(name, budget, theirs[budget], groups)
            if defects:
                reasons += defects
                continue
            compared = _compare(ours, theirs[budget], groups)
            numbers[name][budget] = compared
            reasons += _losses(name, budget, compared, budget == default_budget, tail_tolerance_db)
    if not reasons:
        return Decision(promote=True, reasons=(f"better than {', '.join(opponents)}",), numbers=numbers)
    return Decision(promote=False, reasons=tuple(reasons), numbers=numbers)


def _defects(name: str, budget: str, values: Sequence[float], groups: Sequence[int]) -> list[str]:
    if len(values) != len(groups) or not len(values):
        return [f"{name}: {len(values)} samples at budget {budget}, expected {len(groups)}"]
    bad = sum(not math.isfinite(value) for value in values)
    return [f"{name}: {bad} samples at budget {budget} are not finite"] if bad else []


def _compare(ours: Sequence[float], theirs: Sequence[float], groups: Sequence[int]) -> dict[str, float]:
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    mean, low, high = paired_interval(a, b, np.asarray(groups))
    return {
        "mean": float(a.mean()),
        "opponent_mean": float(b.mean()),
        "difference": float(mean),
        "low": float(low),
        "high": float(high),
        "p5": float(np.percentile(a, 5)),
        "opponent_p5": float(np.percentile(b, 5)),
    }


def _losses(
    name: str, budget: str, numbers: dict[str, float], is_default: bool, tolerance: float
) -> list[str]:
    losses = []
    if is_default and not numbers["low"] > 0:
        losses.append(
            f"{name}: at the default budget {budget} the mean difference is {numbers['difference']:+.3f} dB "
            f"[{numbers['low']:+.3f}, {numbers['high']:+.3f}], its lower end must be above zero"
        )
    if not numbers["p5"] >= numbers["opponent_p5"] - tolerance:
        losses.append(
            f"{name}: at budget {budget} the 5th percentile is {numbers['p5']:.3f} dB against "
            f"{numbers['opponent_p5']:.3f} dB, more than {tolerance:g} dB lower"
        )
    return losses
