"""Quiet environment, one server for several flows, exit codes of stages, Ray on loopback with a token."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import prefect_server as server
from flows.environment import ROOT, quiet_environment
from flows.stage import billed, metrics_folder, read_bills, run_flow, stage_main
from lesa.errors import LesaError
from lesa.locks import process_alive
from lesa.models.bill import Bill, charge
from lesa.params_file import load_params
from tests.helpers.tiny import tiny_repository

STAGE = """
import sys
from flows.prefect_flow import flow, task
from flows.stage import stage_main
from lesa.errors import LesaError

@task(name="add")
def add(a, b):
    return a + b

@flow(name="tiny")
def tiny(workload: str | None = None) -> dict:
    "A tiny stage."
    if workload == "bad":
        raise LesaError("workloads.bad: unknown")
    if workload == "crash":
        raise RuntimeError("broken inside")
    if workload == "bug":
        import json
        json.loads("{")  # a ValueError, but not one that we raise
    if workload == "slow":
        import time
        print("working", flush=True)
        time.sleep(60)
    return {"sum": add(1, 2)}

if __name__ == "__main__":
    raise SystemExit(stage_main(tiny, check=lambda name: None))
"""


def run_stage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "tiny.py"
    script.write_text(STAGE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_quiet_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    monkeypatch.delenv("DVC_NO_ANALYTICS", raising=False)
    quiet_environment()
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["DVC_NO_ANALYTICS"] == "1"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0", "Ray keeps to loopback"


@pytest.mark.slow
def test_stages_share_one_server_and_say_how_they_ended(tmp_path):
    done = run_stage(tmp_path)
    assert done.returncode == 0 and '"sum": 3' in done.stdout, done.stderr
    first = server.read(Path(os.environ["PREFECT_HOME"]))
    assert first is not None and first.url.startswith("http://127.0.0.1:")

    bad = run_stage(tmp_path, "--workload", "bad")
    assert bad.returncode == 2 and "error: workloads.bad: unknown" in bad.stderr
    assert "Traceback" not in bad.stderr
    bug = run_stage(tmp_path, "--workload", "bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr
    crash = run_stage(tmp_path, "--workload", "crash")
    assert crash.returncode == 1 and "broken inside" in crash.stderr
    assert server.read(Path(os.environ["PREFECT_HOME"])) == first


def test_bad_settings_are_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    from flows import stage

    def never(workload):
        "A stage."
        raise AssertionError("started")

    monkeypatch.setattr(stage, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("default_workload: x\nworkloads: {x: {sead: 1}}\n")
    assert stage_main(never, []) == 2
    message = capsys.readouterr().err
    assert "workloads.x.sead: unknown key" in message and "workloads.x.model: missing" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml"]


@pytest.mark.slow
def test_the_server_is_private(tmp_path):
    """Loopback only, a password, files of its user alone."""
    home = Path(os.environ["PREFECT_HOME"])
    with server.shared_server(home) as found:
        assert server.healthy(found.url, found.auth)
        assert not server.healthy(found.url, "lesa:wrong")
        assert found.auth not in repr(found)
        assert (home / "server.json").stat().st_mode & 0o077 == 0
        assert not (home / "server.lock").exists(), "nobody starts or stops it now"
        addresses = listening(found.pid)
        assert addresses and addresses <= {"0100007F"}, addresses  # 127.0.0.1 as the kernel writes it


@pytest.mark.slow
def test_an_idle_server_ends_and_a_killed_one_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 1.0)
    with server.shared_server(tmp_path) as first:
        os.kill(first.pid, signal.SIGKILL)
        os.waitpid(first.pid, 0)
    with server.shared_server(tmp_path) as second:
        assert second.pid != first.pid
        time.sleep(2.0)
        assert process_alive(second.pid)  # in use, so not idle
    wait_until(lambda: not process_alive(second.pid), 20)
    assert server.read(tmp_path) is None and not (tmp_path / "server.json").exists()


@pytest.mark.slow
def test_sigterm_ends_a_stage_with_143(tmp_path):
    script = tmp_path / "tiny.py"
    script.write_text(STAGE)
    process = subprocess.Popen(
        [sys.executable, str(script), "--workload", "slow"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "working" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "terminated" in errors


@pytest.mark.slow
def test_run_flow_returns_the_result_and_raises_the_error():
    from prefect import flow

    @flow
    def half(number: int) -> float:
        if number % 2:
            raise ValueError("odd")
        return number / 2

    assert run_flow(half, number=4) == 2
    with pytest.raises(ValueError, match="odd"):
        run_flow(half, number=3)
    assert "PREFECT_API_URL" not in os.environ


def listening(pid: int) -> set[str]:
    """Addresses (hexadecimal) on which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def test_a_bill_that_is_none_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_repository(tmp_path))
    workload = load_params()
    with billed("record", workload):
        charge(Bill(forwards=3.0, backwards=1.0))
    assert read_bills(workload) == {"record": {"forwards": 3.0, "backwards": 1.0}}
    (metrics_folder(workload) / "search_bill.json").write_text('{"forwards": 1.0}')
    with pytest.raises(LesaError, match="search_bill.json: not a stage's bill"):
        read_bills(workload)
