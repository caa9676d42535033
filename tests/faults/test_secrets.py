"""Secrets planted in the environment of real stages, good and failing: none is in anything that they write or say."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.test_retrain import FIRST_RUN
from tests.helpers.canaries import CANARIES, IN_ADDRESS, spellings, sweep
from tests.helpers.clone import clone, environment, run

# What a stage meets whose registry is down, and a job that tells all it knows, in a process of Ray's.
FAILING = """
import os, sys
from prefect import get_run_logger
from flows.prefect_flow import flow, task
from flows.ray_jobs import run_jobs
from flows.registry.registry import Registry
from flows.stage import read_workload, stage_main, stage_run
from flows.tracking.run import Reporter
from lesa.params import WorkerResources

def tell(workload, job, report):
    raise RuntimeError(f"the job was given {dict(os.environ)}")

@task(name="work")
def work(workload):
    with stage_run("failing", workload, ("seed",)) as tracked:
        tracked.report(1, {"loss": 1.0})
        if os.environ["HOW"] == "registry":
            get_run_logger().info("asking %s", os.environ["MLFLOW_TRACKING_URI"])
            Registry("lesa-tiny").alias("champion")
        run_jobs(tell, workload, {"a": 1, "b": 2}, share=WorkerResources(workers=2), reporter=tracked.reporter)

@flow(name="failing")
def failing(workload: str | None = None) -> dict:
    "A stage that fails."
    return work(read_workload(workload))

if __name__ == "__main__":
    raise SystemExit(stage_main(failing))
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="lr-"))  # short: Ray's sockets lie in it
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
@pytest.mark.timeout(900)  # every stage of a tiny workload, two of them twice
def test_no_canary_is_written_or_said_by_any_stage(tmp_path: Path, ray_folder: Path) -> None:
    repository = clone(tmp_path / "clone")
    (repository / "failing.py").write_text(FAILING)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        down = f"http://user:{IN_ADDRESS}@127.0.0.1:{probe.getsockname()[1]}"
    ray = {"RAY_TMPDIR": str(ray_folder)}
    said: dict[str, str] = {}
    try:
        first = subprocess.run(
            [sys.executable, "-c", FIRST_RUN], cwd=repository, env=environment(**CANARIES),
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert "FIRST 1" in first.stdout, first.stdout + first.stderr
        said["first"] = first.stdout + first.stderr
        recorded = run(repository, "dvc", "repro", "record", **CANARIES, **ray)
        assert recorded.returncode == 0, recorded.stdout + recorded.stderr
        said["record"] = recorded.stdout + recorded.stderr
        for how, shown in (("registry", "***@127.0.0.1"), ("job", "'HF_TOKEN': '***'")):
            failed = run(repository, "failing", HOW=how, MLFLOW_TRACKING_URI=down, **CANARIES, **ray)
            assert failed.returncode == 1 and shown in failed.stderr, failed.stderr
            said[how] = failed.stdout + failed.stderr
    finally:
        run(repository, "flows.prefect_server", "stop")
    for part, text in said.items():
        assert [canary for canary in spellings() if canary in text.encode()] == [], part
    for written in ("dvc.lock", "mlflow.db", ".prefect/prefect.db", "data/bundles/tiny/manifest.json"):
        assert (repository / written).is_file(), written
    recorded_by_prefect = b"".join(path.read_bytes() for path in (repository / ".prefect").glob("prefect.db*"))
    assert b"***@127.0.0.1" in recorded_by_prefect, "the failed runs are not there"
    assert list((repository / ".lesa").glob("*.jsonl")) and list(ray_folder.rglob("*.log"))
    assert sweep(repository) + sweep(ray_folder) == []


def test_the_sweep_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0\1" + CANARIES["HF_TOKEN"].encode() + b"\2")
    (tmp_path / "b").write_text(b64encode(b"admin:canary-prefect-4").decode())
    (tmp_path / "c").write_text("canary%2Baws%2F2")
    (tmp_path / "d").write_text("harmless canary")
    assert {line.partition(" ")[0] for line in sweep(tmp_path)} == {"a", "b", "c"}
