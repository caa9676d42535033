"""Where MLflow is and how to reach it: the one place that builds a client."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flows.environment import ROOT, state_folder
from lesa.errors import LesaError
from lesa.locks import file_lock


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
    runs = client.search_runs([experiment], filter_string=f"tags.`{tag}` = '{value}'", max_results=1)
    if runs:
        return str(runs[0].info.run_id)
    run = client.create_run(experiment, start_time=start_ms, tags={**tags, tag: value}, run_name=name)
    return str(run.info.run_id)
