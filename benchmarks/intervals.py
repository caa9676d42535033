"""Bootstrap intervals that only benchmarks print."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lesa.evaluation.bootstrap import RESAMPLES, Interval, around, check_resamples, checked, drawn, resampled_means


def unpaired_interval(
    a: ArrayLike,
    groups_a: ArrayLike,
    b: ArrayLike,
    groups_b: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `a` minus mean of `b`, whose samples have no prompt in common; each side is drawn anew by itself.

    Args and errors as for `interval`; the sides may differ in their numbers of samples and of prompts.
    """
    numbers_a, members_a = checked(a, groups_a)
    numbers_b, members_b = checked(b, groups_b)
    check_resamples(resamples)
    rng = np.random.default_rng(seed)
    means = resampled_means(numbers_a, members_a, resamples, rng)
    return around(
        float(numbers_a.mean() - numbers_b.mean()), means - resampled_means(numbers_b, members_b, resamples, rng)
    )


def percentile_gain(
    a: ArrayLike,
    b: ArrayLike,
    groups: ArrayLike,
    percentile: float = 5.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A percentile of `a` minus that of `b`, of samples that share prompt and noise.

    Args and errors as of `paired_interval`.
    """
    first, members = checked(a, groups)
    second, _ = checked(b, groups)
    check_resamples(resamples)
    places, counted = drawn(members, resamples, np.random.default_rng(seed))
    tails = [
        np.nanpercentile(np.where(counted, v[places], np.nan).reshape(resamples, -1), percentile, axis=1)
        for v in (first, second)
    ]
    gain = float(np.percentile(first, percentile) - np.percentile(second, percentile))
    return around(gain, tails[0] - tails[1])
