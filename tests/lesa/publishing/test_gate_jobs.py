"""What the gate asks its jobs for, which prompts, noise and budgets of whom, and what is published of a candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lesa.params import EvaluateParams, PublishParams, RecordParams, Workload
from lesa.publishing import build, judgement
from lesa.publishing.gate import CANDIDATE, CHAMPION
from lesa.publishing.judgement import (
    NamedBundle,
    TuneCachesJob,
    fresh_offset,
    gate_samples,
    judge_candidate,
    measure_for_gate,
    paired_budgets,
    same_call,
    tune_gate_caches,
)
from lesa.recording.prompts import prompt_digests, prompts_digest
from lesa.schedule import Schedule
from tests.helpers.training_set import workload as toy

SPLITS = {
    "train": [f"learned {number}" for number in range(3)],
    "validation": ["chosen", "picked", "taken", "drawn"],
    "test": ["judged", "weighed", "measured", "compared"],
}


def bundle(name: str, budgets: Mapping[str, tuple[int, ...]], sigmas: tuple[float, ...] = (1.0, 0.0)) -> Any:
    """What a judgement reads of a bundle."""
    made = {budget: SimpleNamespace(schedule=Schedule.explicit(8, steps)) for budget, steps in budgets.items()}
    manifest = SimpleNamespace(
        budgets=made, call="the call", sigmas=sigmas, data={"training": {}}, default_budget=next(iter(budgets))
    )
    return SimpleNamespace(manifest=manifest, digest=name, path=Path(name), predictor=f"the predictor of {name}")


@pytest.fixture
def workload(monkeypatch: pytest.MonkeyPatch) -> Workload:
    monkeypatch.setattr(judgement, "read_splits", lambda folder: SPLITS)
    monkeypatch.setattr(judgement, "load_pipeline", lambda model, device: None)
    return dataclasses.replace(
        toy(),
        record=RecordParams(train_prompts=3, validation_prompts=4, seed_offset=7000),
        evaluate=EvaluateParams(seeds_per_prompt=1, batch_size=2),
        publish=PublishParams(gate_prompts=2, gate_max_samples=4),
    )


CANDIDATE_BUNDLE = bundle("candidate", {"2x": (0, 1, 3, 5)})
CHAMPION_BUNDLE = bundle("champion", {"2x": (0, 1, 2, 5)})


def test_caches_are_tuned_on_training_prompts_and_each_look_has_samples_of_its_own(workload: Workload) -> None:
    asked: list[tuple[Any, Any]] = []

    def run(work: Any, workload: Workload, jobs: Mapping[str, Any]) -> dict[str, Any]:
        asked.extend((work, job) for job in jobs.values())
        if work is tune_gate_caches:
            return {"caches": []}
        # The same as the champion on the mean, so that every look leaves something open; above all peers.
        part = {
            "2x": {
                name: [30.0, 30.0] if name != CHAMPION else [29.9, 30.05]
                for name in (CANDIDATE, *next(iter(jobs.values())).wanted["2x"])
            }
        }
        for name in part["2x"]:
            if name not in (CANDIDATE, CHAMPION):
                part["2x"][name] = [10.0, 10.0]
        return dict.fromkeys(jobs, part)

    judge_candidate(workload, CANDIDATE_BUNDLE, CHAMPION_BUNDLE, run=run)
    (tuning, job), *looks = asked
    assert tuning is tune_gate_caches and (job.prompts, job.seeds) == (SPLITS["train"], [7000, 7001, 7002])
    drawn = gate_samples(workload, CANDIDATE_BUNDLE, CHAMPION_BUNDLE)
    assert [work for work, _ in looks] == [measure_for_gate] * 2
    assert [tuple(job.prompts) for _, job in looks] == [("judged", "weighed"), ("measured", "compared")]
    assert [tuple(job.seeds) for _, job in looks] == [drawn.seeds[:2], drawn.seeds[2:]]
    assert len(set(drawn.seeds)) == 4 and {job.candidate.digest for _, job in looks} == {"candidate"}


def test_caches_get_our_operations_and_not_a_clock_s_time(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(NamedBundle, "load", lambda self: CANDIDATE_BUNDLE)
    monkeypatch.setattr(judgement, "lesa_method", lambda name, predictor, schedule: (name, predictor))
    monkeypatch.setattr(judgement, "tuned_caches", lambda pipe, ours, **given: asked.append({"ours": ours, **given}))
    job = TuneCachesJob(candidate=NamedBundle.of(CANDIDATE_BUNDLE), prompts=["learned 0"], seeds=[7000])
    tune_gate_caches(workload, job, lambda *_: None)
    (given,) = asked
    assert given["cost"] == "operations" and given["ours"] == {"2x": ("2x", "the predictor of candidate")}
    assert (given["prompts"], given["seeds"]) == (["learned 0"], [7000])


def test_budgets_are_paired_by_full_steps_whatever_their_names() -> None:
    candidate = bundle("a", {"2x": (0, 1, 3, 5), "2.7x": (0, 1, 4), "8x": (0,)})
    champion = bundle("b", {"2x": (0, 1, 2, 3, 5), "even": (0, 2, 4, 6), "fast": (0, 3, 5), "2.7x": (0, 2, 5)})
    assert paired_budgets(candidate, champion) == {"2x": "even", "2.7x": "2.7x"}


def test_other_noise_levels_are_another_run() -> None:
    one, same, other = (bundle("a", {"2x": (0, 1)}, levels) for levels in ((1.0, 0.0), (1.0, 0.0), (0.9, 0.0)))
    assert same_call(one, same) and not same_call(one, other)


def test_samples_are_of_test_prompts_in_turn_with_noise_of_the_pair(workload: Workload) -> None:
    more = dataclasses.replace(workload, publish=PublishParams(gate_prompts=2, gate_max_samples=8))
    drawn = gate_samples(more, CANDIDATE_BUNDLE, CHAMPION_BUNDLE)
    assert drawn.prompts == tuple(SPLITS["test"]) * 2 and drawn.groups == (0, 1, 2, 3, 0, 1, 2, 3)
    assert len(set(drawn.seeds)) == 8 and drawn.looks == (2, 4, 8)
    two = (CANDIDATE_BUNDLE, CHAMPION_BUNDLE)
    offsets = {fresh_offset(workload, one, other) for one in two for other in (None, *two)}
    assert len(offsets) == 6, "every pair of bundles has noise of its own"


def test_each_bundle_is_measured_with_its_own_experts_at_its_own_full_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgement, "lesa_method", lambda *given, **named: (*given, named["name"]))
    job: Any = SimpleNamespace(wanted={"2x": (CHAMPION, "reuse"), "4x": ("reuse",)}, paired={"2x": "even"})
    candidate = bundle("candidate", {"2x": (0, 1, 3, 5), "4x": (0, 4)})
    champion = bundle("champion", {"2x": (0, 1), "even": (0, 2, 4, 6)})
    made: Any = judgement._predictors(candidate, champion, job)
    assert [(budget, predictor, steps.full_steps, name) for budget, predictor, steps, name in made] == [
        ("2x", "the predictor of candidate", (0, 1, 3, 5), CANDIDATE),
        ("2x", "the predictor of champion", (0, 2, 4, 6), CHAMPION),
        ("4x", "the predictor of candidate", (0, 4), CANDIDATE),
    ]


def test_what_is_published_has_the_budgets_that_passed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(build, "write_bundle", lambda folder, manifest, predictor: written.append(manifest))
    data = {"budgets": {"2x": "first", "4x": "second", "8x": "third"}, "evaluation": {"prompts": 4}}
    made: Any = SimpleNamespace(manifest=SimpleNamespace(data=data), predictor=None)
    build.with_budgets(made, ("2x", "8x"), {"4x": ("its tail is worse",)}, Path("nowhere"))
    (manifest,) = written
    assert manifest["budgets"] == {"2x": "first", "8x": "third"}
    assert manifest["evaluation"] == {"prompts": 4, "left_out": {"4x": ["its tail is worse"]}}


def test_a_bundle_names_the_prompts_of_both_splits() -> None:
    """Those of validation chose schedules and states: nothing may be judged on them either."""
    train: Any = SimpleNamespace(prompts=("a", "b"), seeds=(4, 6), keys=("k", "l"))
    validation: Any = SimpleNamespace(prompts=("c",), seeds=(3,), keys=("m",))
    facts = build._training(train, validation, [])
    assert facts["prompt_digests"] == prompt_digests(["a", "b", "c"])
    assert facts["prompts_sha256"] == prompts_digest(["a", "b", "c"]) and facts["noise_seeds"] == [3, 6]
    assert (facts["num_trajectories"], facts["num_validation_trajectories"]) == (2, 1)
