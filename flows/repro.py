"""`dvc repro` of one workload as a child process: one at a time, output passed on, nothing left behind."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from flows.environment import ROOT, state_folder
from flows.preflight import check_repository
from flows.registry.registry import CHAMPION, Registry
from flows.stage import experiment_name, is_refusal, metrics_folder, read_workload
from lesa.errors import LesaError
from lesa.locks import Locked, file_lock
from lesa.params import Workload
from lesa.params_file import load_params

WORKLOADS_FILE = "data/workloads/dvc.yaml"
STOP_SECONDS = 30.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Ray paints the names of its workers


def dvc_target(workload: str, default: str, root: Path = ROOT) -> str:
    """What `dvc repro` is given for a workload: the root's file, or its last stage in data/workloads/dvc.yaml.

    Raises:
        LesaError: naming the line to write where the workload stands in no list of that file.
    """
    if workload == default:
        return "dvc.yaml"
    document = yaml.safe_load((root / WORKLOADS_FILE).read_text(encoding="utf-8"))
    lists = {name: rows for entry in document["vars"] for name, rows in entry.items()}
    for rows, stage in (("local", "publish"), ("hub", "publish-hub")):
        if workload in lists[rows]:
            return f"{WORKLOADS_FILE}:{stage}@{workload}"
    raise LesaError(
        f"workload {workload!r} has no stages: add a line to {WORKLOADS_FILE}, under `given` for a pipeline folder "
        f"(`{workload}: {{family: ..., prompts: ..., model: ...}}`) or under `hub` for a hub id (without `model`)"
    )


def dvc_repro(target: str, show: Callable[[str], object] = print, root: Path = ROOT) -> int:
    """Runs `dvc repro` for a target and returns its exit code.

    Raises:
        lesa.locks.Locked: another one of ours is at work; its process is named.
        LesaError: something stands in the way (`flows.preflight`); nothing was started.
    """
    environment = dict(os.environ)
    # The stages' `python` must be the one we run on, whatever is on the path.
    environment["PYTHONUNBUFFERED"] = "1"  # people watch: what a stage says is shown when it says it
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with file_lock(state_folder(root) / "repro.lock"):
        check_repository(root)
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", target],
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


def show_outcome(workload: Workload) -> int:
    """Prints table, report and decision; 0 if there is a champion for the bundle's transformer, else 1."""
    report, decided = workload.paths.report, metrics_folder(workload) / "decision.json"
    table = report / "table.txt"
    if table.is_file():
        print(table.read_text())
    decision = json.loads(decided.read_text())
    fingerprint = json.loads((workload.paths.bundle / "manifest.json").read_text())["model"]["fingerprint"]
    name = experiment_name(workload)
    champion = Registry(name).alias(CHAMPION)
    print(f"report:   {report / 'index.html'}")
    print(f"bundle:   {workload.paths.bundle}")
    verdict = "promoted" if decision["promote"] else "kept as it was"
    print(f"gate:     version {decision['candidate']}, champion {verdict}: {'; '.join(decision['reasons'])}")
    if champion is None:
        print(
            f"champion: none; what the gate refused is in {decided}. If the "
            "registry was removed or replaced, register again: dvc repro --force --single-item publish"
        )
        return 1
    if champion.fingerprint != fingerprint:
        print(
            f"champion: version {champion.number} was made for another transformer and does not fit this one"
        )
        return 1
    print(f'champion: version {champion.number}; lesa.enable(pipe, "models:/{name}@{CHAMPION}")')
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.repro", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--workload", default=None, help="section of params.yaml (default: its default_workload)"
    )
    parser.add_argument("--repro", action="store_true", help="run `dvc repro` first")
    args = parser.parse_args(argv)
    try:
        workload = read_workload(args.workload)
        if args.repro:
            target = dvc_target(workload.name, load_params("params.yaml").name)
            code = dvc_repro(target, show=functools.partial(print, flush=True))
            if code != 0:
                return code
        return show_outcome(workload)
    except (ValueError, OSError, Locked) as error:
        if not is_refusal(error) and not isinstance(error, ValueError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
