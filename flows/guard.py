"""Ends what a driver that was killed leaves of its Ray session.

Ray's workers go with the driver within seconds, but its agents keep trying to reach it for a minute, and a
stopped worker stays for ever. A small process of its own outlives the driver, sees its end of a pipe close
and ends the rest. Run as a script it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "LESA_RAY_SESSION"  # environment variable that every process of one session inherits
GRACE_S = 4.0  # what Ray takes to end by itself
SETTLE_S = 1.0  # without a process in sight for so long, the session is over


@contextlib.contextmanager
def no_orphans() -> Iterator[None]:
    """Ray started inside the block outlives this process by some seconds at most, however it ends."""
    token = secrets.token_hex(16)
    guard = subprocess.Popen(
        [sys.executable, "-I", __file__, token],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C or a kill of our process group is not meant for it
    )
    assert guard.stdin is not None
    previous = os.environ.get(MARK)
    os.environ[MARK] = token
    try:
        yield
    finally:
        if previous is None:
            os.environ.pop(MARK, None)
        else:
            os.environ[MARK] = previous
        guard.stdin.close()
        guard.wait()


def session_processes(token: str) -> list[int]:
    """Ray's processes that inherited the token; never a process of another session or of another kind."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to read
            if f"{MARK}={token}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            if b"ray" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def main(token: str) -> None:
    """Wait for the driver's end, give Ray its time, end what is left."""
    sys.stdin.buffer.read()
    ended = quiet_since = time.monotonic()
    # Quiet for a while and not just once: a process between fork and exec is not to be seen for a moment.
    while time.monotonic() - quiet_since < SETTLE_S:
        left = session_processes(token)
        if left:
            quiet_since = time.monotonic()
        if time.monotonic() - ended > GRACE_S:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
