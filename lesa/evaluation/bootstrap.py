"""95% intervals by the bootstrap over prompts, with the seeds of a prompt nested inside it.

Images of one prompt resemble each other, so the prompts are what is resampled: intervals over single
samples would be too narrow. Within a prompt that was drawn, its seeds are drawn again too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesa.errors import LesaError

RESAMPLES = 2000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate with the ends of its 95% interval."""

    mean: float
    low: float
    high: float


def interval(
    values: ArrayLike,
    groups: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `values` with its percentile interval.

    Args:
        values: [N] numbers, one a sample.
        groups: [N] prompt of each sample, any integers.
        resamples: bootstrap resamples, >= 1.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        mean over all samples, and the ends of the 95% interval.

    Raises:
        ValueError: for no values, values that are not finite, or groups of another length.
    """
    numbers, members = checked(values, groups)
    check_resamples(resamples)
    means = resampled_means(numbers, members, resamples, np.random.default_rng(seed))
    return around(float(numbers.mean()), means)


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    groups: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """`interval` of the differences a - b of samples that share prompt and noise."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise LesaError(
            f"paired values have {first.size} and {second.size} samples: pairs need the same samples"
        )
    return interval(first - second, groups, resamples, seed)


def check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise LesaError(f"resamples must be at least 1, got {resamples}")


def around(mean: float, resampled: NDArray[np.float64]) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(mean, float(low), float(high))


def checked(values: ArrayLike, groups: ArrayLike) -> tuple[NDArray[np.float64], list[NDArray[np.intp]]]:
    numbers, labels = np.asarray(values, dtype=np.float64), np.asarray(groups)
    problems = []
    if numbers.ndim != 1 or not numbers.size:
        problems.append(f"values must be a list of at least one number, got shape {numbers.shape}")
    if labels.shape != numbers.shape:
        problems.append(f"groups name {labels.size} samples, values are {numbers.size}")
    if not np.isfinite(numbers).all():
        problems.append(f"{int((~np.isfinite(numbers)).sum())} values are not finite")
    if problems:
        raise LesaError("bootstrap: " + "; ".join(problems))
    return numbers, [np.flatnonzero(labels == label) for label in np.unique(labels)]


def resampled_means(
    numbers: NDArray[np.float64],
    members: Sequence[NDArray[np.intp]],
    resamples: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """[resamples] means."""
    places, counted = drawn(members, resamples, rng)
    total = np.where(counted, numbers[places], 0.0).sum(axis=(1, 2))
    means: NDArray[np.float64] = total / counted.sum(axis=(1, 2))
    return means


def drawn(
    members: Sequence[NDArray[np.intp]], resamples: int, rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Samples [resamples, P, seeds] and which of them count: P prompts with replacement, of each as many as it has."""
    sizes = np.array([len(member) for member in members])
    table = np.zeros((len(members), sizes.max()), dtype=np.intp)  # samples of each prompt, padded
    for row, member in enumerate(members):
        table[row, : len(member)] = member
    drawn = rng.integers(len(members), size=(resamples, len(members)))
    lengths = sizes[drawn]
    places = (rng.random((*drawn.shape, table.shape[1])) * lengths[..., None]).astype(np.intp)
    return table[drawn[..., None], places], np.arange(table.shape[1]) < lengths[..., None]
