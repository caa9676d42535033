"""The gate moves the champion for a measured win and for nothing else, and draws as many samples as that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from lesa.evaluation.bootstrap import paired_interval
from lesa.publishing.gate import ERROR, Decision, Measured, judge, look_levels, look_sizes

LOOKS = (32, 64, 128)
GROUPS = np.repeat(np.arange(64), 2)
RNG = np.random.default_rng(0)
BASE = 30 + RNG.normal(0, 2, LOOKS[-1])
NOISE = RNG.normal(0, 0.1, LOOKS[-1])
Psnr = dict[str, np.ndarray]


def psnr(gain: float, budgets: tuple[str, ...] = ("5x", "6.25x")) -> Psnr:
    return dict.fromkeys(budgets, BASE + gain + (NOISE if gain else 0))


class Samples:
    """Samples that were drawn already, and what was asked of them."""

    def __init__(self, methods: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        self.methods = methods
        self.asked: list[tuple[dict[str, list[str]], int, int]] = []

    def __call__(self, wanted: Mapping[str, Sequence[str]], first: int, end: int) -> Measured:
        self.asked.append(({budget: list(names) for budget, names in wanted.items()}, first, end))
        return {
            budget: {
                name: list(self.methods[name][budget][first:end])
                for name in ("lesa", *names)
                if budget in self.methods[name]
            }
            for budget, names in wanted.items()
        }


def run(
    candidate: Psnr,
    champion: Psnr | None = None,
    peers: Mapping[str, Psnr] | None = None,
    tolerance_db: float = 0.5,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Decision, Samples]:
    peers = {"taylor1": psnr(-3.0)} if peers is None else peers
    others = {**({} if champion is None else {"champion": champion}), **peers}
    samples = Samples({"lesa": candidate, **others})
    opponents = {budget: [name for name in others if budget in others[name]] for budget in candidate}
    decision = judge(
        opponents, samples, default_budget="5x", groups=GROUPS, looks=LOOKS, tolerance_db=tolerance_db, log=log
    )
    return decision, samples


def test_better_than_everything_is_promoted_at_the_first_look() -> None:
    lines: list[str] = []
    decision, samples = run(psnr(1.0), champion=psnr(0.0), log=lines.append)
    assert decision.promote and decision.budgets == ("5x", "6.25x") and not decision.left_out
    assert decision.samples == 32 and lines == ["32 samples: 0 of 8 questions open"]
    assert samples.asked == [({"5x": ["champion", "taylor1"], "6.25x": ["champion", "taylor1"]}, 0, 32)]
    numbers = decision.numbers["champion"]["5x"]["mean"]
    assert numbers["difference"] == pytest.approx(1.0 + NOISE[:32].mean()) and numbers["low"] > 0
    assert decision.to_dict()["reasons"] == ["better than champion, taylor1"]


def test_without_champion_the_peers_decide() -> None:
    assert run(psnr(1.0))[0].promote
    refused, _ = run(psnr(-1.0), peers={"taylor1": psnr(0.0), "reuse": psnr(-5.0)})
    assert not refused.promote and refused.budgets == ()
    assert {reason.split(":")[0] for reason in refused.reasons} == {"taylor1"}


def test_one_peer_that_is_better_is_enough_against() -> None:
    decision, _ = run(psnr(1.0), champion=psnr(0.0), peers={"reuse": psnr(-9.0), "ab2": psnr(2.0)})
    assert not decision.promote and all("ab2" in reason for reason in decision.reasons)


@pytest.mark.parametrize("gain", [-0.3, -5.0])
def test_worse_stays_out_at_the_first_look(gain: float) -> None:
    decision, samples = run(psnr(gain), champion=psnr(0.0), peers={"taylor1": psnr(-9.0)})
    assert not decision.promote and len(samples.asked) == 1
    assert "champion: at budget 5x the difference of the mean" in decision.reasons[0]
    assert decision.reasons[0].endswith("it must be above zero")


def test_a_copy_of_the_champion_stays_out() -> None:
    decision, samples = run(psnr(0.0), champion=psnr(0.0))
    assert not decision.promote and len(samples.asked) == 1
    found = decision.numbers["champion"]["5x"]["mean"]
    assert found["difference"] == found["low"] == found["high"] == 0.0 and found["answer"] == "no"


def test_a_difference_within_the_noise_takes_every_sample_and_stays_out() -> None:
    candidate = {"5x": BASE + np.where(np.arange(len(BASE)) % 4 < 2, 0.2, -0.19), "6.25x": BASE}
    decision, samples = run(candidate, champion=psnr(0.0))
    assert not decision.promote and [end for _, _, end in samples.asked] == list(LOOKS)
    assert samples.asked[1:] == [({"5x": ["champion"]}, 32, 64), ({"5x": ["champion"]}, 64, 128)], "open ones alone"
    assert "on 128 samples, it must be above zero and is not known to be" in decision.reasons[0]
    assert decision.samples == 128 and decision.numbers["taylor1"]["5x"]["mean"]["samples"] == 32


def test_more_samples_decide_what_the_first_look_left_open() -> None:
    wide = RNG.normal(0, 1.2, len(BASE))
    candidate = {"5x": BASE + 0.6 + wide, "6.25x": BASE + 1.0}
    decision, samples = run(candidate, champion=psnr(0.0), tolerance_db=3.0)
    assert len(samples.asked) > 1
    found = decision.numbers["champion"]["5x"]["mean"]
    level = look_levels(len(LOOKS))[LOOKS.index(found["samples"])]
    size = found["samples"]
    expected = paired_interval(candidate["5x"][:size], BASE[:size], GROUPS[:size], 4000, confidence=1 - level)
    assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high], abs=1e-5)
    assert decision.promote == (found["low"] > 0) and decision.promote


def test_a_budget_with_a_worse_tail_is_left_out_and_the_others_are_published() -> None:
    candidate = psnr(1.0)
    candidate["6.25x"] = candidate["6.25x"].copy()
    candidate["6.25x"][::8] -= 20
    decision, _ = run(candidate, champion=psnr(0.0))
    assert decision.promote and decision.budgets == ("5x",)
    assert all("6.25x" in reason for reason in decision.left_out["6.25x"])
    assert any("worst fifth" in reason for reason in decision.left_out["6.25x"])


def test_a_worse_tail_at_the_default_budget_is_the_end_of_it() -> None:
    candidate = psnr(1.0)
    candidate["5x"] = candidate["5x"].copy()
    candidate["5x"][::8] -= 4  # the mean still wins
    decision, _ = run(candidate, champion=psnr(0.0))
    assert not decision.promote and decision.numbers["champion"]["5x"]["mean"]["answer"] == "yes"
    assert all("worst fifth" in reason for reason in decision.reasons)


def test_a_budget_may_be_lower_than_the_champions_by_the_tolerance_and_never_than_a_peers() -> None:
    candidate = {"5x": BASE + 1.0, "6.25x": BASE - 0.4}
    assert run(candidate, champion=psnr(0.0))[0].budgets == ("5x", "6.25x")
    strict, _ = run(candidate, champion=psnr(0.0), tolerance_db=0.3)
    assert strict.promote and strict.budgets == ("5x",)
    against_peer, _ = run(candidate, peers={"taylor1": psnr(0.0)})
    assert against_peer.promote and "must be above zero" in against_peer.left_out["6.25x"][0]


def test_a_budget_that_the_champion_has_not_is_compared_with_peers() -> None:
    decision, _ = run(psnr(1.0), champion=psnr(0.0, ("5x",)))
    assert decision.promote and decision.budgets == ("5x", "6.25x")
    assert list(decision.numbers["champion"]) == ["5x"] and list(decision.numbers["taylor1"]) == ["5x", "6.25x"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["candidate", "champion", "peer"])
def test_what_is_not_finite_speaks_against(bad: float, side: str) -> None:
    broken = psnr(1.0)
    broken["5x"] = broken["5x"].copy()
    broken["5x"][3] = bad
    decision, _ = run(
        broken if side == "candidate" else psnr(1.0),
        champion=broken if side == "champion" else psnr(0.0),
        peers={"taylor1": broken if side == "peer" else psnr(-1.0)},
    )
    assert not decision.promote and "not finite" in decision.reasons[0]


def test_what_is_not_measured_speaks_against() -> None:
    nothing = judge({}, Samples({}), default_budget="5x", groups=GROUPS, looks=LOOKS, tolerance_db=0.5)
    assert not nothing.promote and "not measured at the default budget" in nothing.reasons[0]
    alone, _ = run(psnr(1.0), champion=psnr(0.0), peers={})
    assert not alone.promote and "peers: none was measured at budget 5x" in alone.reasons[0]
    one, _ = run(psnr(1.0), peers={"reuse": psnr(-1.0, ("5x",))})
    assert one.promote and "peers: none was measured at budget 6.25x" in one.left_out["6.25x"][0]
    short, _ = run({"5x": BASE[:7] + 1, "6.25x": BASE}, champion=psnr(0.0))
    assert not short.promote and "lesa: 7 samples at budget 5x, expected 32" in short.reasons[0]


def test_the_intervals_are_over_prompts() -> None:
    """Thirty-two samples of two prompts that disagree tell little; of sixteen prompts they tell much."""
    candidate = {"5x": BASE + np.where(np.arange(len(BASE)) < 16, 0.1, 1.9)}
    peers = {"taylor1": {"5x": BASE - 9.0}}
    samples = Samples({"lesa": candidate, "champion": {"5x": BASE}, **peers})
    opponents = {"5x": ["champion", "taylor1"]}
    few = np.repeat([0, 1], 16)
    low = {}
    for name, groups in {"few": few, "many": GROUPS[:32]}.items():
        decision = judge(opponents, samples, default_budget="5x", groups=groups, looks=(32,), tolerance_db=9.0)
        low[name] = decision.numbers["champion"]["5x"]["mean"]["low"]
    # Two prompts resampled: one of them alone in half of the draws.
    assert low["few"] == pytest.approx(0.1, abs=0.01) and low["many"] > 0.3


def test_looks_double_and_share_the_error() -> None:
    assert look_sizes(128, 2048) == (128, 256, 512, 1024, 2048) and look_sizes(128, 128) == (128,)
    assert look_sizes(128, 300) == (128, 256)
    for looks in (1, 2, 5):
        levels = look_levels(looks)
        assert sum(levels) == pytest.approx(ERROR) and list(levels) == sorted(levels)
    assert look_levels(1) == (ERROR,)


def test_another_budget_that_stays_open_is_left_out_and_the_default_one_is_published() -> None:
    wavering = np.where(np.arange(len(BASE)) % 4 < 2, 0.2, -0.19)
    candidate = {"5x": BASE + 1.0, "6.25x": BASE + wavering}
    peers = {"taylor1": {"5x": BASE - 3.0, "6.25x": BASE}}
    decision, samples = run(candidate, champion=psnr(0.0, ("5x",)), peers=peers)
    assert [end for _, _, end in samples.asked] == list(LOOKS)
    assert decision.promote and decision.budgets == ("5x",)
    assert decision.left_out["6.25x"][0].endswith("and is not known to be")
