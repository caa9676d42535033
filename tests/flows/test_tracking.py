"""A run reaches MLflow through its spool, once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.environment import ROOT, state_folder
from flows.tracking import run as tracking
from flows.tracking import sender
from flows.tracking.client import connect, experiment_id, tracking_uri
from flows.tracking.run import Reporter, Tracker, flatten, tracked_run


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A repository root whose database exists: making one takes seconds."""
    folder = tmp_path_factory.mktemp("root")
    experiment_id(connect(folder), "lesa-x", folder)
    return folder


@pytest.fixture
def no_sender(monkeypatch):
    """The test sends by itself."""
    monkeypatch.setattr(tracking, "start_sender", lambda root: None)


def run_of(root: Path, spool_id: str):
    client = connect(root)
    experiment = client.get_experiment_by_name("lesa-x").experiment_id
    runs = client.search_runs([experiment], filter_string=f"tags.`lesa.spool` = '{spool_id}'")
    assert len(runs) == 1
    return client, runs[0]


def begin(root: Path, **params) -> Tracker:
    return Tracker("stage x", experiment="lesa-x", params=params, tags={"git": "abc"}, root=root)


@pytest.mark.slow
def test_a_run_arrives_with_params_tags_and_points(root, monkeypatch):
    monkeypatch.setattr(tracking, "DRAIN_SECONDS", 60.0)
    with tracked_run(
        "stage x", experiment="lesa-x", params={"a.b": 1}, tags={"git": "abc"}, root=root
    ) as run:
        for step in range(1200):
            run.report(step, {"loss": 1 / (step + 1), "odd name(1)": step})
        run.tag({"decision": "kept"})
    assert not run.reporter.path.exists()
    client, found = run_of(root, run.spool_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"a.b": "1"}
    assert found.data.tags["git"] == "abc" and found.data.tags["decision"] == "kept"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1200))
    assert found.data.metrics["odd name_1_"] == 1199
    artifacts = (root / "mlartifacts").as_uri()
    assert found.info.artifact_uri.startswith(artifacts)


def test_sending_twice_doubles_nothing(root, no_sender):
    run = begin(root, rate=0.1)
    for step in range(50):
        run.report(step, {"loss": float(step)})
    path, copy = run.reporter.path, run.reporter.path.read_bytes()
    assert sender.send_all(root) == 1  # still open: sent and kept
    path.with_suffix(".sent").unlink()  # as if the sender had been killed before it noted its progress
    run.report(50, {"loss": 50.0})
    run.close("FINISHED", drain_seconds=0)
    assert sender.send_all(root) == 0
    path.write_bytes(copy)  # the whole spool once more, from a backup say
    assert sender.send_all(root) == 0
    client, found = run_of(root, run.spool_id)
    points = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(i, float(i)) for i in range(51)]


def test_a_failed_run_says_so(root, no_sender):
    with (
        pytest.raises(RuntimeError, match="no convergence"),
        tracked_run("stage x", experiment="lesa-x", params={}, tags={}, root=root) as run,
    ):
        tracking_close = run.close
        run.close = lambda status: tracking_close(status, drain_seconds=0)
        raise RuntimeError("no convergence")
    sender.send_all(root)
    assert run_of(root, run.spool_id)[1].info.status == "FAILED"


def test_a_killed_run_is_closed_for_it_and_half_a_line_is_left_out(root, no_sender):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from flows.tracking import run as tracking\n"
        "tracking.start_sender = lambda root: None\n"
        "run = tracking.Tracker('stage x', experiment='lesa-x', params={}, tags={}, root=Path(sys.argv[1]))\n"
        "run.report(0, {'loss': 1.0})\n"
        "open(run.reporter.path, 'a').write('{\"kind\": \"val')\n"
        "print(run.spool_id, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -9
    spool_id = done.stdout.split()[-1]
    assert sender.send_all(root) == 0
    _, found = run_of(root, spool_id)
    assert found.info.status == "KILLED" and found.data.metrics == {"loss": 1.0}


def test_nan_is_a_point_and_text_is_refused(root, no_sender):
    run = begin(root)
    run.report(0, {"loss": float("nan")})
    with pytest.raises(ValueError, match="could not convert"):
        run.report(1, {"loss": "high"})  # type: ignore[dict-item]
    run.close("FINISHED", drain_seconds=0)
    assert sender.send_all(root) == 0
    client, found = run_of(root, run.spool_id)
    assert len(client.get_metric_history(found.info.run_id, "loss")) == 1


def test_parts_of_a_run_write_side_by_side(root, no_sender):
    import pickle

    run = begin(root)
    parts = [pickle.loads(pickle.dumps(run.reporter.child(f"stage{i}"))) for i in range(3)]  # noqa: S301
    for step in range(20):
        for part in parts:
            part.report(step, {"loss": step})
    names = {
        key
        for line in run.reporter.path.read_text().splitlines()
        for key in json.loads(line).get("values", {})
    }
    assert names == {"stage0/loss", "stage1/loss", "stage2/loss"}
    run.close("FINISHED", drain_seconds=0)
    run.reporter.path.unlink()


def test_a_spool_that_cannot_be_written_does_not_stop_the_work(tmp_path, caplog):
    reporter = Reporter(path=tmp_path / "gone" / "x.jsonl", name="x")
    reporter.report(0, {"loss": 1.0})
    reporter.report(1, {"loss": 1.0})
    assert caplog.text.count("no longer tracked") == 1
    full = Reporter(path=Path("/dev/full"), name="x")
    full.report(0, {"loss": 1.0})
    assert full.broken and "No space left" in caplog.text


def test_state_is_private(tmp_path, no_sender):
    run = begin(tmp_path)
    assert state_folder(tmp_path).stat().st_mode & 0o077 == 0
    assert run.reporter.path.stat().st_mode & 0o077 == 0
    run.close("FINISHED", drain_seconds=0)


def test_where_mlflow_is(tmp_path, monkeypatch):
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(tmp_path) == "http://127.0.0.1:5000"


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": (1, 2)}}, "e": None}) == {"a.b": 1, "a.c.d": (1, 2), "e": None}


def test_reporting_is_cheap(tmp_path, no_sender):
    run = begin(tmp_path)
    start = time.perf_counter()
    for step in range(1000):
        run.report(step, {"loss": 1.0, "rate": 0.1})
    assert (time.perf_counter() - start) / 1000 < 2e-3
    run.close("FINISHED", drain_seconds=0)
    assert os.environ.get("MLFLOW_TRACKING_URI") is None
