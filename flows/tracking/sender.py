"""The sender: brings the spools of tracked runs to MLflow (flows/tracking/run.py has the format).

Sending twice changes nothing: the MLflow run is found by the spool's id, and every point carries the time it
was measured, so MLflow recognises one that it has. A spool is removed when MLflow has all of it.

    python -m flows.tracking.sender        send what is left, once
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.environment import ROOT, quiet_environment, state_folder
from flows.tracking.client import connect, experiment_id, find_or_create_run
from lesa.atomic import sweep_partials, write_json
from lesa.errors import redacted
from lesa.locks import Locked, file_lock, is_free

LINGER_SECONDS = 30.0  # the most a sender goes on after the last run ended
IDLE_SECONDS = 15.0  # how long one with nothing to do waits for the next stage's run
REQUEST_SECONDS = 5  # patience with one request
BATCH = 500  # points in one request; MLflow takes at most 1000

log = logging.getLogger("flows.tracking.sender")


def start_sender(root: Path) -> None:
    """Starts a sender unless one is at work; it outlives a killed trainer for at most LINGER_SECONDS."""
    if not is_free(state_folder(root) / "sender.lock"):
        return
    try:
        with open(state_folder(root) / "sender.log", "ab") as output:
            subprocess.Popen(
                [sys.executable, "-m", "flows.tracking.sender", "--root", str(root), "--background"],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        log.warning("the sender to MLflow did not start (%s); the run stays in its spool", error)


class Spool:
    """The sender's view of one spool file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mark = path.with_suffix(".sent")
        try:
            state = json.loads(self.mark.read_text())
            self.offset, self.run_id = int(state["offset"]), str(state["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            self.offset, self.run_id = 0, ""

    def send(self, client: Any, root: Path) -> bool:
        """Brings what is new to MLflow; True when the run is complete there (the spool is then removed)."""
        orphan = is_free(self.path)  # asked before reading: what an owner wrote before it ended is then read
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a killed owner may have left half a line
        points: list[Any] = []
        for line in whole.splitlines():
            event = json.loads(line)
            if event["kind"] == "values":
                points += _metrics(event)
                if len(points) < BATCH:
                    continue
            self._flush(client, points)
            points = []
            if event["kind"] == "start":
                self._begin(client, event, root)
            elif event["kind"] == "tags":
                _log_batch(client, self.run_id, tags=event["tags"])
            elif event["kind"] == "end":
                client.set_terminated(self.run_id, status=event["status"], end_time=event["time"])
                self._remove()
                return True
        self._flush(client, points)
        if whole:
            self.offset += len(whole)
            self._save()
        if orphan:
            if self.run_id:
                client.set_terminated(
                    self.run_id, status="KILLED", end_time=int(self.path.stat().st_mtime * 1000)
                )
            self._remove()
            return True
        return False

    def _begin(self, client: Any, event: dict[str, Any], root: Path) -> None:
        experiment = experiment_id(client, event["experiment"], root)
        self.run_id = find_or_create_run(
            client, experiment, "lesa.spool", self.path.stem,
            name=event["name"], tags=event["tags"], start_ms=event["time"],
        )  # fmt: skip
        _log_batch(client, self.run_id, params=event["params"])

    def _flush(self, client: Any, points: list[Any]) -> None:
        for start in range(0, len(points), BATCH):
            client.log_batch(self.run_id, metrics=points[start : start + BATCH])

    def _save(self) -> None:
        write_json(self.mark, {"offset": self.offset, "run_id": self.run_id})

    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.mark.unlink(missing_ok=True)


def _metrics(event: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Metric

    return [
        Metric(key, value if math.isfinite(value) else math.nan, event["time"], event["step"])
        for key, value in event["values"].items()
    ]


def _log_batch(
    client: Any, run_id: str, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
) -> None:
    from mlflow.entities import Param, RunTag

    items = [Param(k, v) for k, v in (params or {}).items()] + [RunTag(k, v) for k, v in (tags or {}).items()]
    for start in range(0, len(items), 100):
        part = items[start : start + 100]
        client.log_batch(
            run_id,
            params=[item for item in part if isinstance(item, Param)],
            tags=[item for item in part if isinstance(item, RunTag)],
        )


def send_all(root: Path = ROOT, *, background: bool = False) -> int:
    """Sends every spool; returns how many are left.

    In the background it stays while a run is open, retries with growing pauses, and gives up LINGER_SECONDS
    after the last run ended. In the foreground it tries each spool once.
    """
    folder = state_folder(root)
    try:
        # Who only asks whether a sender is at work holds its lock for an instant.
        with file_lock(folder / "sender.lock", timeout=0.5):
            return _send_spools(root, folder, background)
    except Locked:
        return len(list(folder.glob("*.jsonl")))


def _send_spools(root: Path, folder: Path, background: bool) -> int:
    """`send_all`, alone at work in `folder`."""
    sweep_partials(folder)
    if background:
        threading.Thread(target=_give_up_when_alone, args=(folder,), daemon=True).start()
    client: Any = None
    pause, idle_since = 0.2, time.monotonic()
    while True:
        failed = False
        for path in sorted(folder.glob("*.jsonl")):
            try:
                client = client or connect(root)
                Spool(path).send(client, root)
            except FileNotFoundError:
                continue
            except Exception as error:  # whatever MLflow or the network answers
                failed = True
                print(f"{path.name}: {type(error).__name__}: {redacted(str(error))[:500]}", file=sys.stderr)
        left = sorted(folder.glob("*.jsonl"))
        if not background:
            return len(left)
        if left:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > IDLE_SECONDS:
            return 0
        pause = min(pause * 2, 10.0) if failed else 0.2
        time.sleep(pause)


def _give_up_when_alone(folder: Path) -> None:
    """Ends this process for certain, even when a request never comes back."""
    last_owned = time.monotonic()
    while True:
        time.sleep(1.0)
        if any(not is_free(path) for path in folder.glob("*.jsonl")):
            last_owned = time.monotonic()
        elif time.monotonic() - last_owned > LINGER_SECONDS or not folder.is_dir():
            os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """Sends what is spooled; exit code 1 when something is left."""
    parser = argparse.ArgumentParser(prog="python -m flows.tracking.sender", description="Send kept runs to MLflow.")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository whose spool is sent")
    parser.add_argument(
        "--background", action="store_true", help="stay while runs are open (used by the flows)"
    )
    args = parser.parse_args(argv)
    quiet_environment()
    # One slow answer must not hold up the others: the sender has its own patience and its own retries.
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(REQUEST_SECONDS)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    left = send_all(args.root, background=args.background)
    if left and not args.background:
        print(f"{left} run(s) are still in {state_folder(args.root)}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
