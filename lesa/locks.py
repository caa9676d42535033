"""Locks between processes: an exclusive file lock that names its holder, and whether a process is alive."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Locked(RuntimeError):
    """Somebody else holds the lock; `.pid` is the holder's process, None if it could not be read."""

    def __init__(self, path: Path, pid: int | None):
        self.path, self.pid = path, pid
        holder = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"{path} is held by {holder}; wait for it to end, or end it, and try again")


def process_alive(pid: int, *, since: float | None = None) -> bool:
    """Whether process `pid` runs; with `since` (seconds of the epoch), whether it ran then already.

    A number that was given to a new process after `since` counts as dead, and so does a zombie.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
        try:  # no /proc (macOS): the start is unknown, so a reused number counts as alive, the careful answer
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    fields = text.rpartition(")")[2].split()  # after the name, which may hold spaces
    if fields[0] in ("Z", "X"):
        return False
    started = int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return since is None or started <= since + 2.0  # two seconds: the boot time is rounded


@contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Hold `path` as an exclusive lock with our pid inside; `Locked` names the holder if it is taken.

    The kernel drops the lock with its process, so one left by a dead process is simply taken over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = os.pread(descriptor, 32, 0).strip()
            os.close(descriptor)
            raise Locked(path, int(content) if content.isdigit() else None) from None
        try:  # the last holder removes the file: what we locked may no longer be what the name points to
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def waiting_lock(path: Path, seconds: float = 60.0) -> Iterator[None]:
    """`lesa.locks.file_lock`, waiting up to `seconds` for the holder; then its Locked error is raised."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(file_lock(path))
                break
            except Locked:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        yield
