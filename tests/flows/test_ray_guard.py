"""What a killed driver leaves of Ray goes within seconds, agents that hide their environment included."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.environment import ROOT
from flows.processes import Process, identify
from flows.ray_guard import session_processes

DRIVER = """
import time
from flows.ray_jobs import ray_session
with ray_session(1) as ray:
    ray.get(ray.remote(lambda: 1).remote())
    print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
    time.sleep(100)
"""


# What somebody else looks at a log of the session with.
READER = "import sys, time; file = open(sys.argv[1]); print('ready', flush=True); time.sleep(100)"


@pytest.mark.slow
def test_nothing_of_a_killed_session_is_left_and_nobody_else_is_touched(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    reader = None
    try:
        assert driver.stdout is not None
        folder = driver.stdout.readline().strip() + "/"
        assert folder.startswith("/")
        ours = identify(driver.pid)
        assert ours is not None
        deadline = time.monotonic() + 90
        while len(titles := _titles(folder, ours)) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert any("Agent" in title for title in titles), titles
        command = [sys.executable, "-c", READER, f"{folder}logs/raylet.out"]
        reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert reader.stdout is not None and reader.stdout.readline()
        holding = _holding(folder)
        assert {driver.pid, reader.pid} < holding
        driver.kill()
        driver.wait()
        deadline = time.monotonic() + 120  # beside other tests
        while _holding(folder) != {reader.pid} and time.monotonic() < deadline:
            time.sleep(0.2)
        assert _holding(folder) == {reader.pid}
        assert reader.poll() is None
    finally:
        for process in filter(None, (driver, reader)):
            process.kill()
            process.communicate()


def _titles(folder: str, driver: Process) -> list[str]:
    found = session_processes("", [folder], driver)
    return [Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0].decode() for process in found]


def _holding(folder: str) -> set[int]:
    """Processes that have a file of the session open."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(link).startswith(folder) for link in (entry / "fd").iterdir()):
                found.add(int(entry.name))
    return found
