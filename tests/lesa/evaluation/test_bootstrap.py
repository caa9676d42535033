from __future__ import annotations

import numpy as np
import pytest

from benchmarks.intervals import unpaired_interval
from lesa.evaluation.bootstrap import Resamples, interval, paired_interval, share_interval


def test_a_constant_has_no_width() -> None:
    assert interval([2.0] * 6, [0, 0, 1, 1, 2, 2], 200) == (2.0, 2.0, 2.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values, groups = np.random.default_rng(0).normal(size=40), np.arange(40) // 2
    first = interval(values, groups, 300, seed=1)
    assert first == interval(values, groups, 300, seed=1)
    assert first != interval(values, groups, 300, seed=2)
    assert first.low < first.mean < first.high
    assert first.mean == pytest.approx(values.mean())


def test_width_is_that_of_the_mean_of_independent_samples() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = interval(values, np.arange(400), 4000)
    expected = 2 * 1.96 * values.std() / 20
    assert found.high - found.low == pytest.approx(expected, rel=0.08)


def test_more_seeds_of_the_same_prompts_do_not_narrow_it() -> None:
    """Copies of a prompt's value are no further evidence: samples that count as independent would say
    otherwise."""
    prompts = np.random.default_rng(2).normal(size=25)
    once = interval(prompts, np.arange(25), 4000)
    copied = interval(np.repeat(prompts, 8), np.repeat(np.arange(25), 8), 4000)
    naive = interval(np.repeat(prompts, 8), np.arange(200), 4000)
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.08)
    assert naive.high - naive.low < 0.5 * (copied.high - copied.low)


def test_seeds_of_a_prompt_are_drawn_again_too() -> None:
    values = np.array([0.0, 1.0, 2.0, 3.0])
    found = interval(values, [7, 7, 7, 7], 2000)
    assert found.low < 1.0 and found.high > 2.0  # one prompt, yet not without doubt


def test_unequal_groups_equal_a_plain_loop() -> None:
    values = np.array([1.0, 2.0, 10.0, 20.0, 30.0])
    groups = np.array([0, 0, 1, 1, 1])
    rng = np.random.default_rng(5)
    means = []
    for _ in range(6000):
        drawn = [rng.choice(values[groups == g], (groups == g).sum()) for g in rng.integers(2, size=2)]
        means.append(np.concatenate(drawn).mean())
    found = interval(values, groups, 6000)
    assert found.low == pytest.approx(np.percentile(means, 2.5), abs=0.6)
    assert found.high == pytest.approx(np.percentile(means, 97.5), abs=0.8)


