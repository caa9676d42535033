"""`dvc repro` of one workload as a child process: one at a time, output passed on, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from flows.connect import state_folder
from flows.runtime import ROOT
from lesa.atomic import file_lock

STOP_SECONDS = 30.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Ray paints the names of its workers


def dvc_file(workload: str, default: str, root: Path = ROOT) -> Path:
    """The pipeline file of a workload, relative to the root: the root's is the default workload's.

    Raises ValueError naming the file to write when the workload has none.
    """
    if workload == default:
        return Path("dvc.yaml")
    path = Path("data/workloads") / workload / "dvc.yaml"
    if not (root / path).is_file():
        raise ValueError(
            f"workload {workload!r} has no pipeline file: write {path} (wdir: ../../.., every command with "
            f"--workload {workload}) after the pattern of dvc.yaml"
        )
    return path


def dvc_repro(pipeline: Path, show: Callable[[str], object] = print, root: Path = ROOT) -> int:
    """Runs `dvc repro` for a pipeline file and returns its exit code.

    Raises:
        lesa.atomic.Locked: another one of ours is at work; its process is named.
    """
    environment = dict(os.environ)
    # The stages' `python` must be the one we run on, whatever is on the path.
    environment["PYTHONUNBUFFERED"] = "1"  # people watch: what a stage says is shown when it says it
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with file_lock(state_folder(root) / "repro.lock"):
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", str(pipeline)],
            cwd=root, env=environment, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                show(printable(line))
            return process.wait()
        except BaseException:
            _stop_group(process)
            raise


def printable(line: str) -> str:
    """A line for a log: of a progress bar only the last state, without colours, control characters escaped."""
    text = _COLOUR.sub("", line.rstrip("\r\n").rsplit("\r", 1)[-1])
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in text)


def _stop_group(process: subprocess.Popen[str]) -> None:
    """Ends DVC and the stage under it: asked first, so that the stage closes its actors, then forced."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
