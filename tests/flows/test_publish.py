"""From a trained predictor to a registered version: what moves the champion and what is written down."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from flows.environment import state_folder
from flows.publish import publish_bundle
from flows.registry import promotion
from flows.registry.promotion import measure_and_decide
from flows.registry.registry import CANDIDATE, CHAMPION, Registry, fingerprint_alias
from flows.registry.tags import budget_quality, registry_tags
from flows.tracking.client import connect
from lesa.atomic import write_json
from lesa.bundle import load_bundle
from lesa.bundle.manifest import READ
from lesa.errors import LesaError
from lesa.locks import Locked, file_lock
from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.predictor.predictor import Predictor
from lesa.publishing.gate import Decision
from lesa.publishing.judgement import fresh_offset
from lesa.recording.dataset import recorded_splits
from lesa.training.experts import untrained_predictor
from lesa.training.jobs import expert_design, save_predictor
from tests.helpers.clone import PROMPTS, SETTINGS
from tests.helpers.recording import record
from tests.helpers.tiny import tiny_flux, tiny_repository

LOG = logging.getLogger("tests")
QUALITY = {
    "psnr": {"mean": 30.0, "low": 29.0, "high": 31.0, "p5": 25.0},
    "outlier_share": {"mean": 0.01, "low": 0.0, "high": 0.05},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A repository in which everything up to `evaluate` has run."""
    root = tiny_repository(tmp_path_factory.mktemp("publish"), prompts=PROMPTS)
    params = yaml.safe_load((root / "params.yaml").read_text())
    # A schedule that is written down: the search is another stage's.
    params["workloads"]["tiny"] |= SETTINGS | {"schedule": {"budgets": {"2x": {"interval": 3}}, "default_budget": "2x"}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        workload = load_params()
        pipe = load_pipeline(workload.model, workload.resources.device)
        record(workload, pipe)
    connect(root)
    return root


@pytest.fixture
def workload(made, tmp_path, monkeypatch) -> Workload:
    """Each test has a copy of its own, with an empty registry."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LESA_CACHE", str(tmp_path / "cache"))
    settings = load_params()
    write_predictor(settings, 0.0)
    metrics = {"budgets": {name: {"lesa": QUALITY} for name in settings.schedule.budgets}}
    settings.paths.report.mkdir(parents=True)
    write_json(settings.paths.report / "metrics.json", metrics)
    return settings


def write_predictor(workload: Workload, change: float) -> None:
    train, _ = recorded_splits(workload.recording)
    start = untrained_predictor(expert_design(workload), train.sigmas, train.channels)
    tensors = {
        name: value + change * torch.ones_like(value) if "projection" in name else value
        for name, value in start.tensors.items()
    }
    save_predictor(workload.paths.closed_loop, Predictor(start.spec, tensors), {})


def decisions(monkeypatch, *answers: bool) -> list[str | None]:
    """Measuring is replaced by these answers; returns the digests of the champions it was asked about."""
    asked: list[str | None] = []
    left = list(answers)

    def decide(workload, candidate, champion, log):
        asked.append(champion.digest if champion else None)
        promote = left.pop(0)
        return Decision(promote=promote, reasons=("better" if promote else "worse",)), {"samples": 4}

    monkeypatch.setattr(promotion, "measure_and_decide", decide)
    return asked


def go(workload: Workload) -> dict:
    return publish_bundle(workload, LOG, Path.cwd())


def recorded_decision() -> dict:
    return json.loads(Path("data/metrics/tiny/decision.json").read_text())


def test_the_first_good_candidate_becomes_champion(workload, monkeypatch):
    decisions(monkeypatch, True)
    outcome = go(workload)
    assert outcome == {
        "candidate": "1", "champion": "1", "champion_before": None, "promote": True, "reasons": ["better"]
    }  # fmt: skip
    registry = Registry("lesa-tiny", Path.cwd())
    champion = registry.alias(CHAMPION)
    bundle = load_bundle(workload.paths.bundle, expected_digest=champion.digest)
    assert champion.fingerprint == bundle.manifest.fingerprint
    assert champion.tags["pipeline_class"] == "FluxPipeline"
    assert champion.tags["budgets"] == "2x" and champion.tags["psnr.2x"] == "30.000"
    assert champion.tags["outliers.2x"] == "0.0100" and "5.0%" in (bundle.path / "README.md").read_text()
    assert champion.tags["gate"] == "promoted" and champion.tags["schema"] == "4"
    assert registry.alias(CANDIDATE) is None
    assert registry.alias(fingerprint_alias(champion.fingerprint)) == champion
    assert recorded_decision()["manifest_sha256"] == champion.digest
    assert recorded_decision()["measured_on"] == {"samples": 4}


def test_publishing_again_adds_and_moves_nothing(workload, monkeypatch):
    asked = decisions(monkeypatch, True)
    go(workload)
    again = go(workload)
    assert asked == [None]
    assert again["candidate"] == again["champion"] == "1"
    assert not again["promote"] and "champion already" in again["reasons"][0]
    assert Registry("lesa-tiny", Path.cwd()).alias(CHAMPION).number == "1"


def test_a_refused_candidate_is_registered_with_the_reasons(workload, monkeypatch):
    asked = decisions(monkeypatch, True, False)
    go(workload)
    write_predictor(workload, 1e-3)
    outcome = go(workload)
    assert outcome["candidate"] == "2" and outcome["champion"] == "1" and not outcome["promote"]
    registry = Registry("lesa-tiny", Path.cwd())
    assert asked == [None, registry.alias(CHAMPION).digest]
    version = registry.client.get_model_version("lesa-tiny", "2")
    assert version.tags["gate"] == "kept out" and version.tags["gate.reasons"] == "worse"
    assert recorded_decision()["champion_before"] == "1"


def test_a_better_one_takes_over(workload, monkeypatch):
    decisions(monkeypatch, True, True)
    go(workload)
    write_predictor(workload, 1e-3)
    assert go(workload)["champion"] == "2"
    assert recorded_decision()["champion_before"] == "1"


def test_a_champion_that_cannot_be_measured_stays_and_the_stage_fails(workload, monkeypatch):
    """Its files are gone, or altered: the candidate is not measured against it, so it does not win."""
    decisions(monkeypatch, True)
    go(workload)
    shutil.rmtree("cache", ignore_errors=True)
    for weights in Path("mlartifacts").rglob("weights.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    write_predictor(workload, 1e-3)
    with pytest.raises(LesaError, match="could not be compared with champion 1: .*flows.champion"):
        go(workload)
    outcome = recorded_decision()
    assert outcome["champion"] == "1" and not outcome["promote"]
    assert "not measured" in outcome["reasons"][0] and "weights.safetensors" in outcome["reasons"][0]


def test_a_champion_for_another_call_is_not_compared(workload, monkeypatch):
    asked = decisions(monkeypatch, True, True)
    go(workload)
    monkeypatch.setattr(promotion, "same_call", lambda candidate, champion: False)
    write_predictor(workload, 1e-3)
    assert go(workload)["champion"] == "2"
    assert asked == [None, None]


def test_what_a_person_took_back_is_not_promoted_again(workload, monkeypatch):
    asked = decisions(monkeypatch, True, True)
    go(workload)
    write_predictor(workload, 1e-3)
    go(workload)
    registry = Registry("lesa-tiny", Path.cwd())
    registry.make_champion(registry.version("1"), "blurs hands")
    outcome = go(workload)
    assert not outcome["promote"] and outcome["champion"] == "1" and len(asked) == 2
    assert "rolled back (blurs hands)" in outcome["reasons"][0] and registry.alias(CHAMPION).number == "1"


def test_a_budget_that_fails_is_left_out_of_what_is_published(workload, monkeypatch):
    """The registered candidate has it, the champion has not, nor has the folder; publishing again changes nothing."""
    answer = Decision(promote=True, reasons=("better",), budgets=("2x",), left_out={"4x": ("its tail is worse",)})
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["workloads"]["tiny"]["schedule"]["budgets"]["4x"] = {"full_steps": [0, 1, 2, 3, 4]}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    settings = load_params()
    write_predictor(settings, 0.0)
    metrics = {"budgets": {name: {"lesa": QUALITY} for name in settings.schedule.budgets}}
    write_json(settings.paths.report / "metrics.json", metrics)
    monkeypatch.setattr(promotion, "measure_and_decide", lambda *_: (answer, {}))
    for _ in range(2):
        outcome = go(settings)
        assert outcome["candidate"] == "1" and outcome["champion"] == "2"
        published = load_bundle(settings.paths.bundle)
        assert list(published.manifest.budgets) == ["2x"]
        assert published.manifest.data["evaluation"]["left_out"] == {"4x": ["its tail is worse"]}
        assert "Budget 4x is left out: its tail is worse." in (settings.paths.bundle / "README.md").read_text()
    registry = Registry("lesa-tiny", Path.cwd())
    assert registry.alias(CHAMPION).digest == published.digest
    assert registry.version("1").tags["budgets"] == "2x,4x" and registry.alias(CHAMPION).tags["budgets"] == "2x"
    assert [entry.version for entry in registry.history.entries()] == ["2"]


def test_one_publisher_at_a_time(workload, monkeypatch):
    decisions(monkeypatch, True)
    with file_lock(state_folder(Path.cwd()) / "lesa-tiny.publish.lock"), pytest.raises(Locked, match=str(os.getpid())):
        go(workload)
    assert not workload.paths.bundle.exists()


def test_after_the_model_was_trained_anew_the_peers_decide(workload, monkeypatch):
    asked = decisions(monkeypatch, True, True)
    go(workload)
    registry = Registry("lesa-tiny", Path.cwd())
    old = registry.alias(CHAMPION)
    tiny_flux("data/base/tiny", seed=1)
    assert go(workload)["champion"] == "2"
    assert asked == [None, None]
    new = registry.alias(CHAMPION)
    assert new.fingerprint != old.fingerprint
    assert registry.alias(fingerprint_alias(old.fingerprint)).number == "1"


def test_after_the_format_has_changed_the_peers_decide(workload, monkeypatch):
    """Otherwise no candidate could ever replace a champion that nothing can read any more."""
    asked = decisions(monkeypatch, True, True)
    go(workload)
    registry = Registry("lesa-tiny", Path.cwd())
    registry.tag(registry.alias(CHAMPION), {"schema": str(min(READ) - 1)})
    write_predictor(workload, 1e-3)
    assert go(workload)["champion"] == "2"
    assert asked == [None, None]
    assert registry.alias(f"champion-schema{min(READ) - 1}").number == "1"
    assert registry.alias(fingerprint_alias(registry.alias(CHAMPION).fingerprint)).number == "2"


def test_a_champion_of_a_format_still_read_is_compared(workload, monkeypatch):
    asked = decisions(monkeypatch, True, False)
    go(workload)
    registry = Registry("lesa-tiny", Path.cwd())
    champion = registry.alias(CHAMPION)
    registry.tag(champion, {"schema": str(min(READ))})
    write_predictor(workload, 1e-3)
    assert go(workload)["champion"] == "1"
    assert asked == [None, champion.digest]


def test_without_an_evaluation_nothing_is_touched(workload):
    (workload.paths.report / "metrics.json").unlink()
    with pytest.raises(ValueError, match="run the evaluate stage first"):
        go(workload)
    assert not workload.paths.bundle.exists()
    assert Registry("lesa-tiny", Path.cwd()).client.search_model_versions("name = 'lesa-tiny'") == []
    with pytest.raises(ValueError, match="did not measure budgets 2x"):
        budget_quality(workload, {"budgets": {}})


@pytest.mark.slow
def test_the_gate_measures_for_itself(workload, monkeypatch):
    """A champion against its own copy: equal at every sample, so it is kept out, whatever it claims."""
    decisions(monkeypatch, True)
    go(workload)
    bundle = load_bundle(workload.paths.bundle)
    decision, measured_on = measure_and_decide(workload, bundle, bundle, LOG)
    assert not decision.promote
    equal = decision.numbers["champion"]["2x"]["mean"]
    assert equal["difference"] == equal["low"] == equal["high"] == 0.0 and equal["answer"] == "no"
    assert {"reuse", "taylor1", "taylor2", "euler", "mag_cache", "first_block_cache"} <= set(decision.numbers)
    assert measured_on["samples"] == 4
    assert measured_on["first_seed"] == fresh_offset(workload, bundle, bundle)
    assert measured_on["first_seed"] != fresh_offset(workload, bundle, None)
    assert measured_on["first_seed"] > 1 << 32
    tags = registry_tags(bundle.manifest.data)
    assert tags["ratio.2x"] == "1.60" and tags["created_from.git"] == "none"


@pytest.mark.slow
def test_prompts_that_were_trained_on_judge_nothing(workload, monkeypatch):
    decisions(monkeypatch, True)
    go(workload)
    bundle = load_bundle(workload.paths.bundle)
    splits = {name: Path(f"data/prompts/tiny/{name}.txt") for name in ("train", "test")}
    train, test = (splits[name].read_text() for name in ("train", "test"))
    splits["train"].write_text(test)
    splits["test"].write_text(train)
    with pytest.raises(ValueError, match="were trained on"):
        measure_and_decide(workload, bundle, None, LOG)
