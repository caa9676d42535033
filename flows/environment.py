"""The environment of every flow: where the repository and its state are, telemetry off, bounded time-outs."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
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
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with its user and password
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # an answer 429 or 503 may ask for hours of patience
    "GIT_PYTHON_REFRESH": "quiet",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def prefect_home() -> Path:
    """Prefect's home: the repository's own unless PREFECT_HOME says otherwise."""
    return Path(os.environ.get("PREFECT_HOME") or ROOT / ".prefect")


def quiet_environment() -> None:
    """Telemetry off, private state, bounded time-outs, token authentication for Ray. Idempotent."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    os.environ["PREFECT_HOME"] = str(prefect_home())
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    # Ray listens on every interface, whatever address it is given, except where it may not be one of a cluster: the
    # variable is named after the systems on which that is so by itself. It is read when Ray is imported.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Other users of this machine can reach loopback too, so whoever connects must know a token. One of this run's own
    # is kept in the environment of its processes only, never in the home directory.
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def state_folder(root: Path = ROOT) -> Path:
    """<root>/.lesa: spools and locks of the flows, private and ignored by git."""
    folder = root / ".lesa"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
