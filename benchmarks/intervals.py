"""Bootstrap intervals that only benchmarks print."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lesa.evaluation.bootstrap import RESAMPLES, Interval, around, check_resamples, checked, resampled_means


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
