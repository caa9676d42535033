"""95% intervals by the bootstrap over prompts, with the seeds of a prompt nested inside it.

Images of one prompt resemble each other, so the prompts are what is resampled: intervals over single
samples would be too narrow. Within a prompt that was drawn, its seeds are drawn again too.
"""

from __future__ import annotations

import math
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
    confidence: float = CONFIDENCE,
) -> Interval:
    """Mean of `values` with its percentile interval.

    Args:
        values: [N] numbers, one a sample.
        groups: [N] prompt of each sample, any integers.
        resamples: bootstrap resamples, >= 1.
        seed: of the resampling; the same seed gives the same interval.
        confidence: of the interval.

    Returns:
        mean over all samples, and the ends of the interval.

    Raises:
        ValueError: for no values, values that are not finite, or groups of another length.
    """
    numbers, members = checked(values, groups)
    check_resamples(resamples)
    means = resampled_means(numbers, members, resamples, np.random.default_rng(seed))
    return around(float(numbers.mean()), means, confidence)


def share_interval(
    is_counted: ArrayLike,
    groups: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Share of samples that are counted, with its interval.

    Resampling what has none says that there never is one. So the upper end is at least the share of prompts that would
    leave no trace in so many of them with a probability of 5%: 4.6% for 64 prompts, 1.2% for 256.
    """
    found = interval(np.asarray(is_counted, dtype=np.float64), groups, resamples, seed)
    prompts = len(np.unique(np.asarray(groups)))
    unseen = 1.0 - (1.0 - CONFIDENCE) ** (1.0 / prompts)
    return Interval(found.mean, found.low, max(found.high, unseen))


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    groups: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """`interval` of the differences a - b of samples that share prompt and noise."""
    first, second = _paired(a, b)
    return interval(first - second, groups, resamples, seed, confidence)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise LesaError(
            f"paired values have {first.size} and {second.size} samples: pairs need the same samples"
        )
    return first, second


class Resamples:
    """Resamples of samples in groups, drawn once, for many paired intervals of the same samples.

    Args:
        groups: [N] prompt of each sample.
        resamples: how many, >= 1.
        seed: of the draws, which are those of `interval`.
    """

    def __init__(self, groups: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> None:
        labels = np.asarray(groups)
        _, members = checked(np.zeros(labels.shape), labels)
        check_resamples(resamples)
        places, counted = drawn(members, resamples, np.random.default_rng(seed))
        flat = places + labels.size * np.arange(resamples)[:, None, None]
        counts = np.bincount(flat[counted], minlength=resamples * labels.size).reshape(resamples, labels.size)
        self.sizes = counts.sum(axis=1)
        self.counts = np.ascontiguousarray(counts.T, dtype=np.int32)  # [N, resamples], how often each sample counts
        self._weights = (counts / self.sizes[:, None]).astype(np.float32)

    def mean_difference(self, a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
        """As `paired_interval`."""
        first, second = self._checked(a, b)
        difference = first - second
        mean = float(difference.mean())
        # Single precision is exact to a millionth of what is left, and a resample is one pass over memory.
        resampled = mean + (self._weights @ (difference - mean).astype(np.float32)).astype(np.float64)
        return around(mean, resampled, confidence)

    def percentile_difference(
        self, a: ArrayLike, b: ArrayLike, percentile: float, confidence: float = CONFIDENCE
    ) -> Interval:
        """The percentile of `a` less that of `b`, both of the same resampled samples."""
        first, second = self._checked(a, b)
        resampled = self._percentiles(first, percentile) - self._percentiles(second, percentile)
        return around(
            float(np.percentile(first, percentile) - np.percentile(second, percentile)), resampled, confidence
        )

    def worst_difference(self, a: ArrayLike, b: ArrayLike, share: float, confidence: float = CONFIDENCE) -> Interval:
        """Mean of the lowest `share` of `a` less that of `b` (expected shortfall), of the same resampled samples.

        The last sample counts with the part that the share has of it.
        """
        first, second = self._checked(a, b)
        once = np.ones((len(first), 1), dtype=np.int32)
        whole = _worst(first, once, share) - _worst(second, once, share)
        return around(
            float(whole[0]), _worst(first, self.counts, share) - _worst(second, self.counts, share), confidence
        )

    def _checked(self, a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        first, second = _paired(a, b)
        if first.shape != self.counts.shape[:1]:
            raise LesaError(f"bootstrap: groups name {self.counts.shape[0]} samples, values are {first.size}")
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise LesaError("bootstrap: values are not finite")
        return first, second

    def _percentiles(self, numbers: NDArray[np.float64], percentile: float) -> NDArray[np.float64]:
        """[resamples], linear between order statistics as numpy's."""
        place = (self.sizes - 1) * (percentile / 100)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, self.sizes - 1)
        order = np.argsort(numbers, kind="stable")
        for share in (3 * percentile / 100, 1.0):  # the lowest values are enough for nearly every draw
            lowest = order[: math.ceil(min(share, 1.0) * len(order))]
            passed = self.counts[lowest].cumsum(axis=0)  # values of each resample up to and with this one
            if (passed[-1] > above).all():
                break
        lower = numbers[lowest][(passed <= below).sum(axis=0)]
        upper = numbers[lowest][(passed <= above).sum(axis=0)]
        result: NDArray[np.float64] = lower + (upper - lower) * (place - below)
        return result


def _worst(
    numbers: NDArray[np.float64], counts: NDArray[np.int32], share: float
) -> NDArray[np.float64]:
    """[resamples] means of the lowest share of samples that count so often, [N, resamples]."""
    order = np.argsort(numbers, kind="stable")
    wanted = counts.sum(axis=0) * share
    for part in (min(2 * share, 1.0), 1.0):  # the lowest values are enough for nearly every draw
        lowest = order[: math.ceil(part * len(order))]
        often = counts[lowest]
        before = often.cumsum(axis=0) - often
        if (before[-1] + often[-1] >= wanted).all():
            break
    taken = np.clip(wanted - before, 0.0, often)
    result: NDArray[np.float64] = numbers[lowest] @ taken / wanted
    return result


def check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise LesaError(f"resamples must be at least 1, got {resamples}")


def around(mean: float, resampled: NDArray[np.float64], confidence: float = CONFIDENCE) -> Interval:
    tail = 100 * (1 - confidence) / 2
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
