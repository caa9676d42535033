"""A Prefect server behind a network that is slow, drops or lies: what a stage has done is done, and it ends soon."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.environment import prefect_home, quiet_environment
from flows.prefect_server import Server, shared_server
from tests.helpers.stages import at_work, ended, start
from tests.helpers.tcp_proxy import DROPPED, HANGING, HTML, LOST, Fault, Proxy, answer, lying

pytestmark = pytest.mark.slow
FAULTS = {
    "503": lying(answer("503 Service Unavailable", b"", Retry_After="600")),
    "maintenance": lying(answer("503 Service Unavailable", b"", Prefect_Maintenance="true")),  # asked again for ever
    "429": lying(answer("429 Too Many Requests", b"", Retry_After="600")),
    "500": lying(answer("500 Internal Server Error", b"broken")),
    "HTML": lying(HTML),
    "garbage": lying(bytes(range(256))),
    "half an answer": Fault(keeps_body=1),
    "dropped": DROPPED,
    "hanging": HANGING,
}
# What a client of Prefect waits for, here short: six attempts of a minute each otherwise.
IMPATIENT = {"PREFECT_API_REQUEST_TIMEOUT": "2", "PREFECT_CLIENT_MAX_RETRIES": "1"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    quiet_environment()
    with shared_server(prefect_home()) as found:
        yield found


@contextlib.contextmanager
def proxied(server: Server) -> Iterator[tuple[Proxy, dict[str, str]]]:
    """A proxy of its own for one stage, and the environment that leads there."""
    with Proxy(server.url) as proxy:
        yield proxy, {"PREFECT_API_URL": f"{proxy.url}/api", "PREFECT_API_AUTH_STRING": server.auth}


def state_of(proxy: Proxy, server: Server) -> str:
    """What the server knows of the run that came through the proxy."""
    (run,) = {match[1] for line in proxy.asked if (match := re.search(r"/flow_runs/([0-9a-f-]{36})/set_state", line))}
    token = b64encode(server.auth.encode()).decode()
    request = urllib.request.Request(f"{server.url}/flow_runs/{run}", headers={"Authorization": f"Basic {token}"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(json.load(reply)["state"]["type"])


@pytest.mark.parametrize(
    "faults",
    [
        {"503": ("refused", 2), "HTML": ("done", 0)},
        pytest.param(dict.fromkeys(FAULTS, ("done", 0)), marks=pytest.mark.long),
    ],
)
def test_a_server_that_fails_while_a_stage_works(
    tmp_path: Path, server: Server, faults: dict[str, tuple[str, int]]
) -> None:
    """Side by side, each behind a proxy: the exit code is the work's, within seconds of its end."""
    with contextlib.ExitStack() as stack:
        stages = {}
        for fault, (kind, _) in faults.items():
            proxy, environment = stack.enter_context(proxied(server))
            folder = tmp_path / fault
            folder.mkdir()
            stages[fault] = proxy, start(folder, kind, prefect_home(), LESA_TEST_NOTE_SECONDS="5", **environment)
        for fault, (proxy, process) in stages.items():
            at_work(process)
            proxy.set(FAULTS[fault])
            (tmp_path / fault / "go").touch()
        for fault, (proxy, process) in stages.items():
            kind, code = faults[fault]
            returned, output, errors = ended(process)
            assert returned == code, (fault, errors)
            assert proxy.met > 0, fault
            if kind == "done":
                assert json.loads(output) == {"sum": 3}, fault
                assert "Prefect does not answer" in errors or "Prefect has not noted the end" in errors, fault
            else:
                assert "error: not like this" in errors.splitlines()
            assert state_of(proxy, server) == "RUNNING", "nothing else could be noted"


def test_a_slow_server_and_one_that_comes_back_note_the_run(tmp_path: Path, server: Server) -> None:
    """Slow, and nobody hears that it has noted the end; away while the stage works; both runs are Completed."""
    names = ("slow", "away")
    with contextlib.ExitStack() as stack:
        proxies, processes = {}, {}
        for name in names:
            proxies[name], environment = stack.enter_context(proxied(server))
            (tmp_path / name).mkdir()
            environment["LESA_TEST_NOTE_SECONDS"] = "100"
            if name == "slow":
                proxies[name].set(Fault(wait=0.3))
            processes[name] = start(tmp_path / name, "done", prefect_home(), **environment)
        at_work(processes["away"])
        proxies["away"].down()
        at_work(processes["slow"])
        proxies["slow"].on("POST flow_runs/", LOST)
        (tmp_path / "slow" / "go").touch()
        proxies["away"].up()
        (tmp_path / "away" / "go").touch()
        for name in names:
            returned, output, errors = ended(processes[name])
            assert returned == 0 and json.loads(output) == {"sum": 3}, (name, errors)
            assert state_of(proxies[name], server) == "COMPLETED", name


@pytest.mark.parametrize(
    "faults",
    [
        ("down", "hanging"),
        # Prefect's client waits as long as a 503 or 429 asks it to, and no setting of it says otherwise.
        pytest.param(("HTML", "500", "garbage", "dropped"), marks=pytest.mark.long),
    ],
)
def test_a_server_that_lets_no_run_begin_is_named_before_any_work(
    tmp_path: Path, server: Server, faults: tuple[str, ...]
) -> None:
    with contextlib.ExitStack() as stack:
        processes, proxies = {}, {}
        for fault in faults:
            proxies[fault], environment = stack.enter_context(proxied(server))
            if fault == "down":
                proxies[fault].down()
            else:
                proxies[fault].set(FAULTS[fault])
            (tmp_path / fault).mkdir()
            processes[fault] = start(tmp_path / fault, "done", prefect_home(), **environment, **IMPATIENT)
        for fault, process in processes.items():
            returned, output, errors = ended(process)
            assert returned == 2 and output == "", (fault, errors)
            (said,) = (line for line in errors.splitlines() if line.startswith("error: "))
            assert f"127.0.0.1:{proxies[fault].port}" in said and "did not let the run begin" in said, said
            assert "unset PREFECT_API_URL" in said and server.auth.split(":")[1] not in errors
            assert "Traceback" not in errors, fault
