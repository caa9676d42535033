"""Logging to MLflow that can neither stop nor slow a training.

A run appends its events to a local spool file and nothing else. A sender process (flows/tracking/sender.py) reads
the spools of all runs and brings them to MLflow; when MLflow is down, slow or wrong, the spool stays, and the
next sender or `python -m flows.tracking.sender` sends it.

Spool: <root>/.lesa/<id>.jsonl, one JSON object a line; <id>.sent says how far MLflow has it.
    {"kind": "start", "experiment", "name", "time", "params": {..}, "tags": {..}}
    {"kind": "values", "step", "time", "values": {..}}
    {"kind": "tags", "tags": {..}}
    {"kind": "end", "status", "time"}
The owner of a run holds a lock on its spool; one without owner and without end was left by a killed process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.environment import ROOT, state_folder
from flows.tracking.client import tracking_uri
from flows.tracking.sender import start_sender
from lesa.errors import redacted
from lesa.locks import new_locked_file

DRAIN_SECONDS = 3.0  # the most a finished run waits for MLflow; the sender goes on by itself
PROGRESS_SECONDS = 5.0  # between two lines on the screen
RESTART_SECONDS = 60.0  # how often a running run looks whether a sender is there
_KEY = re.compile(r"[^0-9A-Za-z_./: -]")  # what MLflow does not take in a metric's name

log = logging.getLogger("flows.tracking.run")


@dataclasses.dataclass(slots=True)
class Reporter:
    """Writes to a run's spool from any process of this machine: it can be pickled into a Ray task.

    Its `report` fits wherever lesa asks for `report(step, values)`.
    """

    path: Path  # spool
    name: str  # what the lines on the screen begin with
    prefix: str = ""  # of every value's name
    shown: float = 0.0  # when the screen was last written
    broken: bool = False  # the spool cannot be written any more

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Notes values at a step and now and then shows them; takes microseconds whatever MLflow does."""
        clean = {_KEY.sub("_", self.prefix + key): float(value) for key, value in values.items()}
        self.write(kind="values", step=int(step), time=_now_ms(), values=clean)
        if time.monotonic() - self.shown >= PROGRESS_SECONDS:
            self.shown = time.monotonic()
            shown = "  ".join(f"{key} {float(value):.4g}" for key, value in values.items())
            print(f"{self.name}  step {step}  {shown}", flush=True)

    def child(self, part: str) -> Reporter:
        """The reporter of one part of the run; its values are called `<part>/<name>`."""
        return Reporter(path=self.path, name=f"{self.name} {part}", prefix=f"{self.prefix}{part}/")

    def write(self, **event: Any) -> None:
        """Appends one event. What fails is said once; it ends the notes, not the work."""
        if self.broken:
            return
        line = (json.dumps(event, separators=(",", ":")) + "\n").encode()
        try:
            # One write on a descriptor that appends: lines of several processes never mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            self.broken = True
            log.warning("the spool %s cannot be written (%s): no longer tracked", self.path, error)


class Tracker:
    """One run: owns its spool from the first event to the last."""

    def __init__(
        self,
        name: str,
        *,
        experiment: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        root: Path = ROOT,
    ) -> None:
        self.root = root
        self.spool_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
        path = state_folder(root) / f"{self.spool_id}.jsonl"
        self._owned = new_locked_file(path)  # a sender takes a spool without owner for a killed run's
        self.reporter = Reporter(path=path, name=name)
        self.reporter.write(
            kind="start",
            experiment=experiment,
            name=name,
            time=_now_ms(),
            params={key: str(value) for key, value in params.items()},
            tags={key: str(value) for key, value in tags.items()},
        )
        self._sender_checked = time.monotonic()
        start_sender(root)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter.report."""
        self.reporter.report(step, values)
        if time.monotonic() - self._sender_checked >= RESTART_SECONDS:
            self._sender_checked = time.monotonic()
            start_sender(self.root)  # the one at work may have ended just when this run began

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Values for MLflow that would fill the screen."""
        clean = {_KEY.sub("_", key): float(value) for key, value in values.items()}
        self.reporter.write(kind="values", step=int(step), time=_now_ms(), values=clean)

    def curves(self, name: str = "loss") -> list[tuple[str, int, float]]:
        """(part, step, value) of one value, as all parts of this run have reported it so far, sorted."""
        found: list[tuple[str, int, float]] = []
        for line in self.reporter.path.read_text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # half a line: the disk was full
                continue
            for key, value in event.get("values", {}).items():
                part, _, last = key.rpartition("/")
                if last == name:
                    found.append((part, event["step"], value))
        return sorted(found, key=lambda point: point[:2])

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Sets tags of the MLflow run."""
        self.reporter.write(kind="tags", tags={key: str(value) for key, value in tags.items()})

    def close(self, status: str, drain_seconds: float | None = None) -> bool:
        """Ends the run and waits, bounded, until MLflow has it; False when the spool is left behind."""
        drain_seconds = DRAIN_SECONDS if drain_seconds is None else drain_seconds
        path = self.reporter.path
        self.reporter.write(kind="end", status=status, time=_now_ms())
        os.close(self._owned)
        start_sender(self.root)
        deadline = time.monotonic() + drain_seconds
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        if path.exists():
            log.warning(
                "MLflow at %s has not taken the run %r within %.0f s. It is kept in %s; sending goes on in "
                "the background, with the next run, or by `python -m flows.tracking.sender`",
                redacted(tracking_uri(self.root)),
                self.reporter.name,
                drain_seconds,
                path,
            )
        return not path.exists()


@contextlib.contextmanager
def tracked_run(
    name: str,
    *,
    experiment: str,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    root: Path = ROOT,
) -> Iterator[Tracker]:
    """A tracked run for the block; its status follows how the block ends."""
    tracker = Tracker(name, experiment=experiment, params=params, tags=tags, root=root)
    try:
        yield tracker
    except Exception:
        tracker.close("FAILED")
        raise
    except BaseException:  # an interrupt does not wait
        tracker.close("KILLED", drain_seconds=0)
        raise
    tracker.close("FINISHED")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: how settings are shown in MLflow."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _now_ms() -> int:
    return int(time.time() * 1000)
