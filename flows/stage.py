"""What every stage does around its work: settings, a Prefect server, one MLflow run, its command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.confidential import is_refusal, keep_secrets
from flows.ending import Ending, Outcome, watch
from flows.environment import ROOT, prefect_home, quiet_environment
from flows.prefect_server import shared_server
from flows.tracking.revisions import revisions
from flows.tracking.run import Tracker, flatten, tracked_run
from lesa.atomic import write_bytes, write_json
from lesa.errors import LesaError, redacted
from lesa.models.bill import counted
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.strict_json import parse

_LOG = logging.getLogger("flows.stage")


def read_workload(name: str | None, *, searched: bool = False) -> Workload:
    """The settings of a workload, all checked, before anything starts; paths are relative to the root.

    Args:
        name: section of params.yaml; None takes its default.
        searched: also read what the search stage found; `ValueError` where it has not run.
    """
    os.chdir(ROOT)
    workload = load_params("params.yaml", name)
    if not searched:
        return workload
    from lesa.search.jobs import with_schedules  # brings diffusers

    return with_schedules(workload)


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


@contextlib.contextmanager
def billed(stage: str, workload: Workload) -> Iterator[None]:
    """Counts the passes through the model within the block, in whichever process, into the stage's bill.

    What a process had computed before it died is not on it. A stage that goes on from what is there has a smaller bill,
    so DVC does not know of it: nothing that depends on the stage's result is to run again for that.
    """
    with counted() as bill:
        yield
    write_json(metrics_folder(workload) / f"{stage}_bill.json", bill.to_dict())


def read_bills(workload: Workload) -> dict[str, dict[str, float]]:
    """The bills of the stages that make a predictor, by stage; `LesaError` for a file that is none."""
    bills: dict[str, dict[str, float]] = {}
    for stage in ("record", "search", "train_stage2"):
        path = metrics_folder(workload) / f"{stage}_bill.json"
        if not path.is_file():
            continue
        try:
            bill = parse(path.read_bytes(), max_bytes=1 << 12)
            bills[stage] = {name: float(bill[name]) for name in ("forwards", "backwards")}
        except (ValueError, KeyError, TypeError):
            raise LesaError(f"{path}: not a stage's bill; remove it, the report does without") from None
    return bills


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
        before = {key: os.environ.get(key) for key in values}
        os.environ.update(values)  # for processes the flow starts
        try:
            with temporary_settings({PREFECT_API_URL: server.url, PREFECT_API_AUTH_STRING: server.auth}):
                yield
        finally:
            for key, value in before.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value


def run_flow(flow: Callable[..., Any], **params: Any) -> Any:
    """Calls a Prefect flow with a server behind it; returns its result, raises its exception.

    A flow of `flows.prefect_flow` that has done its work has succeeded, also where Prefect could not note it.
    """
    return _run_watched(flow, Outcome(), **params)


def _run_watched(flow: Callable[..., Any], outcome: Outcome, **params: Any) -> Any:
    with prefect_api():
        watch(outcome)
        try:
            return flow(**params)
        except Exception as error:
            if not outcome.began:
                address = redacted(os.environ.get("PREFECT_API_URL", ""))
                raise LesaError(
                    f"the Prefect server at {address} did not let the run begin "
                    f"({type(error).__name__}: {_first_line(error)}): start it, or unset PREFECT_API_URL and a server "
                    "is started here"
                ) from error
            if not outcome.ended.is_set() or outcome.error is not None:
                raise
            _LOG.warning("%s: Prefect has not noted the end of this run", _first_line(error))
            return outcome.result
        finally:
            watch(None)


def stage_main(
    flow: Callable[..., Any],
    argv: list[str] | None = None,
    check: Callable[[str | None], object] | None = None,
) -> int:
    """`python -m flows.<stage> [--workload NAME]`: runs the stage, prints its result, returns the exit code.

    Args:
        flow: the stage, made by `flows.prefect_flow.flow`; it takes `workload`.
        argv: arguments; None takes the command line's.
        check: called with the workload's name before anything starts; None checks all settings.

    Exit codes: as `flows.ending`.
    """
    parser = argparse.ArgumentParser(description=(flow.__doc__ or "").strip().splitlines()[0])
    parser.add_argument(
        "--workload", default=None, help="section of params.yaml (default: its default_workload)"
    )
    args = parser.parse_args(argv)
    keep_secrets()
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback_of_refusals)
    outcome, ending = Outcome(), Ending()
    with ending.by_signals():
        try:
            (check or read_workload)(args.workload)
            ending.soon_after(outcome)
            outcome.on_sigterm = signal.getsignal(signal.SIGTERM)
            return ending.conclude(_run_watched(flow, outcome, workload=args.workload))
        except (Exception, KeyboardInterrupt) as error:
            return ending.conclude(error=error)


def _without_traceback_of_refusals(record: logging.LogRecord) -> bool:
    if record.exc_info and is_refusal(record.exc_info[1]):
        record.exc_info = record.exc_text = None
    return True


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in redacted(str(error)).splitlines() if line.strip()), type(error).__name__)
