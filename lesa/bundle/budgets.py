"""Which of a bundle's budgets serves a wish: a budget by name, an interval, full steps or a quality."""

from __future__ import annotations

from collections.abc import Sequence

from lesa.bundle.manifest import Manifest
from lesa.errors import LesaError
from lesa.schedule import Schedule, least_full

_CHOICES = ("interval", "full_steps", "budget", "min_psnr", "max_loss_db", "max_outlier_share")


def choose_schedule(
    manifest: Manifest,
    *,
    interval: int | None = None,
    full_steps: Sequence[int] | None = None,
    budget: str | None = None,
    min_psnr: float | None = None,
    max_loss_db: float | None = None,
    max_outlier_share: float | None = None,
    num_steps: int | None = None,  # of the run; None: the bundle's own, which budgets and qualities are stated at
) -> tuple[Schedule, str]:
    """The schedule asked for, and its name for people.

    Raises:
        ValueError: more than one was asked for, an unknown budget, a quality that no budget measured, or a list of
            full steps for a run of another number of steps.
    """
    asked = {
        "interval": interval,
        "full_steps": full_steps,
        "budget": budget,
        "min_psnr": min_psnr,
        "max_loss_db": max_loss_db,
        "max_outlier_share": max_outlier_share,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) > 1:
        raise LesaError(f"give one of {', '.join(_CHOICES)}; got {' and '.join(asked)}")
    own = len(manifest.sigmas) - 1
    steps = own if num_steps is None else num_steps
    if full_steps is not None:
        if steps != own:
            raise LesaError(f"full_steps: they are for {own} steps, the run has {steps}: choose by budget or interval")
        return Schedule.explicit(steps, full_steps), "full_steps"
    if interval is not None:
        for name, known in manifest.budgets.items():
            if known.interval == interval and interval > 1 and steps == own:  # with the warm-up it was made for
                return known.schedule, name
        return Schedule.uniform(steps, interval), f"interval {interval}"
    if min_psnr is not None or max_loss_db is not None:
        name = _cheapest_budget(manifest, min_psnr, max_loss_db)
    elif max_outlier_share is not None:
        name = _fewest_outliers(manifest, max_outlier_share)
    else:
        name = manifest.default_budget if budget is None else budget
    if name not in manifest.budgets:
        raise LesaError(f"budget: {name!r} is not one of {', '.join(manifest.budgets)}")
    schedule = manifest.budgets[name].schedule
    least = least_full(known.schedule for known in manifest.budgets.values())
    return (schedule if steps == own else schedule.carried(steps, least)), name


def _cheapest_budget(manifest: Manifest, min_psnr: float | None, max_loss_db: float | None) -> str:
    """The budget with the fewest full steps whose measured mean PSNR is good enough."""
    measured = _measured(manifest, "psnr_mean")
    if not measured:
        raise LesaError("the bundle's budgets were not measured: choose by budget, interval or full_steps")
    if max_loss_db is not None and not max_loss_db >= 0:
        raise LesaError(f"max_loss_db: must be at least 0 dB, got {max_loss_db}")
    best = max(measured.values())
    wanted = min_psnr if min_psnr is not None else best - float(max_loss_db or 0.0)
    good = [name for name, psnr in measured.items() if psnr >= wanted]
    if not good:
        known = ", ".join(f"{name}: {psnr:.2f} dB" for name, psnr in measured.items())
        raise LesaError(f"min_psnr: no budget measured {wanted:.2f} dB ({known})")
    return min(good, key=lambda name: (manifest.budgets[name].schedule.num_full, -measured[name]))


def _fewest_outliers(manifest: Manifest, most: float) -> str:
    """The budget with the fewest full steps that gives another picture in at most this share of its runs.

    The upper end of the measured interval is what must not be more: what was not seen among a few is not proved absent.
    """
    if not 0 <= most <= 1:
        raise LesaError(f"max_outlier_share: must be from 0 to 1, got {most}")
    shares = _measured(manifest, "outlier_share_high")
    if not shares:
        raise LesaError("max_outlier_share: the bundle does not say how often it gives another picture: make it anew")
    good = [name for name, share in shares.items() if share <= most]
    if not good:
        known = ", ".join(f"{name}: up to {share:.1%}" for name, share in shares.items())
        raise LesaError(f"max_outlier_share: no budget is known to stay within {most:.1%} ({known})")
    return min(good, key=lambda name: (manifest.budgets[name].schedule.num_full, shares[name]))


def _measured(manifest: Manifest, figure: str) -> dict[str, float]:
    """A figure of the budgets that have it."""
    figures = {name: known.quality.get(figure) for name, known in manifest.budgets.items()}
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


def slower_budget(manifest: Manifest, name: str) -> str:
    """The next slower budget; `ValueError` for the slowest one and for none."""
    if name not in manifest.budgets:
        raise LesaError(f"budget: {name!r} is not one of {', '.join(manifest.budgets)}")
    full = {other: budget.schedule.num_full for other, budget in manifest.budgets.items()}
    slower = [other for other, count in full.items() if count > full[name]]
    if not slower:
        raise LesaError(f"adaptive: {name} is the slowest budget of this bundle, with none to change over to")
    return min(slower, key=full.__getitem__)
