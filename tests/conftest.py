"""What all tests share: state of their own, quiet dependencies, one server for the flows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports prefect, which reads its home when it is imported.
_HOME = Path(tempfile.mkdtemp(prefix="lesa-tests-"))
os.environ["PREFECT_HOME"] = str(_HOME / "prefect")
os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"  # the server may be gone before the last lines are
# Test models are tiny: a second thread only waits for the first, and on a machine that is busy it waits for long.
os.environ["OMP_NUM_THREADS"] = "1"
for _name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session", autouse=True)
def _own_state() -> Iterator[None]:
    yield
    import shutil

    from flows.prefect_server import stop

    stop(_HOME / "prefect")
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _own_environment() -> Iterator[None]:
    """What a module's code puts into the environment (MLflow keeps its address there) stays with the module."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
