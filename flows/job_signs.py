"""Signs of life of jobs in other processes: who is at work, who is late, and who has to be replaced.

A job's process writes a small file each second: which process it is, how often it has written, how often the job has
reported. The driver compares what it reads with what it read before, by its own clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from flows.processes import Process, identify, send

BEAT_SECONDS = 1.0
SILENT_SECONDS = 300.0  # a process that has not written for so long is stopped, or hangs where it lets no thread run
SHOW_SECONDS = (60.0, 900.0)  # without a report: when that is first shown, and the longest pause between two times


class Sign(NamedTuple):
    """What a job's process has last written."""

    pid: int
    start: str
    beats: int
    reports: int


Report = Callable[[int, Mapping[str, float]], None]


@contextlib.contextmanager
def signs_of_life(path: Path, report: Report) -> Iterator[Report]:
    """Writes the signs of a job for the block; yields a report function that counts."""
    process = identify(os.getpid())
    if process is None:  # a system that does not tell processes apart: nothing could be ended by a sign
        yield report
        return
    done, reports = threading.Event(), 0

    def counted(step: int, values: Mapping[str, float]) -> None:
        nonlocal reports
        reports += 1
        report(step, values)

    aside = path.with_suffix(f".{process.pid}")

    def write(beats: int) -> None:
        with contextlib.suppress(OSError):  # the driver is gone, or its disk is full: the work goes on
            aside.write_text(json.dumps(Sign(*process, beats, reports)))
            os.replace(aside, path)

    def beat() -> None:
        beats = 0
        while not done.wait(BEAT_SECONDS):
            beats += 1
            write(beats)

    write(0)  # before the work: what stops at once must have been seen
    thread = threading.Thread(target=beat, daemon=True, name="signs of life")
    thread.start()
    try:
        yield counted
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


@dataclasses.dataclass(slots=True)
class _Seen:
    """What the driver knows of a job that has begun; moments are seconds of time.monotonic."""

    process: Process
    beats: int
    reports: int
    begun: float
    beaten: float
    reported: float


class Watch:
    """The driver's view of several jobs.

    Args:
        title: what the lines on the screen begin with.
        names: of the jobs.
        timeout_s: seconds without a report after which a job's process is ended.
    """

    def __init__(self, title: str, names: Iterable[str], timeout_s: float) -> None:
        self._title, self._timeout_s = title, timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="lesa-jobs-")  # private to this user
        self._paths = {name: Path(self._folder.name) / f"{index}.json" for index, name in enumerate(names)}
        self._seen: dict[str, _Seen] = {}
        self._pause, self._shown = SHOW_SECONDS[0], time.monotonic()
        self.reasons: dict[str, str] = {}  # why a job's process was last ended

    def path(self, name: str) -> Path:
        """The file of a job's signs."""
        return self._paths[name]

    def close(self) -> None:
        self._folder.cleanup()

    def look(self, open_jobs: Iterable[str]) -> None:
        """Reads all signs, shows who is late, ends the processes of jobs that hang; Ray gives those to others."""
        now, waiting = time.monotonic(), list(open_jobs)
        for name in waiting:
            self._read(name, now)
            seen = self._seen.get(name)
            if seen is None:
                continue
            problem = None
            if now - seen.beaten > SILENT_SECONDS:
                problem = f"no sign of life for {now - seen.beaten:.0f} s"
            elif now - seen.reported > self._timeout_s:
                problem = f"nothing reported for {now - seen.reported:.0f} s"
            if problem is not None:
                self.reasons[name] = problem
                print(f"{self._title} {name}: {problem}: process {seen.process.pid} is replaced", flush=True)
                send(seen.process, signal.SIGKILL)
                del self._seen[name]
                self._paths[name].unlink(missing_ok=True)
        self._show(now, waiting)

    def _read(self, name: str, now: float) -> None:
        try:
            sign = Sign(*json.loads(self._paths[name].read_text()))
        except (OSError, ValueError, TypeError):  # not begun, or ended
            return
        process, seen = Process(sign.pid, sign.start), self._seen.get(name)
        if seen is None or seen.process != process:
            self._seen[name] = _Seen(process, sign.beats, sign.reports, now, now, now)
            return
        if sign.beats != seen.beats:
            seen.beats, seen.beaten = sign.beats, now
        if sign.reports != seen.reports:
            seen.reports, seen.reported = sign.reports, now

    def _show(self, now: float, waiting: list[str]) -> None:
        at_work = {name: seen for name, seen in self._seen.items() if name in waiting}
        if now - self._shown < self._pause or not any(now - s.reported >= SHOW_SECONDS[0] for s in at_work.values()):
            return
        self._shown, self._pause = now, min(2 * self._pause, SHOW_SECONDS[1])
        parts = []
        for name, seen in at_work.items():
            silent = f", silent for {now - seen.beaten:.0f} s" if now - seen.beaten > 10 * BEAT_SECONDS else ""
            last = f", last report {(now - seen.reported) / 60:.0f} min ago" if seen.reports else ""
            parts.append(f"{name} for {(now - seen.begun) / 60:.0f} min{last}{silent}")
        done = len(self._paths) - len(waiting)
        print(f"{self._title}: {done} of {len(self._paths)} done; at work: {'; '.join(parts)}", flush=True)
