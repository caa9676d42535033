"""What every flow needs before it starts: a quiet environment, a Prefect server, a Ray session.

`quiet_environment` must run before prefect, ray or mlflow is imported: they read these variables at import.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flows.guard import no_orphans
from flows.server import shared_server
from lesa.atomic import Locked, file_lock

ROOT = Path(__file__).resolve().parent.parent

# Only defaults: what the user has set stays.
_QUIET = {
    "DO_NOT_TRACK": "true",  # MLflow understands "true" but not "1"
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # Results stay in memory, or JSON: a pickled one would be code read back from a file.
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # An MLflow that is down must cost seconds, not minutes (the client's own defaults retry for minutes).
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


RAY_ATTEMPTS = 3  # to start Ray


def prefect_home() -> Path:
    """Prefect's home: the repository's own unless PREFECT_HOME says otherwise."""
    return Path(os.environ.get("PREFECT_HOME") or ROOT / ".prefect")


def quiet_environment() -> None:
    """Telemetry off, private state, bounded time-outs, token authentication for Ray. Idempotent."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    os.environ["PREFECT_HOME"] = str(prefect_home())
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    # Ray's ports listen on every interface whatever it is told, so whoever connects must know a token. One of
    # this run's own is kept in the environment of its processes only, never in the home directory.
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def waiting_lock(path: Path, seconds: float = 60.0) -> Iterator[None]:
    """`lesa.atomic.file_lock`, waiting up to `seconds` for the holder; then its Locked error is raised."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(file_lock(path))
                break
            except Locked:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        yield


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[Any]:
    """A local Ray on loopback for the block, without dashboard; yields the ray module.

    None of its processes outlives this one by more than seconds, however it ends.

    An already initialised Ray is used as it is and left running. num_cpus None lets Ray count.
    """
    quiet_environment()
    if os.environ["RAY_AUTH_MODE"] != "token":
        raise ValueError("RAY_AUTH_MODE: must be 'token' (Ray listens beyond loopback); unset it")
    import ray

    if ray.is_initialized():
        yield ray
        return
    with no_orphans() as session_is:
        for attempt in range(1, RAY_ATTEMPTS + 1):
            try:
                started = ray.init(
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    logging_level=logging.WARNING,
                )
                break
            except Exception as error:
                ray.shutdown()
                # Ray gives itself 30 s, which a very busy machine can exceed; nothing is lost by trying again.
                if attempt == RAY_ATTEMPTS or "timed out during startup" not in str(error):
                    raise
        session_is(started.address_info["session_dir"])
        try:
            yield ray
        finally:
            ray.shutdown()


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
        (check or _check_settings)(args.workload)
        result = run_flow(flow, workload=args.workload)
    except KeyboardInterrupt:
        print("interrupted: what is committed stays, run again to go on", file=sys.stderr)
        return 130
    except _Terminated:
        print("terminated: what is committed stays, run again to go on", file=sys.stderr)
        return 143
    except (ValueError, OSError, Locked) as error:
        if not is_refusal(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None:
        print(json.dumps(result, indent=1, sort_keys=True, default=str))
    return 0


def _check_settings(workload: str | None) -> None:
    from flows.stage import read_workload

    read_workload(workload)


def is_refusal(error: BaseException | None) -> bool:
    """Whether an error says that input, disk or another run is in the way, and our own code raised it so.

    Any other error is a fault of code, and its traceback is wanted.
    """
    if not isinstance(error, ValueError | OSError | Locked):
        return False
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return module == "__main__" or module.startswith(("lesa.", "flows."))


def _without_traceback_of_refusals(record: logging.LogRecord) -> bool:
    if record.exc_info and is_refusal(record.exc_info[1]):
        record.exc_info = None
    return True


class _Terminated(BaseException):
    """SIGTERM as an exception, so that sessions and locks are closed on the way out."""


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated
