"""The gate moves the champion for a measured win and for nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lesa.publishing.gate import decide

GROUPS = np.repeat(np.arange(16), 2)
RNG = np.random.default_rng(0)
BASE = 30 + RNG.normal(0, 2, len(GROUPS))
NOISE = RNG.normal(0, 0.1, len(GROUPS))


def psnr(gain: float, budgets: tuple[str, ...] = ("5x", "6.25x")) -> dict[str, np.ndarray]:
    return dict.fromkeys(budgets, BASE + gain + (NOISE if gain else 0))


def judge(candidate, champion=None, peers=None, **more):
    peers = {"taylor1": psnr(-1.0)} if peers is None else peers
    return decide(candidate, champion, peers, groups=GROUPS, default_budget="5x", **more)


def test_better_than_everything_is_promoted():
    decision = judge(psnr(1.0), champion=psnr(0.0))
    assert decision.promote
    assert decision.numbers["champion"]["5x"]["low"] > 0
    assert decision.numbers["champion"]["5x"]["difference"] == pytest.approx(1.0 + NOISE.mean())
    assert decision.to_dict()["reasons"] == ["better than champion, taylor1"]


def test_without_champion_the_peers_decide():
    assert judge(psnr(1.0)).promote
    refused = judge(psnr(-1.0), peers={"taylor1": psnr(0.0), "reuse": psnr(-5.0)})
    assert not refused.promote
    assert [reason.split(":")[0] for reason in refused.reasons] == ["taylor1", "taylor1", "taylor1"]


def test_one_peer_that_is_better_is_enough_against():
    assert not judge(psnr(1.0), champion=psnr(0.0), peers={"reuse": psnr(-9.0), "ab2": psnr(2.0)}).promote


@pytest.mark.parametrize("gain", [0.0, -0.3, -5.0])
def test_equal_and_worse_stay_out(gain):
    decision = judge(psnr(gain), champion=psnr(0.0))
    assert not decision.promote
    assert any(reason.startswith("champion: at the default budget") for reason in decision.reasons)


def test_a_difference_within_the_noise_stays_out():
    candidate = {"5x": BASE + np.where(GROUPS % 2, 3.0, -2.9), "6.25x": BASE}
    decision = judge(candidate, champion=psnr(0.0))
    numbers = decision.numbers["champion"]["5x"]
    assert not decision.promote and numbers["low"] < 0 < numbers["high"]


def test_a_worse_tail_at_any_budget_stays_out():
    candidate = psnr(1.0)
    candidate["6.25x"] = candidate["6.25x"].copy()
    candidate["6.25x"][:4] -= 20  # the mean at the default budget still wins
    decision = judge(candidate, champion=psnr(0.0))
    assert not decision.promote
    assert all("6.25x" in reason and "5th percentile" in reason for reason in decision.reasons)


def test_the_tail_may_be_lower_by_the_tolerance():
    candidate = {"5x": BASE + 1.0, "6.25x": BASE - 0.4}
    assert judge(candidate, champion=psnr(0.0)).promote
    assert not judge(candidate, champion=psnr(0.0), tail_tolerance_db=0.3).promote


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["candidate", "champion", "peer"])
def test_what_is_not_finite_speaks_against(bad, side):
    broken = psnr(1.0)
    broken["6.25x"] = broken["6.25x"].copy()
    broken["6.25x"][3] = bad
    decision = judge(
        broken if side == "candidate" else psnr(1.0),
        champion=broken if side == "champion" else psnr(0.0),
        peers={"taylor1": broken if side == "peer" else psnr(-1.0)},
    )
    assert not decision.promote
    assert any("not finite" in reason for reason in decision.reasons)


def test_what_is_not_measured_speaks_against():
    cases = [
        (judge({}), "not measured at the default budget"),
        (judge(psnr(1.0, ("6.25x",))), "not measured at the default budget"),
        (judge(psnr(1.0), champion=psnr(0.0, ("5x",))), "champion: not measured at budget 6.25x"),
        (judge(psnr(1.0), champion={}), "champion: not measured at budget 5x"),
        (judge(psnr(1.0), peers={}), "peers: none was measured at budget 5x"),
        (judge(psnr(1.0), peers={"reuse": psnr(-1.0, ("5x",))}), "peers: none was measured at budget 6.25x"),
        (judge({"5x": BASE[:7] + 1, "6.25x": BASE}), "7 samples at budget 5x, expected 32"),
        (judge(psnr(1.0), champion={"5x": BASE[:-1], "6.25x": BASE}), "31 samples at budget 5x"),
    ]
    for decision, words in cases:
        assert not decision.promote
        assert any(words in reason for reason in decision.reasons), decision.reasons


def test_a_peer_counts_where_it_exists():
    peers = {"reuse": psnr(-1.0), "taylor1_own": psnr(3.0, ("6.25x",))}
    decision = judge(psnr(1.0), peers=peers)
    assert not decision.promote
    assert [reason.split(":")[0] for reason in decision.reasons] == ["taylor1_own"]
    peers["taylor1_own"] = psnr(-1.0, ("6.25x",))
    assert judge(psnr(1.0), peers=peers).promote
