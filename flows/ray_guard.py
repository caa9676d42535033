"""Ends what a driver that was killed leaves of its Ray session.

Ray's workers go with the driver within seconds, but its agents keep trying to reach it for a minute, and a
stopped worker stays for ever. A small process of its own outlives the driver, sees its end of a pipe close
and ends the rest. It imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flows.environment import ROOT
from flows.processes import Process, identify, send

MARK = "LESA_RAY_SESSION"  # environment variable that every process of one session inherits
GRACE_S = 4.0  # what Ray takes to end by itself
SETTLE_S = 1.0  # without a process in sight for so long, the session is over


@contextlib.contextmanager
def no_orphans() -> Iterator[Callable[[str], None]]:
    """Ray started inside the block outlives this process by some seconds at most, however it ends.

    Yields a function that takes the folder of the session, as soon as Ray has named it.
    """
    token = secrets.token_hex(16)
    guard = subprocess.Popen(
        [sys.executable, "-E", "-s", "-m", "flows.ray_guard", token, str(os.getpid())],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C or a kill of our process group is not meant for it
    )
    pipe = guard.stdin
    assert pipe is not None

    def session_is(folder: str) -> None:
        with contextlib.suppress(OSError):  # a guard that was killed must not end the work
            pipe.write(os.fsencode(folder) + b"\n")
            pipe.flush()

    previous = os.environ.get(MARK)
    os.environ[MARK] = token
    try:
        yield session_is
    finally:
        if previous is None:
            os.environ.pop(MARK, None)
        else:
            os.environ[MARK] = previous
        with contextlib.suppress(OSError):
            pipe.close()
        guard.wait()


def session_processes(token: str, folders: list[str], driver: Process) -> list[Process]:
    """The session's processes, the driver left out; never one of another session or of another kind.

    They are known by the token they inherited; of Ray's agents, some of which write their title over their environment,
    by that title, by a start after the driver's and by a file of the session's folder that they hold open.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to read
            process = identify(int(entry.name))
            if process is None or process == driver:
                continue
            if _inherited(entry, token) or (_is_agent(entry) and _later(process, driver) and _holds(entry, folders)):
                found.append(process)
    return found


def _later(process: Process, driver: Process) -> bool:
    (boot, ticks), (boot_of_driver, ticks_of_driver) = process.start.split(":"), driver.start.split(":")
    return boot == boot_of_driver and int(ticks) >= int(ticks_of_driver)


def _is_agent(entry: Path) -> bool:
    return (entry / "cmdline").read_bytes().startswith(b"ray::")


def _inherited(entry: Path, token: str) -> bool:
    if f"{MARK}={token}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
        return False
    # What the driver starts for other ends inherits the token too.
    words = (entry / "cmdline").read_bytes().split(b"\0")
    return any(b"ray/" in word or word.startswith((b"ray:", b"ray-")) for word in words)


def _holds(entry: Path, folders: list[str]) -> bool:
    for link in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(tuple(folders)):
                return True
    return False


def main(token: str, driver: int) -> None:
    """Wait for the driver's end, give Ray its time, end what is left."""
    started_by = identify(driver) or Process(driver, "none:0")  # it is our parent, unless it has ended already
    folders = [f"{os.fsdecode(line)}/" for line in sys.stdin.buffer.read().split(b"\n") if line]
    ended = quiet_since = time.monotonic()
    # Quiet for a while and not just once: a process between fork and exec is not to be seen for a moment.
    while time.monotonic() - quiet_since < SETTLE_S:
        left = session_processes(token, folders, started_by)
        if left:
            quiet_since = time.monotonic()
        if time.monotonic() - ended > GRACE_S:
            for process in left:
                send(process, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
