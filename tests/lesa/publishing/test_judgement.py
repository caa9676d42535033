"""What the gate measures is what users of either bundle get: real bundles on a real pipeline."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lesa
from lesa import metrics
from lesa.bundle import Bundle
from lesa.evaluation.measure import Part
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import BudgetParams, Workload
from lesa.params_file import load_params
from lesa.predictor.predictor import Predictor
from lesa.publishing.build import make_bundle, with_budgets
from lesa.publishing.gate import CANDIDATE, CHAMPION
from lesa.publishing.judgement import (
    GateJob,
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
from lesa.recording.dataset import recorded_splits
from lesa.recording.prompts import PromptError, prompt_digests
from lesa.training.experts import untrained_predictor
from lesa.training.jobs import expert_design
from tests.helpers.recording import record
from tests.helpers.tiny import tiny_repository

PROMPTS = {
    "train": ["a thin seven", "a bold two, top left", "a red house on the left", "the blue cat"],
    "validation": ["a dog on the left", "the white dog"],
    "test": ["a black cat", "a bold nine", "the red dog", "a thin house"],
}
# The same number of full steps at other places, as a search finds them with other prompts.
CHAMPIONS = {"2x": BudgetParams(full_steps=(0, 1, 2, 5)), "1.6x": BudgetParams(full_steps=(0, 1, 2, 4, 6))}
CANDIDATES = {"2x": BudgetParams(full_steps=(0, 1, 3, 5)), "2.7x": BudgetParams(full_steps=(0, 1, 4))}


@dataclass
class Made:
    workload: Workload
    pipe: Any
    champion: Bundle
    candidate: Bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    before = Path.cwd()
    os.chdir(tiny_repository(tmp_path_factory.mktemp("repository"), prompts=PROMPTS))
    try:
        base = load_params()
        base = dataclasses.replace(
            base,
            predictor=dataclasses.replace(base.predictor, kind="per_step", boundaries=(0.5,), history_sizes=(2, 2)),
            evaluate=dataclasses.replace(base.evaluate, seeds_per_prompt=1, batch_size=2),
            publish=dataclasses.replace(base.publish, gate_prompts=2, gate_max_samples=6),
        )
        pipe = load_pipeline(base.model, base.resources.device)
        record(base, pipe)

        def bundle(name: str, budgets: dict[str, BudgetParams], change: float) -> Bundle:
            workload = dataclasses.replace(base, schedule=dataclasses.replace(base.schedule, budgets=budgets))
            train, validation = recorded_splits(workload.recording)
            start = untrained_predictor(expert_design(workload), train.sigmas, train.channels)
            tensors = {
                key: value + change * torch.ones_like(value) if "steps/bias" in key else value
                for key, value in start.tensors.items()
            }
            return make_bundle(
                Path(name), workload, pipe, Predictor(start.spec, tensors), train, validation,
                quality={}, evaluation={}, created_from={},
                error_bounds={b: [None] * s.num_full for b, s in workload.budgets().items()},
            )  # fmt: skip

        yield Made(base, pipe, bundle("champion", CHAMPIONS, 0.0), bundle("candidate", CANDIDATES, 0.05))
    finally:
        os.chdir(before)


def enabled_psnr(made: Made, bundle: Bundle, budget: str, prompts: list[str], seeds: list[int]) -> list[float]:
    call = bundle.manifest.call
    plain = sample(made.pipe, prompts, seeds, call, batch_size=2)
    lesa.enable(made.pipe, bundle, budget=budget)
    try:
        images = sample(made.pipe, prompts, seeds, call, batch_size=2)
    finally:
        lesa.disable(made.pipe)
    return metrics.psnr(images, plain).tolist()


def test_each_runs_at_its_own_full_steps_as_its_users_get_it(made: Made) -> None:
    prompts, seeds = PROMPTS["test"], [11, 12, 13, 14]
    job = GateJob(
        wanted={"2x": (CHAMPION, "taylor1"), "2.7x": ("reuse",)},
        candidate=NamedBundle.of(made.candidate),
        champion=NamedBundle.of(made.champion),
        paired=paired_budgets(made.candidate, made.champion),
        caches=(),
        prompts=prompts,
        seeds=seeds,
        part=Part(starts=(0, 2), timed=()),
    )
    measured = measure_for_gate(made.workload, job, lambda step, values: None)
    assert {budget: set(methods) for budget, methods in measured.items()} == {
        "2x": {CANDIDATE, CHAMPION, "taylor1"},
        "2.7x": {CANDIDATE, "reuse"},
    }
    for budget in ("2x", "2.7x"):
        assert measured[budget][CANDIDATE] == enabled_psnr(made, made.candidate, budget, prompts, seeds)
    theirs = enabled_psnr(made, made.champion, "2x", prompts, seeds)
    assert measured["2x"][CHAMPION] == theirs != measured["2x"][CANDIDATE]


def test_budgets_are_paired_by_their_number_of_full_steps(made: Made) -> None:
    assert paired_budgets(made.candidate, made.champion) == {"2x": "2x"}
    assert paired_budgets(made.champion, made.champion) == {"2x": "2x", "1.6x": "1.6x"}
    assert paired_budgets(made.candidate, None) == {}
    assert same_call(made.candidate, made.champion)
    other = dataclasses.replace(
        made.champion,
        manifest=dataclasses.replace(
            made.champion.manifest, call=dataclasses.replace(made.champion.manifest.call, guidance_scale=9.0)
        ),
    )
    assert not same_call(made.candidate, other)


def test_samples_take_new_prompts_before_new_noise(made: Made) -> None:
    drawn = gate_samples(made.workload, made.candidate, made.champion)
    assert drawn.looks == (2, 4) and drawn.groups == (0, 1, 2, 3)
    assert drawn.prompts == tuple(PROMPTS["test"])
    offset = fresh_offset(made.workload, made.candidate, made.champion)
    assert drawn.seeds == tuple(range(offset, offset + 4)) and offset > 1 << 32
    assert offset != fresh_offset(made.workload, made.candidate, None)
    assert offset != fresh_offset(made.workload, made.champion, made.champion)
    more = dataclasses.replace(made.workload, publish=dataclasses.replace(made.workload.publish, gate_max_samples=8))
    again = gate_samples(more, made.candidate, made.champion)
    assert again.groups == (0, 1, 2, 3, 0, 1, 2, 3) and len(set(again.seeds)) == 8


def test_prompts_that_the_champion_was_trained_on_judge_nothing(made: Made) -> None:
    def trained_on(prompts: list[str]) -> Bundle:
        manifest = made.champion.manifest
        data = {**manifest.data, "training": {"prompt_digests": prompt_digests(prompts)}}
        return dataclasses.replace(made.champion, manifest=dataclasses.replace(manifest, data=data))

    drawn = gate_samples(made.workload, made.candidate, trained_on(["a bold nine"]))
    assert drawn.excluded == 1 and "a bold nine" not in drawn.prompts
    with pytest.raises(PromptError, match="the champion was trained on 3 of 4 test prompts"):
        gate_samples(made.workload, made.candidate, trained_on(PROMPTS["test"][:3]))
    with pytest.raises(PromptError, match="were trained on"):
        gate_samples(made.workload, trained_on(["a bold nine"]), made.champion)


def test_caches_are_tuned_to_operations_and_so_the_same_again(made: Made) -> None:
    job = TuneCachesJob(candidate=NamedBundle.of(made.candidate), prompts=PROMPTS["train"][:2], seeds=[1, 2])
    first, second = (tune_gate_caches(made.workload, job, lambda step, values: None) for _ in range(2))
    settings = [[(method.name, method.budget, dict(method.settings)) for method in each] for each in (first, second)]
    assert settings[0] == settings[1]
    assert {m.name for m in first} >= {"first_block_cache", "mag_cache"}


def test_a_whole_judgement(made: Made) -> None:
    lines: list[str] = []
    decision, measured_on = judge_candidate(made.workload, made.candidate, made.champion, log=lines.append)
    assert set(decision.numbers["champion"]) == {"2x"} and {"reuse", "euler"} <= set(decision.numbers)
    assert measured_on["paired_budgets"] == {"2x": "2x"} and measured_on["most_samples"] == 4
    assert measured_on["first_seed"] == fresh_offset(made.workload, made.candidate, made.champion)
    assert lines and lines[0].startswith("2 samples: ")
    again, _ = judge_candidate(made.workload, made.candidate, made.champion)
    assert again.to_dict() == decision.to_dict()


def test_a_bundle_with_fewer_budgets_runs_as_before(made: Made, tmp_path: Path) -> None:
    fewer = with_budgets(made.candidate, ("2x",), {"2.7x": ("its tail is worse",)}, tmp_path / "fewer")
    assert list(fewer.manifest.budgets) == ["2x"] and fewer.digest != made.candidate.digest
    assert fewer.manifest.weights_sha256 == made.candidate.manifest.weights_sha256
    arguments = ("2x", PROMPTS["test"][:2], [3, 4])
    assert enabled_psnr(made, fewer, *arguments) == enabled_psnr(made, made.candidate, *arguments)
    with pytest.raises(ValueError, match="'2.7x' is not one of 2x"):
        lesa.enable(made.pipe, fewer, budget="2.7x")
