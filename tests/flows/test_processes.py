"""A process is ended only where it is proved to be ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import prefect_server
from flows.processes import Process, descendants, end, group, identify, is_running, send

SLEEP = "import sys, time; print('ready', flush=True); time.sleep(100)"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python with a script, waits for its first line; everything is ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(script: str = SLEEP, *arguments: str, **options: bool) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, **options
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def known(process: subprocess.Popen[str]) -> Process:
    found = identify(process.pid)
    assert found is not None
    return found


def test_a_process_is_known_by_its_start(start) -> None:
    process = start()
    ours = known(process)
    assert is_running(ours) and ours == identify(process.pid) and ours != identify(os.getpid())
    stranger = ours._replace(start=ours.start[:-1] + ("0" if ours.start[-1] != "0" else "1"))  # who had it before
    rebooted = ours._replace(start="another-boot" + ours.start[ours.start.index(":") :])
    for other in (stranger, rebooted):
        assert not is_running(other) and not send(other, signal.SIGKILL)
    assert process.poll() is None
    assert send(ours, signal.SIGKILL)
    process.wait()
    assert not is_running(ours) and not send(ours, signal.SIGKILL)


def test_the_whole_family_ends_and_nobody_else(start) -> None:
    stubborn = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "signal.pause()\n"
    )
    parent, neighbour = start(stubborn), start()
    ours = known(parent)
    (child,) = descendants([ours])
    end([ours], patience_s=0.5)
    assert not is_running(ours) and not is_running(child)
    assert parent.wait() == -signal.SIGKILL and neighbour.poll() is None


def test_a_group_is_who_runs_in_it(start) -> None:
    leader = start(start_new_session=True)
    assert group(leader.pid) == {known(leader)}
    leader.kill()
    deadline = time.monotonic() + 10
    while group(leader.pid):
        assert time.monotonic() < deadline
    assert leader.wait() == -signal.SIGKILL


@pytest.mark.parametrize("fields", ["of the stranger's start", "of another start", "without a start"])
def test_a_stale_file_does_not_cost_a_stranger_its_life(start, tmp_path: Path, fields: str) -> None:
    """The number of a server that is gone belongs to somebody else's process now."""
    stranger = start()
    document = {
        "pid": stranger.pid,
        "start": known(stranger).start if fields == "of the stranger's start" else "gone:1",
        "url": "http://127.0.0.1:9/api",
        "auth": "lesa:x",
    }
    if fields == "without a start":
        del document["start"]
    (tmp_path / "server.json").write_text(json.dumps(document))
    assert prefect_server.read(tmp_path) is None
    assert not prefect_server.stop(tmp_path)
    server = prefect_server.Server(**{"start": "", **document})
    for number in (signal.SIGTERM, signal.SIGKILL):
        prefect_server._signal(server, number)
    time.sleep(0.2)
    assert stranger.poll() is None
