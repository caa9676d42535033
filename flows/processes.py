"""Processes that are ours to end: known by their start as well as by their number, which the kernel gives away again.

Imported by scripts that run with nothing but the standard library: it imports nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One process and no other."""

    pid: int
    start: str  # of which boot of the machine, and in ticks since it


def identify(pid: int) -> Process | None:
    """The process that has this number now; None where there is none, or where /proc does not tell its start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # after a name with spaces
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else Process(pid, f"{boot}:{fields[19]}")


def is_running(process: Process) -> bool:
    """Whether this very process runs; a zombie does not."""
    return identify(process.pid) == process


def command_line(process: Process) -> list[str]:
    """Its arguments; empty where it cannot be read."""
    try:
        return os.fsdecode(Path(f"/proc/{process.pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def send(process: Process, number: int) -> bool:
    """Sends a signal to this very process, never to one that took over its number; False where it is gone."""
    try:
        handle = os.pidfd_open(process.pid)  # stays this one's whatever becomes of the number
    except OSError:
        return False
    try:
        if not is_running(process):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def end(processes: Iterable[Process], *, patience_s: float) -> None:
    """Ends processes and their descendants: asked first, forced after `patience_s`."""
    family = set(processes)
    for number, seconds in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 5.0)):
        family |= descendants(family)
        for process in family:
            send(process, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            family = {process for process in family | descendants(family) if is_running(process)}
            if not family:
                return
            time.sleep(0.1)


def group(leader: int) -> set[Process]:
    """The running processes of a process group."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                process = identify(int(entry.name))
                found |= {process} if process is not None else set()
    return found


def descendants(above: Iterable[Process]) -> set[Process]:
    """All processes below those, as they are now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found: set[Process] = set()
    waiting = [process.pid for process in above if is_running(process)]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            process = identify(pid)
            if process is not None and process not in found:
                found.add(process)
                waiting.append(pid)
    return found
