"""Where MLflow is and how to reach it: the one place that builds a client."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from flows.environment import ROOT, state_folder
from lesa.errors import LesaError, redacted
from lesa.locks import file_lock

_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"  # read by MLflow's client at each request
_PAUSE_SECONDS = 1.0  # between two attempts to make one thing
_environment = threading.Lock()
_Made = TypeVar("_Made")


def tracking_uri(root: Path = ROOT) -> str:
    """MLFLOW_TRACKING_URI, else the sqlite database in the repository root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


def is_default_store(root: Path = ROOT) -> bool:
    return tracking_uri(root) == f"sqlite:///{root / 'mlflow.db'}"


def connect(root: Path = ROOT) -> Any:
    """An MlflowClient for tracking and registry. A local database is created at the first call."""
    from mlflow import MlflowClient

    uri = tracking_uri(root)
    if uri.startswith("sqlite:"):
        # Two processes that both find no tables would both create them.
        with file_lock(state_folder(root) / "database.lock", timeout=60.0):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
        return client
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: Any, name: str, root: Path = ROOT) -> str:
    """Finds or creates an experiment; beside the default database its artifacts go to mlartifacts/."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = (root / "mlartifacts" / name).as_uri() if is_default_store(root) else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # somebody else was first
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise LesaError(f"MLflow experiment {name!r} is deleted; restore it or delete it for good")
    return str(found.experiment_id)


def find_or_create_run(
    client: Any, experiment: str, tag: str, value: str, *, name: str, tags: dict[str, str], start_ms: int
) -> str:
    """The id of the one run with `tag` = `value`: a request repeated or half answered adds no second."""
    assert "'" not in value

    def find() -> str | None:
        def ask() -> Any:
            return client.search_runs([experiment], filter_string=f"tags.`{tag}` = '{value}'", max_results=1)

        runs = ask() or ask()  # an answer that was cut off in its head looks like none found
        return str(runs[0].info.run_id) if runs else None

    def make() -> str:
        run = client.create_run(experiment, start_time=start_ms, tags={**tags, tag: value}, run_name=name)
        return str(run.info.run_id)

    return made_once(find, make)


def made_once(find: Callable[[], _Made | None], make: Callable[[], _Made]) -> _Made:
    """What `find` finds, else what `make` makes: no second one where the server makes it and its answer is lost.

    MLflow's client repeats any request that had no answer; for what has no name of its own that makes a second. Here
    it is looked for before each attempt.
    """
    from mlflow.exceptions import MlflowException

    attempts = 1 + int(os.environ.get(_RETRIES, "2"))
    while True:
        found = find()
        if found is not None:
            return found
        attempts -= 1
        try:
            with _without_retries():
                return make()
        except MlflowException as error:
            if error.error_code != "INTERNAL_ERROR":  # that of every answer which did not come
                raise
            if attempts <= 0:
                found = find()
                if found is None:
                    raise
                return found
            time.sleep(_PAUSE_SECONDS)


@contextlib.contextmanager
def _without_retries() -> Iterator[None]:
    """MLflow's client asks once; a request of another thread meanwhile does so too."""
    with _environment:
        before = os.environ.get(_RETRIES)
        os.environ[_RETRIES] = "0"
        try:
            yield
        finally:
            os.environ.pop(_RETRIES, None)
            if before is not None:
                os.environ[_RETRIES] = before


@contextlib.contextmanager
def named_failures(root: Path = ROOT) -> Iterator[None]:
    """What MLflow raises in the block, as one line that names the server and what to do.

    Raises:
        LesaError: the server cannot be reached, or does not answer as one.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        said = " ".join(redacted(str(error)).split())[:500]
        raise LesaError(
            f"the MLflow server at {redacted(tracking_uri(root))} did not do what it was asked: {said}. Start it or "
            "correct MLFLOW_TRACKING_URI, and run the same again: it goes on from what is registered"
        ) from None
