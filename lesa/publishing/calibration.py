"""Bounds of the error meter, calibrated on recorded prompts and noise: what `adaptive=True` compares a run with.

The accelerated sampler runs those of the validation trajectories and of a share of the training ones, and the relative
L1 error at each full step is taken of every sample. Over samples its logarithm is close to normal, so the bound is that
of a log-normal: mean + z deviations, wider for the few samples it rests on, with z such that of runs like these a share
of `ALARMS` is expected to have an error beyond its bound. Where samples differ much, its tail is longer than that
(flux-photos: 13% of held-out runs were beyond some bound that 32 runs gave, 0.2% beyond those of 832), so no bound is
below an error that was seen. Errors along the recorded trajectories would not do: on the drifted states of an
accelerated run they are some percent larger, which is as much as samples differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context
from statistics import NormalDist, fmean, stdev
from typing import Any

import torch

from lesa.models.pipelines import sample
from lesa.params import CallParams
from lesa.predictor.rule import Rule
from lesa.recording.dataset import Trajectories
from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache, cache_state, remove_lesa_cache
from lesa.schedule import Schedule

ALARMS = 0.02  # of runs of one sample: at 5x, and half a dozen further full steps each, 0.1 full steps in the mean
_LEAST_DEVIATION = 0.02  # of the logarithm: a handful of samples that agree by chance must not make a tight bound


def meter_errors(
    pipe: Any,
    call: CallParams,
    schedule: Schedule,
    rule: Rule,
    data: Trajectories,
    rows: Sequence[int],
    batch_size: int,
) -> dict[int, list[float]]:
    """Relative L1 error at each full step that has one, of the runs of these rows (the worst guidance branch)."""
    errors: dict[int, list[float]] = {}
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        # The guard stays on: a run that it interferes with is as the user's would be.
        apply_lesa_cache(
            pipe.transformer,
            LesaCacheConfig(schedule=schedule, rule=rule, scheduler=lambda: pipe.scheduler),
        )
        try:
            prompts, seeds = [data.prompts[row] for row in chunk], [data.seeds[row] for row in chunk]
            sample(pipe, prompts, seeds, call, batch_size=batch_size)
            records = cache_state(pipe.transformer).steps
        finally:
            remove_lesa_cache(pipe.transformer)
        for record in records:
            if record.sample_errors is not None and schedule.is_full(record.step):
                errors.setdefault(record.step, []).extend(record.sample_errors.tolist())
    return errors


def bounds_of(errors: Mapping[int, Sequence[float]], schedule: Schedule) -> dict[int, float]:
    """The bound of each full step that predicted steps follow: the log-normal's, or the largest error seen.

    A step with fewer than two samples, or with an error that is no number, has none.
    """
    watched = {
        step: [math.log(max(error, 1e-12)) for error in errors[step]]
        for step, end in zip(schedule.full_steps, (*schedule.full_steps[1:], schedule.num_steps), strict=True)
        if end - step > 1 and len(errors.get(step, ())) > 1 and all(map(math.isfinite, errors[step]))
    }
    if not watched:
        return {}
    z = NormalDist().inv_cdf(1 - min(ALARMS / len(watched), 0.5))
    bounds = {}
    for step, logarithms in watched.items():
        spread = max(stdev(logarithms), _LEAST_DEVIATION) * math.sqrt(1 + 1 / len(logarithms))
        bounds[step] = math.exp(max(fmean(logarithms) + z * spread, *logarithms))
    return bounds


def calibrated_bounds(
    pipe: Any,
    call: CallParams,
    schedule: Schedule,
    rule: Rule,
    validation: Trajectories,
    train: Trajectories,
    *,
    batch_size: int,
    samples: int,
) -> list[float | None]:
    """The bound of each full step as a manifest has it, in three digits; None where the step decides nothing.

    Args:
        validation: all of its runs are made.
        train: `samples` of its runs are made, spread evenly over them.
        batch_size: samples a pipeline call.
    """
    trained = train.first_branch_rows()
    places = torch.linspace(0, len(trained) - 1, min(samples, len(trained))).round().long().tolist()
    errors = meter_errors(pipe, call, schedule, rule, validation, validation.first_branch_rows(), batch_size)
    of_training = meter_errors(pipe, call, schedule, rule, train, [trained[i] for i in places], batch_size)
    for step, training_errors in of_training.items():
        errors[step] += training_errors
    bounds = bounds_of(errors, schedule)
    return [_rounded_up(bounds[step]) if step in bounds else None for step in schedule.full_steps]


def _rounded_up(bound: float) -> float:
    """To three digits.

    So the last bits of another machine's arithmetic do not make another bundle of the same predictor; and upwards,
    since a bound may be the very error that a run had.
    """
    return float(Context(prec=3, rounding=ROUND_CEILING).create_decimal_from_float(bound))


