"""The benchmark of `adaptive=True`: on a tiny pipeline with real adapters, and its arithmetic by hand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.studies import adaptive
from benchmarks.studies.adaptive import Runs, blind, figures, traffic
from lesa.bundle import load_bundle
from lesa.models.pipelines import load_pipeline
from lesa.params_file import load_params
from lesa.publishing.bounds import bounds_by_budget
from lesa.publishing.build import make_bundle
from lesa.recording.dataset import recorded_splits
from lesa.recording.prompts import prompt_digests
from lesa.training.experts import untrained_predictor
from lesa.training.jobs import expert_design
from tests.attacks.hostile import edit
from tests.helpers.recording import record
from tests.helpers.tiny import SPLITS, tiny_repository

BUNDLE = "data/bundles/tiny"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = Path.cwd()
    root = tiny_repository(
        tmp_path_factory.mktemp("repository"), prompts={**SPLITS, "test": ["a cat", "a photo", "a dog", "a hat"]}
    )
    os.chdir(root)
    try:
        document = yaml.safe_load(Path("params.yaml").read_text())
        document["workloads"]["tiny"] |= {"predictor": {"hidden": 3, "grid": 3, "history_sizes": [2, 2, 2]}}
        document["workloads"]["tiny"]["schedule"]["budgets"]["1.3x"] = {"interval": 2}
        Path("params.yaml").write_text(yaml.safe_dump(document))
        workload = load_params()
        pipe = load_pipeline(workload.model, workload.resources.device)
        record(workload, pipe)
        train, validation = recorded_splits(workload.recording)
        predictor = untrained_predictor(expert_design(workload), train.sigmas, train.channels)
        bounds = bounds_by_budget(pipe, workload, predictor, train, validation)
        facts = {"quality": {}, "error_bounds": bounds, "evaluation": {}, "created_from": {}}
        make_bundle(Path(BUNDLE), workload, pipe, predictor, train, validation, **facts)
        yield root
    finally:
        os.chdir(before)


def test_adapters_raise_the_alarm_and_the_model_as_it_is_does_not(place: Path) -> None:
    # Two validation samples make loose bounds: only an adapter that turns the model upside down leaves them.
    assert adaptive.main([BUNDLE, "--prompts", "4", "--seeds", "1", "--strengths", "0", "40", "--out", "a/b.json"]) == 0
    found = json.loads(Path("a/b.json").read_text())
    assert (found["budget"], found["slower"], found["samples"]) == ("2x", "1.3x", 4)
    usual, strange = found["rows"]
    assert usual["relative_weight_change"] == 0 and strange["relative_weight_change"] > 1
    for row in (usual, strange):
        assert row["fast"]["mean_full_steps"] == 5 and row["slow"]["mean_full_steps"] == 6
        gain = row["adaptive"]["psnr_mean"] - row["fast"]["psnr_mean"]
        assert row["gain"][0] == pytest.approx(gain, abs=1e-6)
        tail = row["adaptive"]["psnr_p5"] - row["fast"]["psnr_p5"]
        assert row["tail_gain"][0] == pytest.approx(tail, abs=1e-6)
        spent = {float(count): share for count, share in row["share_by_full_steps"].items()}
        assert sum(count * share for count, share in spent.items()) == pytest.approx(row["adaptive"]["mean_full_steps"])
        changed = row["adaptive"]["share_changed"]
        assert row["adaptive"]["mean_full_steps"] == pytest.approx(5 + changed, abs=1.0)
    assert usual["adaptive"]["share_changed"] == 0 and usual["gain"] == [0, 0, 0]
    assert list(found["traffic"]) == ["40"]
    text = Path("a/b.md").read_text()
    assert "budget 2x and 1.3x: 4 samples of 4 held-out prompts" in text and "| none |" in text
    assert load_bundle(BUNDLE).digest == found["bundle"]


def test_what_cannot_be_measured_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(BUNDLE, "data/bundles/seen")
    seen = prompt_digests(["a dog"])
    edit(Path("data/bundles/seen"), lambda document: document["training"].update(prompt_digests=seen))
    for arguments, words in (
        ([BUNDLE, "--budget", "1.3x"], "slowest budget"),
        ([BUNDLE, "--budget", "9x"], "budget: '9x' is not one of"),
        ([BUNDLE, "--seeds", "0"], "--prompts and --seeds must be at least 1"),
        (["data/bundles/none"], "data/bundles/none"),
        (["data/bundles/seen"], "1 of 4 prompts were trained on"),
    ):
        assert adaptive.main([*arguments, "--out", "a/c.json"]) == 2
        assert words in capsys.readouterr().err
    assert not Path("a/c.json").exists()


def runs(psnr: list[float], full: float, changed: list[int] | None = None) -> Runs:
    extra = np.array(changed or [0] * len(psnr))
    return Runs(psnr=np.array(psnr), full_steps=full + 6.0 * extra, changed=extra.astype(bool))


def test_spending_blindly_meets_the_same_mean() -> None:
    fast, slow = runs([40.0] * 100, 10), runs([50.0] * 100, 16)
    found = blind(fast, slow, 13.0)
    assert found["mean_full_steps"] == 13.0 and found["share_slower"] == 0.5
    assert found["psnr_mean"] == pytest.approx(45.0) and found["psnr_p5"] == 40.0
    assert blind(fast, slow, 99.0)["mean_full_steps"] == 16.0


def test_traffic_takes_half_of_each_and_no_sample_twice() -> None:
    usual = {
        "fast": runs([60.0] * 20, 10),
        "adaptive": runs([60.0] * 20, 10),
        "slow": runs([65.0] * 20, 16),
    }
    strange = {
        "fast": runs([40.0] * 20, 10),
        "adaptive": runs([50.0] * 20, 10, [1] * 20),
        "slow": runs([50.0] * 20, 16),
    }
    found = traffic([usual, strange])
    assert found["fast"] == figures(runs([60.0] * 10 + [40.0] * 10, 10))
    assert found["adaptive"]["mean_full_steps"] == 13.0 and found["adaptive"]["psnr_p5"] == 50.0
    assert found["adaptive"]["share_changed"] == 0.5
    # Blindly, half of the samples with an adapter stay as bad as they were.
    assert found["blind"]["mean_full_steps"] == 13.0 and found["blind"]["psnr_p5"] < 41
