"""DVC as a child process: which file, what its output looks like, one at a time, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.environment import ROOT, state_folder
from flows.processes import descendants, identify, is_running, send
from flows.repro import dvc_repro, dvc_target, printable, require_model
from lesa.errors import LesaError
from lesa.locks import Locked, file_lock
from tests.helpers.clone import git


@pytest.fixture
def repository(tmp_path) -> Path:
    """A DVC repository with one stage."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (tmp_path / "work.py").write_text("import sys; print('working', sys.executable, flush=True)\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  work:\n    cmd: python work.py\n    deps: [work.py]\n")
    return tmp_path


def test_every_workload_has_its_target(tmp_path):
    assert dvc_target("flux-digits", "flux-digits", tmp_path) == "dvc.yaml"
    file = tmp_path / "data/workloads/dvc.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("vars:\n  - local: {mine: {}}\n  - hub: {theirs: {}}\n")
    assert dvc_target("mine", "flux-digits", tmp_path) == "data/workloads/dvc.yaml:publish@mine"
    assert dvc_target("theirs", "flux-digits", tmp_path) == "data/workloads/dvc.yaml:publish-hub@theirs"
    with pytest.raises(LesaError, match=r"add a line to data/workloads/dvc\.yaml, under `given`"):
        dvc_target("other", "flux-digits", tmp_path)


def test_a_workload_whose_folder_is_not_there_is_told_where_to_put_it(tmp_path):
    (tmp_path / "data/workloads").mkdir(parents=True)
    line = "{family: flux, prompts: mine, model: my-model}"
    (tmp_path / "data/workloads/dvc.yaml").write_text(f"vars:\n  - given: {{mine: {line}}}\n  - hub: {{}}\n")
    with pytest.raises(LesaError, match=r"data/base/my-model is not here: copy .*\(ln -s /.* data/base/my-model\)"):
        require_model("mine", tmp_path)
    require_model("another", tmp_path)
    (tmp_path / "data/base/my-model").mkdir(parents=True)
    require_model("mine", tmp_path)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("plain\n", "plain"),
        ("  10%\r 50%\r100%\n", "100%"),
        ("red \x1b[1;31malarm\x1b[0m\x07\n", "red alarm\\x07"),
        ("up \x1b[2A\n", "up \\x1b[2A"),
        ("tab\there\n", "tab\there"),
    ],
)
def test_output_is_made_fit_for_a_log(line, shown):
    assert printable(line) == shown


@pytest.mark.slow
def test_stages_run_on_the_python_that_runs_us(repository, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    lines: list[str] = []
    assert dvc_repro("dvc.yaml", lines.append, repository) == 0
    (working,) = [line for line in lines if line.startswith("working")]
    assert Path(working.split()[1]).parent == Path(sys.executable).parent
    lines.clear()
    assert dvc_repro("dvc.yaml", lines.append, repository) == 0
    assert any("didn't change" in line for line in lines)


@pytest.mark.slow
def test_a_failing_stage_is_dvcs_exit_code(repository):
    (repository / "work.py").write_text("raise SystemExit(3)\n")
    lines: list[str] = []
    assert dvc_repro("dvc.yaml", lines.append, repository) != 0
    assert any("exited with 3" in line for line in lines)


def test_one_at_a_time(repository):
    with file_lock(state_folder(repository) / "repro.lock"), pytest.raises(Locked, match=str(os.getpid())):
        dvc_repro("dvc.yaml", root=repository)


# A stage that works for long and, asked to end, takes a moment to put its things away.
STAGE = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(1)
    Path("put-away").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("working", flush=True)
time.sleep(0 if Path("quick").exists() else 120)
"""
ASKER = """
import signal, sys, threading
from pathlib import Path
from prefect._internal.concurrency.cancellation import WatcherThreadCancelScope
from flows.repro import dvc_repro
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
def show(line):
    print(line, flush=True)
    if line == "working" and sys.argv[2] == "lease":
        threading.Timer(1.0, scope.cancel).start()
with WatcherThreadCancelScope() as scope:  # what Prefect ends a run with that has lost its lease
    dvc_repro("dvc.yaml", show, Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["terminated", *(pytest.param(how, marks=pytest.mark.long) for how in ("killed", "lease"))]
)
def test_who_ends_takes_dvc_and_its_stage_along(repository, how):
    """They are asked, also where there is nobody left to ask them; the next one waits for them and goes on."""
    (repository / "work.py").write_text(STAGE)
    process = subprocess.Popen(
        [sys.executable, "-c", ASKER, str(repository), how], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("working"):
            break
    asker = identify(process.pid)
    assert asker is not None
    family = descendants([asker])
    assert len(family) >= 3
    try:
        if how == "terminated":
            process.terminate()
        elif how == "killed":
            process.kill()
        assert process.wait(60) != 0
        (repository / "quick").touch()
        lines: list[str] = []
        assert dvc_repro("dvc.yaml", lines.append, repository) == 0, lines
        assert "working" in lines
        assert (repository / "put-away").exists(), "the stage was killed before it could end"
        assert [one for one in family if is_running(one)] == []
    finally:
        for one in family:
            send(one, signal.SIGKILL)
        process.kill()
        process.communicate()
