"""Locks between processes, and whether a process is alive.

All are `flock`: the kernel drops one when its last descriptor is closed, so none outlives its process.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02  # between two tries of who waits for a lock


class Locked(RuntimeError):
    """Somebody else holds the lock; `.pid` is the holder's process, None if it could not be read."""

    def __init__(self, path: Path, pid: int | None):
        self.path, self.pid = path, pid
        holder = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"{path} is held by {holder}; wait for it to end, or end it, and try again")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.pid)


def process_alive(pid: int, *, since: float | None = None) -> bool:
    """Whether process `pid` runs; with `since` (seconds of the epoch), whether it ran then already.

    A number that was given to a new process after `since` counts as dead, and so does a zombie.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except (FileNotFoundError, ProcessLookupError):  # the latter: it ended between opening and reading
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
def file_lock(path: str | Path, timeout: float = 0.0, *, mode: int = 0o666) -> Iterator[None]:
    """Hold `path` as an exclusive lock with our pid inside; the file is removed at the end.

    A file left by a dead process is simply taken over.

    Args:
        timeout: seconds to wait for the holder; infinity waits as long as it takes.
        mode: of a file that is made, less the umask; 0o600 where another user must not be able to hold the lock.

    Raises:
        Locked: naming the holder, who still has it after `timeout`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    while (descriptor := _try_lock(path, mode)) is None:
        if time.monotonic() >= deadline:
            raise Locked(path, _holder(path))
        time.sleep(_POLL_SECONDS)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def shared_lock(path: str | Path) -> Iterator[None]:
    """One of many that hold `path` at the same time, private to this user; the file stays.

    `is_free(path, shared=True)` tells whether the last of them is gone.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def new_locked_file(path: str | Path) -> int:
    """Make an empty file that is private to this user and nobody ever sees unlocked.

    Returns:
        The descriptor that holds the exclusive lock: it lasts until this is closed, or until the process ends.
    """
    path = Path(path)
    aside = path.with_suffix(".new")  # locked first, then brought to its name
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(aside, path)
    return descriptor


def is_free(path: str | Path, *, shared: bool = False) -> bool:
    """Whether nobody holds the lock on `path`; also where there is no such file.

    Args:
        shared: the lock is a `shared_lock`. Only an exclusive attempt tells whether it is held, so that of two
            processes that ask at the same moment one may hear "held".
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if shared else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _try_lock(path: Path, mode: int) -> int | None:
    """The descriptor that holds `path` exclusively; None while somebody else does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        try:  # the last holder removes the file: what we locked may no longer be what the name points to
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _holder(path: Path) -> int | None:
    try:
        content = path.read_text(errors="replace")[:32].strip()
    except OSError:  # released this moment
        return None
    return int(content) if content.isdecimal() else None
