"""A retraining whose search finds other full steps: judged against the champion, each of the two at its own."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flows import search, train_stage1, train_stage2
from flows.publish import publish_bundle
from flows.registry.registry import CHAMPION, Registry
from flows.tracking.client import connect
from flows.tracking.run import Reporter
from lesa.atomic import write_json
from lesa.bundle import Bundle, load_bundle
from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.peers.lineup import peer_methods
from lesa.peers.method import Method
from lesa.predictor.predictor import Predictor
from lesa.publishing import judgement
from lesa.publishing.judgement import gate_samples
from lesa.recording.prompts import prompt_digests
from lesa.schedule import Schedule
from lesa.search.jobs import with_schedules
from lesa.training.jobs import load_predictor, save_predictor
from tests.helpers.clone import PROMPTS, SETTINGS
from tests.helpers.recording import record
from tests.helpers.served import mean_psnr
from tests.helpers.tiny import tiny_repository, write_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LOG = logging.getLogger("tests")
NEW_PROMPTS = ["a heavy three", "a plain six, bottom right", "the black dog", "a photo of a blue house"]
CLOSED_FORM, SEARCHED = {"evaluations": 1, "samples": 1}, {"evaluations": 6, "samples": 2}
QUALITY = {
    "psnr": {"mean": 30.0, "low": 29.0, "high": 31.0, "p5": 25.0},
    "outlier_share": {"mean": 0.01, "low": 0.0, "high": 0.05},
}


@dataclass
class Untracked:
    """What a stage's work asks of its run."""

    reporter: Reporter = field(default_factory=lambda: Reporter(path=Path(os.devnull), name="tests"))

    def curves(self) -> list[Any]:
        return []

    def note(self, step: int, values: dict[str, float]) -> None:
        pass


@dataclass
class Retrained:
    """What one retraining left behind."""

    workload: Workload
    bundle: Bundle
    decision: dict[str, Any]
    champion: Bundle  # after it

    @property
    def full_steps(self) -> tuple[int, ...]:
        (schedule,) = self.workload.budgets().values()
        return schedule.full_steps

    @property
    def learned_prompts(self) -> set[str]:
        return set(self.bundle.manifest.data["training"]["prompt_digests"])


def retrain(budget: str, searched: dict[str, int], prompts: list[str], iterations: int, spoiled: float) -> Retrained:
    """The stages' own work in the order of `dvc.yaml`, with these settings; what is evaluated is not the gate's."""
    write_prompts(Path.cwd(), {**PROMPTS, "train": prompts})
    document = yaml.safe_load(Path("params.yaml").read_text())
    section = document["workloads"]["tiny"]
    section["record"]["train_prompts"] = len(prompts)
    section["search"] |= searched
    section["closed_loop"]["iterations"] = iterations
    section["schedule"] = {"budgets": {budget: {"num_full": 4}}, "default_budget": budget}
    Path("params.yaml").write_text(yaml.safe_dump(document))
    settings, run = load_params(), Untracked()
    record(settings, load_pipeline(settings.model, settings.resources.device))
    search.find.fn(settings, run)
    settings = with_schedules(settings)
    train_stage1.train.fn(settings, run)
    train_stage2.train.fn(settings, run)
    if spoiled:
        spoil(settings, spoiled)
    settings.paths.report.mkdir(parents=True, exist_ok=True)
    write_json(settings.paths.report / "metrics.json", {"budgets": {budget: {"lesa": QUALITY}}})
    outcome = publish_bundle(settings, LOG, Path.cwd())
    kept = Path(shutil.copytree(settings.paths.bundle, f"kept/{outcome['candidate']}"))
    if outcome["champion"] is None:  # the first one of a workload may be weaker than its peers: a person's decision
        registry = Registry("lesa-tiny", Path.cwd())
        registry.make_champion(registry.version(outcome["candidate"]), "there is no other")
    decision = yaml.safe_load(Path("data/metrics/tiny/decision.json").read_text())
    champion = Registry("lesa-tiny", Path.cwd()).alias(CHAMPION)
    assert champion is not None
    return Retrained(settings, load_bundle(kept), decision, load_bundle(f"kept/{champion.number}", champion.digest))


