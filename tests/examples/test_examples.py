"""The examples run, on pipelines small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lesa.params_file import load_params
from lesa.recording.prompts import read_splits
from tests.helpers.bundles import make_bundle
from tests.helpers.clone import clone, commit, environment
from tests.helpers.tiny import CALL, tiny_flux, tiny_repository

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROMPTS = [f"a {weight} {digit}" for weight in ("thin", "bold") for digit in ("one", "two", "three", "four", "five")]


def run(script: str, *arguments: object, root: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """An example with the code of `root`, in that folder."""
    return subprocess.run(
        [sys.executable, root / "examples" / script, *map(str, arguments)],
        cwd=root,
        env=environment(PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_what_it_does(script: Path) -> None:
    done = run(script.name, "--help")
    first = script.read_text(encoding="utf-8").split("\n")[0].removeprefix('"""')
    assert done.returncode == 0, done.stderr
    assert first in " ".join(done.stdout.split())
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 130


def test_sample_draws_with_and_without_a_bundle(tmp_path: Path) -> None:
    make_bundle(tiny_flux(tmp_path / "pipeline"), tmp_path / "bundle")
    arguments = [tmp_path / "pipeline", tmp_path / "bundle", "--prompt", "a thin seven", "--budget", "1.67x"]
    done = run("sample.py", *arguments, "--out", tmp_path / "images")
    assert done.returncode == 0, done.stderr
    images = [(tmp_path / "images" / f"{name}.png").read_bytes() for name in ("lesa", "plain")]
    assert images[0] != images[1]
    assert "predicted" in done.stdout and "lesa: " in done.stdout and "plain: " in done.stdout


def repository(root: Path) -> None:
    """A tiny model and the repository's own settings."""
    tiny_repository(root)
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")


def own_model(root: Path, name: str, prompts: list[str]) -> subprocess.CompletedProcess[str]:
    (root / "prompts.txt").write_text("\n".join(prompts) + "\n")
    call = [f"--{key.replace('_', '-')}={value}" for key, value in CALL.items()]
    return run(
        "own_model.py",
        name,
        root / "data/base/tiny",
        root / "prompts.txt",
        *call,
        "--num-inference-steps=20",
        "--root",
        root,
    )


def test_own_model_writes_a_section_that_is_accepted_and_prompts_that_are_disjoint(tmp_path: Path) -> None:
    repository(tmp_path)
    before = yaml.safe_load((tmp_path / "params.yaml").read_text())
    done = own_model(tmp_path, "mine", [*PROMPTS, PROMPTS[0]])
    assert done.returncode == 0, done.stderr
    assert "make repro WORKLOAD=mine" in done.stdout
    assert "  mine: {family: flux, prompts: mine, model: tiny}\n" in done.stdout
    workload = load_params(tmp_path / "params.yaml", "mine")
    assert workload.model.family == "flux" and workload.model.source == "data/base/tiny"
    assert workload.call.num_inference_steps == 20 and workload.schedule.budgets["5x"].num_full == 4
    published = load_params(ROOT / "params.yaml", "flux-dev")
    assert workload.predictor == published.predictor and workload.closed_loop == published.closed_loop
    splits = read_splits(tmp_path / "data/prompts/mine")
    assert {name: len(lines) for name, lines in splits.items()} == {"train": 7, "validation": 1, "test": 2}
    after = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert after["workloads"].pop("mine") and after == before


def test_own_model_leaves_params_as_they_were_where_the_section_is_refused(tmp_path: Path) -> None:
    repository(tmp_path)
    before = (tmp_path / "params.yaml").read_bytes()
    done = own_model(tmp_path, "Not A Name", PROMPTS)
    assert done.returncode != 0 and "Not A Name" in done.stderr
    assert (tmp_path / "params.yaml").read_bytes() == before and not (tmp_path / "data/prompts/Not A Name").exists()
    few = own_model(tmp_path, "few", PROMPTS[:2])
    assert few.returncode != 0 and "2 prompts: at least 4 are needed" in few.stderr


@pytest.mark.parametrize(
    ("result", "code", "shown"),
    [
        ({"status": "skipped", "reason": "process 7 is at work"}, 1, ["process 7 is at work"]),
        ({"status": "done", "champion": "2"}, 0, ["candidate: version 3, kept out", "  worse", "champion:  version 2"]),
        ({"status": "done", "champion": None}, 0, ["candidate: version 3, kept out", "  worse", "champion:  none"]),
    ],
)
def test_retrain_shows_what_the_gate_decided(tmp_path: Path, monkeypatch, capsys, result, code, shown) -> None:
    specification = importlib.util.spec_from_file_location("retrain_example", ROOT / "examples/retrain.py")
    assert specification is not None and specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    (tmp_path / "decision.json").write_text(json.dumps({"candidate": "3", "promote": False, "reasons": ["worse"]}))
    monkeypatch.setattr(example, "run_flow", lambda flow, workload: result)
    monkeypatch.setattr(example, "read_workload", lambda name: name)
    monkeypatch.setattr(example, "metrics_folder", lambda workload: tmp_path)
    monkeypatch.setattr(sys, "argv", ["retrain.py", "--workload", "tiny"])
    assert example.main() == code
    assert capsys.readouterr().out.splitlines() == shown


@pytest.mark.long
@pytest.mark.timeout(900)
def test_retrain_brings_a_workload_up_to_date_and_shows_the_decision(tmp_path: Path) -> None:
    root = clone(tmp_path)
    done = run("retrain.py", "--workload", "tiny", root=root, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    decision = json.loads((root / "data/metrics/tiny/decision.json").read_text())
    assert f"candidate: version {decision['candidate']}, " in done.stdout
    assert all(reason in done.stdout for reason in decision["reasons"])
    commit(root, "After the first run")
    again = run("retrain.py", "--workload", "tiny", root=root, timeout=300)
    assert again.returncode == 0 and f"candidate: version {decision['candidate']}, " in again.stdout, again.stderr
