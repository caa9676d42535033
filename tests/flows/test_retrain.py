"""The whole pipeline under its schedule, in a clone with a tiny workload; what reruns and what does not."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.processes import descendants, identify, is_running
from flows.retrain import is_superseded
from lesa.bundle import load_bundle
from lesa.models.pipelines import load_pipeline
from lesa.params import ModelParams
from lesa.pull import pull
from tests.helpers.canaries import CANARIES, spellings, sweep
from tests.helpers.clone import PROMPTS, clone, commit, environment, run
from tests.helpers.served import mean_psnr
from tests.helpers.tiny import write_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # a minute's schedule, then a whole retraining
NEW_PROMPT = "a heavy three"
SCHEDULED = {name: secret for name, secret in CANARIES.items() if not name.startswith("PREFECT_")}
GATE = "gate: (promoted|kept): "  # the retraining's last line

# A first champion, made as the stages make it but in one process: what is tested here is the second one.
FIRST_RUN = """
import logging
from flows.publish import publish_bundle
from flows.stage import read_workload, stage_run
from flows import evaluate, search, train_stage1, train_stage2
from contextlib import closing
from flows.registry.registry import Registry
from lesa.models.pipelines import load_pipeline
from lesa.recording.drive import LocalRecorder, drive
from lesa.recording.store import TrajectoryStore
from lesa.schedule import Schedule
from lesa.search.schedules_file import write_schedules

workload = read_workload(None)
store = TrajectoryStore.create(workload.paths.trajectories)
recorder = LocalRecorder(load_pipeline(workload.model, workload.resources.device), workload.recording, store)
drive(workload.recording, store, closing(recorder), logging.getLogger("record"))
with stage_run("search", workload, ("seed",)) as tracked:
    search.find.fn(workload, tracked)
write_schedules(workload.paths.schedules, 8, {"2x": (Schedule.explicit(8, [0, 1, 2, 3]), {})})  # the worst there is
workload = read_workload(None, searched=True)
for stage, work in (
    ("train_stage1", train_stage1.train), ("train_stage2", train_stage2.train), ("evaluate", evaluate.judge)
):
    with stage_run(stage, workload, ("seed",)) as tracked:
        work.fn(workload, tracked)
