"""What listens while everything of the project runs: loopback and nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.environment import ROOT, state_folder
from flows.processes import Process, descendants, end, identify

pytestmark = pytest.mark.slow

# Ray with work in its workers, the shared Prefect server, a sender, and the local server of the scheduled retraining.
SERVICES = """
import os, subprocess, sys, time
from pathlib import Path
from flows.environment import LOOPBACK
from flows.prefect_server import shared_server
from flows.ray_jobs import ray_session
from flows.retrain_local import child, local_environment, wait_for_server
from flows.tracking.sender import start_sender

folder, port = Path(sys.argv[1]), int(sys.argv[2])
home = folder / "local"
environment = local_environment(home, port)
command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
with (
    child(command, environment, folder / "server.log") as server,
    shared_server(folder / "shared"),
    ray_session(2) as ray,
):
    start_sender(folder)
    wait_for_server(server, environment, folder / "server.log")
    print(*ray.get([ray.remote(lambda: os.getpid()).remote() for _ in range(2)]), flush=True)
    time.sleep(600)
"""


def test_everything_listens_on_loopback_alone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    state_folder(tmp_path)
    mark = f"LESA_TEST_MARK={os.getpid()}-{tmp_path.name}"
    name, _, value = mark.partition("=")
    services = subprocess.Popen(
        [sys.executable, "-c", SERVICES, str(tmp_path), str(port)],
        cwd=ROOT, env={**os.environ, name: value}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    family: set[Process] = set()
    try:
        assert services.stdout is not None and services.stdout.readline().strip()
        ours = identify(services.pid)
        assert ours is not None
        expected = ("gcs_server", "raylet", "Agent", "flows.prefect_server serve", f":{port:04X} ")
        deadline, said = time.monotonic() + 60, ""
        while not all(service in said for service in expected):  # Ray's agents take a while
            assert time.monotonic() < deadline, said
            family = {ours, *descendants([ours]), *marked(mark)}
            said = "\n".join(f"{address} {command}" for address, command in listening(family).items())
            time.sleep(0.5)
        assert [line for line in said.splitlines() if not is_loopback(line.split(":")[0])] == []
    finally:
        end(family | marked(mark), patience_s=20)
        services.kill()
        services.communicate()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0100007F", True), ("00000000", False), ("020200C0", False), ("0" * 32, False), ("0" * 24 + "01000000", True),
        ("0" * 16 + "FFFF00000100007F", True), ("0" * 16 + "FFFF0000020200C0", False),
    ],
)  # fmt: skip
def test_addresses_as_the_kernel_writes_them(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def is_loopback(address: str) -> bool:
    """Whether an address in a table of the kernel's (words in hexadecimal, each turned round) is 127.* or ::1."""
    if len(address) == 8 or address.startswith("0" * 16 + "FFFF0000"):
        return address.endswith("7F")
    return address == "0" * 24 + "01000000"


def marked(mark: str) -> set[Process]:
    """Processes that inherited our mark: a service may have left the tree that started it."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                process = identify(int(entry.name))
                found |= {process} if process is not None else set()
    return found


def listening(family: set[Process]) -> dict[str, str]:
    """address:port -> command line, of every socket on which one of the processes listens."""
    owners: dict[str, str] = {}
    for process in family:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            command = " ".join(command.split())[:200]
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                target = os.readlink(link)
                if target.startswith("socket:["):
                    owners[target[8:-1]] = command
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:
                found[fields[1]] = owners[fields[9]]
    return found
