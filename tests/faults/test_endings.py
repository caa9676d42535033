"""A stage ends as it says, soon after its work: by a signal while Ray runs, and with a Prefect server that is gone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import prefect_server
from flows.processes import Process, send
from tests.helpers.stages import begin, ended

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all: making it takes longer than everything else here."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def home(shared_home: Path) -> Iterator[Path]:
    yield shared_home
    server = prefect_server.read(shared_home)
    if server is not None:  # it may be stopped, and hear nothing else
        send(Process(server.pid, server.start), signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.long)],
)
def test_a_signal_while_ray_runs(tmp_path: Path, home: Path, number: int, code: int, word: str) -> None:
    process = begin(tmp_path, "ray", home)
    process.send_signal(number)
    returned, _, errors = ended(process)
    assert returned == code, errors
    assert errors.splitlines()[-1] == f"{word}: what is committed stays, run again to go on"
    assert "Traceback" not in errors and "SIGTERM received" not in errors


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        pytest.param(signal.SIGKILL, "done", 0, marks=pytest.mark.long),
        (signal.SIGSTOP, "done", 0),
        pytest.param(signal.SIGKILL, "refused", 2, marks=pytest.mark.long),
    ],
)
def test_the_prefect_server_is_gone(tmp_path: Path, home: Path, fault: int, kind: str, code: int) -> None:
    """What is done is done, whether the server died or hangs, and so is what was refused."""
    process = begin(tmp_path, kind, home)
    server = prefect_server.read(home)
    assert server is not None and send(Process(server.pid, server.start), fault)
    (tmp_path / "go").touch()
    returned, output, errors = ended(process)
    assert returned == code, errors
    if kind == "done":
        assert json.loads(output) == {"sum": 3}
    else:
        assert "error: not like this" in errors.splitlines()


def test_a_signal_when_the_prefect_server_hangs(tmp_path: Path, home: Path) -> None:
    process = begin(tmp_path, "done", home)
    server = prefect_server.read(home)
    assert server is not None and send(Process(server.pid, server.start), signal.SIGSTOP)
    process.terminate()
    returned, _, errors = ended(process)
    assert returned == 143, errors
    assert "terminated: what is committed stays, run again to go on" in errors.splitlines()