def spoil(workload: Workload, change: float) -> None:
    """Noise on every weight that predicts."""
    made, generator = load_predictor(workload.paths.closed_loop), torch.Generator().manual_seed(0)
    tensors = {
        name: value + change * torch.randn(value.shape, generator=generator) if "steps/" in name else value
        for name, value in made.tensors.items()
    }
    assert any("steps/" in name for name in tensors)
    save_predictor(workload.paths.closed_loop, Predictor(made.spec, tensors), {})


def some_peers(schedules: Mapping[str, Schedule]) -> list[Method]:
    return [peer for peer in peer_methods(schedules) if peer.name in ("reuse", "taylor1", "taylor2")]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Retrained]]:
    """A champion; then new prompts and a longer search; then a shorter one again, and weights that are spoiled."""
    root = tiny_repository(tmp_path_factory.mktemp("retrained"), prompts=PROMPTS, num_inference_steps=9)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["workloads"]["tiny"] |= SETTINGS
    params["workloads"]["tiny"]["resources"]["evaluate"] = {"workers": 1}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    threads, more = torch.get_num_threads(), [*PROMPTS["train"], *NEW_PROMPTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("LESA_CACHE", str(root / "cache"))
        # Three peers are enough beside the champion; and in a transformer of four blocks a cache of the first one loses
        # next to nothing, so that it is no peer of a toy's.
        patch.setattr(judgement, "peer_methods", some_peers)
        patch.setattr(judgement, "tuned_caches", lambda *arguments, **settings: [])
        connect(root)
        try:
            yield [
                retrain("slow", CLOSED_FORM, PROMPTS["train"], 1, 0.0),
                retrain("2x", SEARCHED, more, 12, 0.0),
                retrain("2x", CLOSED_FORM, more, 1, 0.05),
            ]
        finally:
            torch.set_num_threads(threads)


def test_new_prompts_and_a_longer_search_find_other_full_steps_and_the_better_is_promoted(
    rounds: list[Retrained],
) -> None:
    champion, candidate, _ = rounds
    assert len(candidate.full_steps) == len(champion.full_steps) == 4 and candidate.full_steps != champion.full_steps
    assert candidate.learned_prompts - champion.learned_prompts == set(prompt_digests(NEW_PROMPTS))
    decision = candidate.decision
    assert decision["promote"] and (decision["champion_before"], decision["champion"]) == ("1", "2")
    assert decision["measured_on"]["paired_budgets"] == {"2x": "slow"}
    assert decision["numbers"]["champion"]["2x"]["mean"]["low"] > 0
    assert candidate.champion.digest == candidate.bundle.digest


def test_a_worse_one_of_other_full_steps_is_kept_out(rounds: list[Retrained]) -> None:
    _, champion, candidate = rounds
    assert len(candidate.full_steps) == 4 and candidate.full_steps != champion.full_steps
    decision = candidate.decision
    assert not decision["promote"] and (decision["champion_before"], decision["champion"]) == ("2", "2")
    assert any(reason.startswith("champion: at budget 2x") for reason in decision["reasons"])
    assert decision["numbers"]["champion"]["2x"]["mean"]["high"] < 0
    assert candidate.champion.digest == champion.bundle.digest != candidate.bundle.digest


def test_the_difference_is_that_of_what_users_of_either_bundle_get(rounds: list[Retrained]) -> None:
    """Each at its own full steps: what is measured here is the bundles as they were registered."""
    for before, after in pairwise(rounds):
        workload, champion = after.workload, before.champion
        (theirs,) = champion.manifest.budgets
        drawn = gate_samples(workload, after.bundle, champion)
        taken = after.decision["samples"]
        prompts, seeds = list(drawn.prompts[:taken]), list(drawn.seeds[:taken])
        assert after.decision["measured_on"]["first_seed"] == seeds[0]
        assert after.bundle.manifest.budgets["2x"].schedule.full_steps == after.full_steps
        pipe = load_pipeline(workload.model, workload.resources.device)
        difference = mean_psnr(pipe, after.bundle, "2x", prompts, seeds) - mean_psnr(
            pipe, champion, theirs, prompts, seeds
        )
        found = after.decision["numbers"]["champion"]["2x"]["mean"]
        assert found["samples"] == taken and difference == pytest.approx(found["difference"], abs=1e-3)
