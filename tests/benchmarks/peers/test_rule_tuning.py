from __future__ import annotations

import pytest

from benchmarks.peers import rule_tuning
from benchmarks.peers.rule_tuning import tuned_rules
from lesa.peers.rules import rule_method
from lesa.peers.tuning import Bench
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL, NUM_STEPS
from tests.helpers.evaluation import pipeline

PROMPTS, SEEDS = ["a red house", "the blue dog"], [7, 8]


def test_the_best_setting_is_taken_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"hicache": [{"order": 1, "contraction": c} for c in (0.1, 0.5**0.5, 3.0)]}
    monkeypatch.setattr(rule_tuning, "RULE_OPTIONS", options)
    pipe, seen = pipeline(), []
    schedule = Schedule.uniform(NUM_STEPS, 3)
    found = tuned_rules(
        pipe,
        {"b": schedule},
        call=CALL,
        prompts=PROMPTS,
        seeds=SEEDS,
        batch_size=2,
        report=lambda step, values: seen.append(values),
    )
    bench = Bench.of(pipe, PROMPTS, SEEDS, CALL, 2)
    psnr = [bench.trial(rule_method("hicache", "b", schedule, options=each)).psnr for each in options["hicache"]]
    assert [method.name for method in found] == ["hicache_tuned"]
    best = max(psnr)
    assert found[0].settings["tuning_psnr"] == pytest.approx(best, abs=1e-3)
    assert found[0].settings["contraction"] == options["hicache"][psnr.index(best)]["contraction"]
    assert found[0].budget == "b" and seen == [{"hicache_tuned_psnr": pytest.approx(best)}]
    assert bench.trial(found[0]).psnr == pytest.approx(best)
    assert len(set(psnr)) == 3


def test_every_option_is_one_the_rule_takes() -> None:
    for rule, every in rule_tuning.RULE_OPTIONS.items():
        for options in every:
            rule_method(rule, "b", Schedule.uniform(NUM_STEPS, 3), options=options)
