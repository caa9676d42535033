"""`lesa doctor WORKLOAD`: every need against what is here, a remedy for each that is not met, a verdict."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lesa.cli import main
from lesa.doctor import readiness
from lesa.params_file import load_params
from tests.helpers.tiny import tiny_repository

ROOT = Path(__file__).parents[3]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's settings and prompts in a folder without data, on a machine without hub, GPU or account."""
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "data/prompts", tmp_path / "data/prompts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readiness, "answers", lambda uri: False)
    monkeypatch.setattr(readiness, "hub_cache", lambda: tmp_path / "hub")
    monkeypatch.setattr(readiness, "_has_token", lambda: False)
    monkeypatch.setattr(readiness, "_offline", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path


def gpu(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    found = SimpleNamespace(total_memory=int(gigabytes * 1e9), name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: found)


def checks(name: str) -> dict[str, dict[str, object]]:
    return {check["name"]: check for check in readiness.examine_workload(load_params(workload=name))["checks"]}


def test_what_is_missing_is_said_with_its_remedy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "flux-dev"]) == 1
    printed = capsys.readouterr().out
    for words in (
        "workload  flux-dev: flux-dev, 16.87 billion parameters",
        "(computed, not measured)",
        "NO        GPU memory: about 35.8 GB needed",
        "NO        hub: https://huggingface.co is not reachable",
        "NO        account: no access token",
        "accept the licence on https://huggingface.co/black-forest-labs/FLUX.1-dev",
        "ok        prompts: 256 train, 32 validation",
        "verdict   not here yet: GPU memory, hub, account",
    ):
        assert words in printed
    assert not (here / "hub").exists() and not (here / "data/trajectories").exists()


def test_a_machine_that_has_everything(here: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    gpu(monkeypatch, 80)
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    revision = load_params(workload="flux-dev").model.revision
    snapshot = here / f"hub/models--black-forest-labs--FLUX.1-dev/snapshots/{revision}"
    (snapshot / "transformer").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "transformer/a.safetensors").write_text("")
    assert main(["doctor", "--workload", "flux-dev", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ready"] and facts["core"]["torch"] and facts["needs"]["gpu_hours"]["all"] > 1
    assert "download" not in next(check["found"] for check in facts["checks"] if check["name"] == "disk")


def test_a_smaller_gpu_is_told_what_it_can_do(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 30)
    assert checks("flux-dev")["GPU memory"]["remedy"] == "take a larger GPU"
    gpu(monkeypatch, 48)
    assert checks("flux-dev")["GPU memory"]["ok"]
    workload = load_params(workload="flux-dev")
    kept = dataclasses.replace(workload.closed_loop, gradient_checkpointing=False)
    rows = readiness.examine_workload(dataclasses.replace(workload, closed_loop=kept))["checks"]
    (found,) = (row for row in rows if row["name"] == "GPU memory")
    assert not found["ok"]
    for words in ("set closed_loop.gradient_checkpointing to true", "set closed_loop.iterations to 0", "35.8 GB"):
        assert words in str(found["remedy"])


def test_offline_disk_and_local_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_offline", lambda: True)
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    found = checks("hunyuan-video")
    assert "HF_HUB_OFFLINE is set" in str(found["hub"]["found"]) and "account" not in found
    assert not found["disk"]["ok"] and "1 GB free" in str(found["disk"]["found"])
    lightning = checks("qwen-image-lightning")["model"]
    assert not lightning["ok"] and "data/base/qwen-image-lightning is not here" in str(lightning["found"])


def test_a_proxy_is_asked_in_the_hub_s_stead(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(readiness, "answers", lambda uri: asked.append(uri) or "proxy" in uri)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy.example:3128")
    found = checks("qwen-image")["hub"]
    assert found["ok"] and asked == ["http://me:secret@proxy.example:3128"]
    assert found["found"] == "http://***@proxy.example:3128, the proxy to https://huggingface.co, is reachable"
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    assert checks("qwen-image")["hub"]["ok"] and asked[-1] == "http://proxy.example:3128"
    monkeypatch.setenv("NO_PROXY", "huggingface.co")
    assert not checks("qwen-image")["hub"]["ok"] and asked[-1] == "https://huggingface.co"


def test_folders_that_cannot_be_written_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "write access" not in checks("flux-dev")
    monkeypatch.setattr(readiness.os, "access", lambda path, mode: Path(path) != here / "data")
    found = checks("flux-dev")["write access"]
    assert not found["ok"] and found["found"] == f"no right to write under {here / 'data'}"


def test_a_small_local_model_needs_no_gpu(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_repository(tmp_path / "tiny"))
    workload = load_params()
    few = dataclasses.replace(workload, evaluate=dataclasses.replace(workload.evaluate, prompts=1))
    found = readiness.examine_workload(few)
    assert found["ready"], found["checks"]
    wanting = {check["name"]: check for check in readiness.examine_workload(workload)["checks"] if not check["ok"]}
    assert set(wanting) == {"prompts"} and "evaluate.prompts: 64 wanted, test.txt has 1" in wanting["prompts"]["found"]
    scored = readiness.examine_workload(dataclasses.replace(few, scorer="data/scorers/none"))
    assert [check["name"] for check in scored["checks"] if not check["ok"]] == ["scorer"]


def test_two_names_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "flux-dev", "--workload", "qwen-image"]) == 2
    assert "give one workload" in capsys.readouterr().err
    assert main(["doctor", "nope"]) == 2
    assert "'nope' is not in the file" in capsys.readouterr().err
    assert main(["doctor", "flux-photos"]) == 2
    assert "make it first: python -m flows.base --workload flux-photos" in capsys.readouterr().err
