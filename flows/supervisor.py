"""A command that never outlives who started it, however that one ends.

Between the two stands a small process. It is the command's parent, so that the number of the command's process group
stays the command's; and it sees its standard input close, also where its own parent was killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.environment import ROOT
from flows.processes import group, send
from lesa.locks import Locked, file_lock

STOP_SECONDS = 30.0  # a stage closes its actors and notes its end
_LOOK_SECONDS = 0.2


def supervised(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], lock: Path
) -> subprocess.Popen[bytes]:
    """Starts a command under a supervisor and returns that one; its output, both streams, is a pipe.

    Args:
        lock: held while the command or any process of its group runs; the next one waits for it.

    Closing the supervisor's input stops the command: asked first, forced after STOP_SECONDS.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "flows.supervisor", str(folder), str(lock), *command],
        cwd=ROOT, env=dict(environment), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def main(folder: str, lock: str, *command: str) -> int:
    """Runs the command until it ends or standard input closes; its exit code, 128 + the signal that ended it."""
    try:
        with file_lock(lock, timeout=STOP_SECONDS + 10.0):
            process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, start_new_session=True)
            while not _has_ended(process.pid):
                if select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:  # nothing is ever written to it
                    _stop(process.pid)
                    break
            code = process.wait()
    except Locked as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code if code >= 0 else 128 - code


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _stop(leader: int) -> None:
    """Ends the command's group. Its leader is not reaped yet, so the group is still the command's."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while group(leader) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    for process in group(leader):
        send(process, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
