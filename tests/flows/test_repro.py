"""DVC as a child process: which file, what its output looks like, one at a time, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.environment import ROOT, state_folder
from flows.repro import dvc_repro, dvc_target, printable
from flows.retrain_local import descendants
from lesa.errors import LesaError
from lesa.locks import Locked, file_lock, process_alive
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


@pytest.mark.slow
def test_an_interrupt_takes_dvc_and_its_stage_along(repository):
    (repository / "work.py").write_text("import time; print('working', flush=True); time.sleep(120)\n")
    script = (
        "import signal, sys\nfrom pathlib import Path\nfrom flows.repro import dvc_repro\n"
        "def stop(*_):\n    raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "dvc_repro('dvc.yaml', lambda line: print(line, flush=True), Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(repository)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("working"):
            break
    family = descendants(process.pid)
    assert len(family) >= 2
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert process.returncode != 0
    deadline = time.monotonic() + 5
    while any(process_alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in family if process_alive(pid)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == []
