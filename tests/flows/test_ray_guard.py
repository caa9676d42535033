"""What a killed driver leaves of Ray goes within seconds, agents that hide their environment included."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.environment import ROOT
from flows.ray_guard import session_processes

DRIVER = """
import time
from flows.ray_jobs import ray_session
with ray_session(1) as ray:
    ray.get(ray.remote(lambda: 1).remote())
    print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_nothing_of_a_killed_session_is_left(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        folder = driver.stdout.readline().strip() + "/"
        assert folder.startswith("/")
        deadline = time.monotonic() + 30
        while len(titles := _titles(folder, driver.pid)) < 5 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert any("Agent" in title for title in titles), titles
    finally:
        driver.kill()
        driver.wait()
    deadline = time.monotonic() + 20
    while session_processes("", [folder], 0) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _titles(folder, 0) == []


def _titles(folder: str, driver: int) -> list[str]:
    found = session_processes("", [folder], driver)
    return [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode() for pid in found]
