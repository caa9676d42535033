"""Signs of life of jobs, as their driver reads them; no Ray needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import job_signs
from flows.environment import ROOT
from flows.job_signs import Watch, signs_of_life

JOB = """
import sys, time
from pathlib import Path
from flows import job_signs
job_signs.BEAT_SECONDS = 0.05
with job_signs.signs_of_life(Path(sys.argv[1]), lambda step, values: None) as report:
    for step in range(1000000):
        if sys.argv[2] == "reports":
            report(step, {})
        time.sleep(0.05)
"""


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch("train x", ["a", "b"], timeout_s=1000.0)
    yield watch
    watch.close()


@pytest.fixture
def job(watch: Watch) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", JOB, str(watch.path("a")), "reports"], cwd=ROOT)
    look_until(watch, lambda: "a" in watch._seen)
    yield process
    process.kill()
    process.wait()


def look_until(watch: Watch, condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        watch.look(["a", "b"])
        time.sleep(0.05)


def test_a_job_that_reports_is_left_alone(watch: Watch, job: subprocess.Popen[bytes]) -> None:
    before = watch._seen["a"].reports
    look_until(watch, lambda: watch._seen["a"].reports > before + 3)
    assert job.poll() is None and watch.reasons == {} and "b" not in watch._seen


def test_a_stopped_process_is_found_and_ended(
    watch: Watch, job: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_signs, "SILENT_SECONDS", 1.0)
    job.send_signal(signal.SIGSTOP)
    look_until(watch, lambda: "a" in watch.reasons)
    assert job.wait() == -signal.SIGKILL
    assert "no sign of life" in watch.reasons["a"] and f"process {job.pid} is replaced" in capsys.readouterr().out


def test_a_job_that_reports_nothing_any_more_is_ended(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    watch._timeout_s = 1.0
    with subprocess.Popen([sys.executable, "-c", JOB, str(watch.path("b")), "silent"], cwd=ROOT) as job:
        look_until(watch, lambda: "b" in watch.reasons)
        assert job.wait() == -signal.SIGKILL
    assert "nothing reported" in watch.reasons["b"]


def test_the_screen_says_who_is_late(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_signs, "SHOW_SECONDS", (0.2, 0.2))
    watch._pause = 0.2
    with signs_of_life(watch.path("a"), lambda step, values: None):
        look_until(watch, lambda: "0 of 2 done; at work: a for 0 min" in capsys.readouterr().out)


def test_a_file_of_another_process_ends_nobody(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands there is not the process that has the number now."""
    monkeypatch.setattr(job_signs, "SILENT_SECONDS", 0.0)
    watch.path("a").write_text(f'[{os.getpid()}, "gone:1", 1, 0]')
    look_until(watch, lambda: "a" in watch.reasons)
    for broken in ("", "[]", "{}", "null"):
        watch.path("a").write_text(broken)
        watch.look(["a"])


def test_signs_end_with_their_job(watch: Watch) -> None:
    with signs_of_life(watch.path("a"), lambda step, values: None) as report:
        report(1, {"loss": 0.5})
    assert not watch.path("a").exists()
    assert list(Path(watch._folder.name).iterdir()) == []