candidate = publish_bundle(workload, logging.getLogger())["candidate"]
registry = Registry("lesa-tiny")
registry.make_champion(registry.version(candidate), "there is no other")
print("FIRST", candidate)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = clone(tmp_path_factory.mktemp("clone"))
    done = subprocess.run(
        [sys.executable, "-c", FIRST_RUN],
        cwd=folder,
        env=environment(**CANARIES),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert [canary for canary in spellings() if canary in (done.stdout + done.stderr).encode()] == []
    assert done.returncode == 0 and "FIRST 1" in done.stdout, done.stdout + done.stderr
    return folder


def test_the_schedule_retrains_on_new_prompts(repository):
    """Adds a training prompt and waits: nothing is started by hand."""
    before = {path.name for path in (repository / "data/trajectories/tiny.zarr").iterdir() if path.is_dir()}
    add_prompt(repository, NEW_PROMPT)
    deployment = repository / "prefect.yaml"
    deployment.write_text(
        deployment.read_text().replace("0 3 * * *", "* * * * *").replace("flux-digits", "tiny")
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = repository / "local.log"
    with open(log, "wb") as output:
        local = subprocess.Popen(
            [sys.executable, "-m", "flows.retrain_local", "--port", str(port)],
            cwd=repository,
            env=environment(PREFECT_WORKER_QUERY_SECONDS="2", **SCHEDULED),
            stdout=output,
            stderr=output,
        )
        try:
            wait_for(log, rf"{GATE}[\s\S]*Finished in state|in state Failed|Crashed", local, 800)
            ours = identify(local.pid)
            assert ours is not None
            family = {ours, *descendants([ours])}
        finally:
            local.send_signal(signal.SIGINT)
            code = local.wait(60)
    text = log.read_text(errors="replace")
    assert code == 0, text
    assert "Finished in state Completed" in text, text
    assert "retrain/nightly" in text and "* * * * *" in text
    assert "7 trajectories planned, 1 to record" in text

    store = repository / "data/trajectories/tiny.zarr"
    after = {path.name for path in store.iterdir() if path.is_dir()}
    assert before < after and len(after - before) == 1
    record = json.loads((store / (after - before).pop() / "zarr.json").read_text())
    assert record["attributes"]["prompt"] == NEW_PROMPT

    decision = json.loads((repository / "data/metrics/tiny/decision.json").read_text())
    assert decision["candidate"] == "2" and decision["reasons"]
    versions = registered(repository)
    assert sorted(versions) == ["1", "2"]
    assert versions["2"]["gate"] in {"promoted", "kept out"}
    assert versions["1"]["manifest_sha256"] != versions["2"]["manifest_sha256"]
    judged_at_their_own_full_steps(repository, decision)

    assert [canary for canary in spellings() if canary in text.encode()] == []
    assert sweep(repository) == [], "secrets of the environment are written nowhere"
    time.sleep(1)
    assert [process for process in family if is_running(process)] == [], "nothing is left running"


def judged_at_their_own_full_steps(repository: Path, decision: dict[str, Any]) -> None:
    """The search has found other full steps: champion and candidate were each judged as their users run them."""
    uri = f"sqlite:///{repository}/mlflow.db"
    before, after = (load_bundle(pull(f"models:/lesa-tiny/{number}", tracking_uri=uri)) for number in "12")
    assert before.manifest.budgets["2x"].schedule.full_steps == (0, 1, 2, 3)
    assert after.manifest.budgets["2x"].schedule.full_steps != (0, 1, 2, 3)
    assert decision["champion_before"] == "1" and decision["measured_on"]["paired_budgets"] == {"2x": "2x"}
    pipe = load_pipeline(ModelParams(family="flux", source=str(repository / "data/base/tiny")), "cpu")
    found = decision["numbers"]["champion"]["2x"]["mean"]
    test, taken = list(PROMPTS["test"]), found["samples"]
    prompts = [test[index % len(test)] for index in range(taken)]
    first = decision["measured_on"]["first_seed"]
    seeds = list(range(first, first + taken))
    difference = mean_psnr(pipe, after, "2x", prompts, seeds) - mean_psnr(pipe, before, "2x", prompts, seeds)
    assert difference == pytest.approx(found["difference"], abs=1e-3)
    answers = [answers["2x"] for answers in decision["numbers"].values()]
    yes = all(each["mean"]["low"] > 0 and each["tail"]["low"] > -0.5 for each in answers)
    assert decision["promote"] == yes and decision["champion"] == ("2" if yes else "1")


def test_runs_that_came_late_are_one(tmp_path):
    """Due before the last finished one began: everything it was to pick up has been picked up."""
    noted = tmp_path / "retrained.json"
    assert not is_superseded(noted, due=100.0)
    noted.write_text('{"began": 200.0}')
    assert is_superseded(noted, due=100.0)
    assert not is_superseded(noted, due=200.5)
    noted.write_text("{")
    assert not is_superseded(noted, due=100.0)


def test_then_nothing_changes_and_dvc_does_nothing(repository):
    run(repository, "dvc", "status")  # the first look hashes files whose times the stages have touched
    begin = time.monotonic()
    done = run(repository, "dvc", "repro")
    took = time.monotonic() - begin
    assert done.returncode == 0 and "up to date" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("didn't change, skipping") == 6
    assert took < 3.0 * max(1.0, os.getloadavg()[0]), "a run that has nothing to do takes under 3 seconds"


def test_a_changed_setting_reruns_what_depends_on_it(repository):
    params = repository / "params.yaml"
    original = params.read_text()
    document = yaml.safe_load(original)
    document["workloads"]["tiny"]["closed_loop"]["iterations"] = 1
    params.write_text(yaml.safe_dump(document))
    changed = json.loads(run(repository, "dvc", "status", "--json").stdout)
    assert list(changed) == ["train_stage2"]
    document = yaml.safe_load(original)
    document["workloads"]["tiny"]["resources"] = {"device": "auto", "record": {"actors": 2}}
    params.write_text(yaml.safe_dump(document))
    assert json.loads(run(repository, "dvc", "status", "--json").stdout) == {}
    params.write_text(original)


def test_numbers_and_curves_are_known_to_dvc(repository):
    shown = json.loads(run(repository, "dvc", "metrics", "show", "--json").stdout)
    files = shown[""]["data"]
    assert files["data/metrics/tiny/decision.json"]["data"]["candidate"] == "2"
    assert "2x" in files["data/reports/tiny/metrics.json"]["data"]["budgets"]
    drawn = run(repository, "dvc", "plots", "show", "--out", "plots")
    assert drawn.returncode == 0, drawn.stderr
    page = (repository / "plots/index.html").read_text()
    assert all(name in page for name in ("psnr_vs_ratio", "train_stage1", "train_stage2"))


def test_bad_settings_stop_the_pipeline_before_anything_is_lost(repository):
    params = repository / "params.yaml"
    original = params.read_text()
    params.write_text(original.replace("iterations: 2", "iterationz: 2"))
    before = (repository / "dvc.lock").read_bytes()
    done = run(repository, "flows.train_stage2")
    assert done.returncode == 2
    assert "closed_loop.iterationz: unknown key" in done.stderr and "Traceback" not in done.stderr
    params.write_text(original)
    assert (repository / "dvc.lock").read_bytes() == before
    assert (repository / "data/checkpoints/tiny/closed_loop/weights.safetensors").is_file()


def add_prompt(repository: Path, prompt: str) -> None:
    folder = repository / "data/prompts/tiny"
    splits = {
        split: (folder / f"{split}.txt").read_text().splitlines() for split in ("train", "validation", "test")
    }
    splits["train"].append(prompt)
    write_prompts(repository, splits)
    params = yaml.safe_load((repository / "params.yaml").read_text())
    params["workloads"]["tiny"]["record"]["train_prompts"] = len(splits["train"])
    (repository / "params.yaml").write_text(yaml.safe_dump(params))
    commit(repository, "One more prompt")


def registered(repository: Path) -> dict[str, dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{repository}/mlflow.db")
    return {str(v.version): dict(v.tags) for v in client.search_model_versions("name = 'lesa-tiny'")}


def wait_for(log: Path, pattern: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not re.search(pattern, log.read_text(errors="replace")):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.5)