def test_pairing_removes_what_samples_share() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(scale=10, size=60)
    ours, theirs = difficulty + 1.0 + rng.normal(scale=0.1, size=60), difficulty
    paired = paired_interval(ours, theirs, np.arange(60) // 2)
    assert paired.low > 0.9 and paired.high < 1.1
    alone = interval(ours, np.arange(60) // 2)
    assert alone.high - alone.low > 3.0
    assert paired_interval(theirs, ours, np.arange(60) // 2).mean == pytest.approx(-paired.mean)


def test_without_pairs_both_sides_widen_the_interval() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(loc=2.0, size=300), rng.normal(size=200)
    found = unpaired_interval(a, np.arange(300), b, np.arange(200), 4000)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    expected = 2 * 1.96 * np.sqrt(a.var() / 300 + b.var() / 200)
    assert found.high - found.low == pytest.approx(expected, rel=0.08)
    assert unpaired_interval([3.0], [0], [1.0], [0], 50) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="resamples"):
        unpaired_interval([3.0], [0], [1.0], [0], 0)


def test_the_difference_of_a_tail_is_that_of_the_samples_it_has() -> None:
    rng = np.random.default_rng(7)
    b = rng.normal(size=600)
    lifted = np.maximum(b, -1.0)  # the tail alone
    resamples = Resamples(np.arange(600) // 2, 1000)
    found = resamples.percentile_difference(lifted, b, 5.0)
    assert found.mean == pytest.approx(np.percentile(lifted, 5) - np.percentile(b, 5))
    assert 0.4 < found.low < found.mean < found.high < 1.0
    assert resamples.percentile_difference(b, b, 5.0) == (0.0, 0.0, 0.0)
    shifted = resamples.percentile_difference(b + 2, b, 50.0)
    assert shifted.low == pytest.approx(2.0) and shifted.high == pytest.approx(2.0)


@pytest.mark.parametrize("percentile", [1.0, 5.0, 50.0, 100.0])
def test_percentiles_of_resamples_are_numpys(percentile: float) -> None:
    rng = np.random.default_rng(3)
    values, groups = rng.normal(size=40), np.arange(40) // 4
    resamples = Resamples(groups, 50, seed=4)
    zeros = np.zeros(40)
    expected = [np.percentile(np.repeat(values, counts), percentile) for counts in resamples.counts.T]
    ends = np.percentile(expected, [2.5, 97.5])
    found = resamples.percentile_difference(values, zeros, percentile)
    assert (found.low, found.high) == (pytest.approx(ends[0]), pytest.approx(ends[1]))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.33, 1.0])
def test_the_worst_of_resamples_by_hand(share: float) -> None:
    rng = np.random.default_rng(3)
    values, groups = rng.normal(size=40), np.arange(40) // 4
    resamples = Resamples(groups, 50, seed=4)

    def by_hand(samples: np.ndarray) -> float:
        ordered, wanted = np.sort(samples), share * len(samples)
        whole = int(wanted)
        part = (wanted - whole) * ordered[whole] if whole < len(ordered) else 0.0
        return float((ordered[:whole].sum() + part) / wanted)

    expected = [by_hand(np.repeat(values, counts)) for counts in resamples.counts.T]
    found = resamples.worst_difference(values, np.zeros(40), share)
    assert found.mean == pytest.approx(by_hand(values))
    assert [found.low, found.high] == pytest.approx(np.percentile(expected, [2.5, 97.5]).tolist())
    assert resamples.worst_difference(values, values, share) == (0.0, 0.0, 0.0)


def test_resamples_drawn_once_give_the_paired_interval() -> None:
    rng = np.random.default_rng(5)
    a, b, groups = rng.normal(size=60), rng.normal(size=60), np.repeat(np.arange(20), 3)
    shared = Resamples(groups, 300)
    for confidence in (0.95, 0.8):
        expected = paired_interval(a, b, groups, 300, confidence=confidence)
        assert shared.mean_difference(a, b, confidence) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="groups name 60 samples, values are 59"):
        shared.mean_difference(a[:-1], b[:-1])
    with pytest.raises(ValueError, match="not finite"):
        shared.mean_difference(np.where(a > 1, np.nan, a), b)


def test_a_share_that_was_never_seen_is_not_proved_absent() -> None:
    groups = np.arange(128) // 2
    none = share_interval(np.zeros(128, bool), groups)
    assert (none.mean, none.low) == (0.0, 0.0) and none.high == pytest.approx(1 - 0.05 ** (1 / 64))
    some = share_interval(np.arange(128) % 8 == 0, groups)
    assert some.mean == 0.125 and some.low < 0.125 < some.high == interval(np.arange(128) % 8 == 0, groups).high


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([], [], "at least one"),
        ([1.0, 2.0], [0], "name 1 samples"),
        ([1.0, float("nan")], [0, 1], "not finite"),
    ],
)
def test_what_cannot_be_resampled_is_refused(values, groups, message) -> None:
    with pytest.raises(ValueError, match=message):
        interval(values, groups)


def test_resamples_and_pairs_are_checked() -> None:
    with pytest.raises(ValueError, match="resamples"):
        interval([1.0], [0], 0)
    with pytest.raises(ValueError, match="same samples"):
        paired_interval([1.0, 2.0], [1.0], [0, 1])
