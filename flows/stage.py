"""What every stage does around its work: settings, a Prefect server, one MLflow run, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.environment import ROOT, prefect_home, quiet_environment
from flows.prefect_server import shared_server
from flows.tracking.revisions import revisions
from flows.tracking.run import Tracker, flatten, tracked_run
from lesa.atomic import write_bytes
from lesa.errors import LesaError
from lesa.locks import Locked
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.search.schedules_file import with_schedules


def read_workload(name: str | None, *, searched: bool = False) -> Workload:
    """The settings of a workload, all checked, before anything starts; paths are relative to the root.

    Args:
        name: section of params.yaml; None takes its default.
        searched: also read what the search stage found; `ValueError` where it has not run.
    """
    os.chdir(ROOT)
    workload = load_params("params.yaml", name)
    return with_schedules(workload) if searched else workload


@contextlib.contextmanager
def stage_run(stage: str, workload: Workload, sections: Sequence[str]) -> Iterator[Tracker]:
    """The MLflow run of a stage: the named sections of the settings as params, the revisions as tags."""
    settings = dataclasses.asdict(workload)
    tags = {"stage": stage, "workload": workload.name, **revisions(workload=workload.name)}
    with tracked_run(
        f"{stage} {workload.name}",
        experiment=experiment_name(workload),
        params=flatten({key: settings[key] for key in sections}),
        tags=tags,
    ) as run:
        yield run


def metrics_folder(workload: Workload) -> Path:
    """Where a stage leaves numbers of its own: DVC allows none inside another stage's folder."""
    folder = Path("data/metrics") / workload.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_curves(path: Path, points: Sequence[tuple[str, int, float]]) -> None:
    """A loss curve as DVC plots it: one line a point."""
    lines = ["part,step,loss", *(f"{part},{step},{value!r}" for part, step, value in points)]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What `write_curves` wrote, by part; nothing where there is no file."""
    curves: dict[str, list[tuple[int, float]]] = {}
    if path.is_file():
        for line in path.read_text().splitlines()[1:]:
            part, step, loss = line.rsplit(",", 2)
            curves.setdefault(part, []).append((int(step), float(loss)))
    return curves


def experiment_name(workload: Workload) -> str:
    """Experiment and registered model carry the same name."""
    return f"lesa-{workload.name}"


def final_values(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result, as the last point of a run."""
    return {
        k: float(v)
        for k, v in flatten(values).items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }


@contextlib.contextmanager
def prefect_api() -> Iterator[None]:
    """A Prefect API for the block: the one PREFECT_API_URL names, else this repository's shared server."""
    quiet_environment()
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    with shared_server(prefect_home()) as server:
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        values = {"PREFECT_API_URL": server.url, "PREFECT_API_AUTH_STRING": server.auth}
        os.environ.update(values)  # for processes the flow starts
        try:
            with temporary_settings({PREFECT_API_URL: server.url, PREFECT_API_AUTH_STRING: server.auth}):
                yield
        finally:
            for key in values:
                os.environ.pop(key, None)


def run_flow(flow: Callable[..., Any], **params: Any) -> Any:
    """Calls a Prefect flow with a server behind it; returns its result, raises its exception."""
    with prefect_api():
        return flow(**params)


def stage_main(
    flow: Callable[..., Any],
    argv: list[str] | None = None,
    check: Callable[[str | None], object] | None = None,
) -> int:
    """`python -m flows.<stage> [--workload NAME]`: runs the stage, prints its result, returns the exit code.

    Args:
        flow: the stage; it takes `workload`.
        argv: arguments; None takes the command line's.
        check: called with the workload's name before anything starts; None checks all settings.

    Exit codes: 0 done, 1 failed, 2 refused (one message, no traceback), 130/143 interrupted.
    """
    parser = argparse.ArgumentParser(description=(flow.__doc__ or "").strip().splitlines()[0])
    parser.add_argument(
        "--workload", default=None, help="section of params.yaml (default: its default_workload)"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback_of_refusals)
    try:
        (check or read_workload)(args.workload)
        result = run_flow(flow, workload=args.workload)
    except KeyboardInterrupt:
        print("interrupted: what is committed stays, run again to go on", file=sys.stderr)
        return 130
    except _Terminated:
        print("terminated: what is committed stays, run again to go on", file=sys.stderr)
        return 143
    except (LesaError, OSError, Locked) as error:
        if not is_refusal(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None:
        print(json.dumps(result, indent=1, sort_keys=True, default=str))
    return 0


def is_refusal(error: BaseException | None) -> bool:
    """Whether input (`LesaError`), another run (`Locked`) or a named file of the disk is in the way.

    Any other error is a fault of code, and its traceback is wanted.
    """
    return isinstance(error, LesaError | Locked) or (isinstance(error, OSError) and error.filename is not None)


def _without_traceback_of_refusals(record: logging.LogRecord) -> bool:
    if record.exc_info and is_refusal(record.exc_info[1]):
        record.exc_info = None
    return True


class _Terminated(BaseException):
    """SIGTERM as an exception, so that sessions and locks are closed on the way out."""


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated
