"""`dvc repro` of one workload as a child process: one at a time, output passed on, nothing left behind."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from flows.confidential import keep_secrets
from flows.ending import Ending
from flows.environment import ROOT, state_folder
from flows.preflight import check_repository
from flows.registry.registry import CHAMPION, Registry
from flows.stage import experiment_name, metrics_folder, read_workload
from flows.supervisor import STOP_SECONDS, supervised
from lesa.errors import LesaError
from lesa.locks import file_lock
from lesa.params import Workload
from lesa.params_file import load_params

WORKLOADS_FILE = "data/workloads/dvc.yaml"
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


def require_model(workload: str, root: Path = ROOT) -> None:
    """Refuse a workload whose own pipeline folder is not where its line says: DVC would name a path and no remedy.

    Raises:
        LesaError: naming the folder.
    """
    document = yaml.safe_load((root / WORKLOADS_FILE).read_text(encoding="utf-8"))
    given: dict[str, dict[str, str]] = next(entry["given"] for entry in document["vars"] if "given" in entry)
    if workload in given and not (root / "data/base" / given[workload]["model"]).is_dir():
        folder = f"data/base/{given[workload]['model']}"
        raise LesaError(
            f"{folder} is not here: copy your pipeline folder there, or link it (ln -s /where/it/is {folder}); "
            f"`model:` in {WORKLOADS_FILE} names it, and model.source in params.yaml"
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
        work = state_folder(root) / "repro.work.lock"
        with file_lock(work, timeout=STOP_SECONDS + 10.0):  # what was asked to end has put its things away
            check_repository(root)
        process = supervised([sys.executable, "-m", "dvc", "repro", target], root, environment, work)
        assert process.stdin is not None and process.stdout is not None
        try:
            for line in _lines(process.stdout.fileno()):
                show(printable(line))
            return process.wait()
        finally:
            process.stdin.close()  # where the work still goes on, its supervisor stops it now
            for _ in _lines(process.stdout.fileno()):  # who is stopped must not wait for us to read
                pass
            process.stdout.close()
            process.wait()


def _lines(descriptor: int) -> Iterator[str]:
    """Lines as they come. Waits a second at a time: Prefect stops a run by an exception between two operations."""
    rest = b""
    while True:
        if not select.select([descriptor], [], [], 1.0)[0]:
            continue
        data = os.read(descriptor, 65536)
        *lines, rest = (rest + data).split(b"\n")
        if not data and rest:
            lines.append(rest)
        yield from (line.decode(errors="replace") for line in lines)
        if not data:
            return


def printable(line: str) -> str:
    """A line for a log: of a progress bar only the last state, without colours, control characters escaped."""
    text = _COLOUR.sub("", line.rstrip("\r\n").rsplit("\r", 1)[-1])
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in text)


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
    keep_secrets()
    ending = Ending()
    with ending.by_signals():
        try:
            workload = read_workload(args.workload)
            if args.repro:
                target = dvc_target(workload.name, load_params("params.yaml").name)
                require_model(workload.name)
                code = dvc_repro(target, show=functools.partial(print, flush=True))
                if code != 0:
                    return code
            return show_outcome(workload)
        except (Exception, KeyboardInterrupt) as error:
            return ending.conclude(error=error)


if __name__ == "__main__":
    raise SystemExit(main())
