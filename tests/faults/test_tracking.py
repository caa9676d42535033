"""MLflow down, silent, slow or talking nonsense: training goes on, within a bound, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.environment import ROOT, state_folder
from flows.tracking import sender
from flows.tracking.client import connect
from flows.tracking.run import tracked_run
from lesa.locks import is_free

pytestmark = pytest.mark.slow
CANARY = "canary-7f3a9b"


@contextlib.contextmanager
def tcp_server(
    answer: Callable[[socket.socket], None], asked: threading.Event | None = None
) -> Iterator[str]:
    """A server on loopback that treats every connection in its own way; sets `asked` when one came."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(60)
            connection.recv(65536)
            if asked is not None:
                asked.set()
            answer(connection)

    def accept() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://user:{CANARY}@127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.close()


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def drip(connection: socket.socket) -> None:
    for byte in http("200 OK", b"{" + b" " * 1000 + b"}"):
        connection.sendall(bytes([byte]))
        time.sleep(0.5)


FAULTS: dict[str, Callable[[socket.socket], None]] = {
    "silent": lambda connection: time.sleep(60),
    "error 500": lambda connection: connection.sendall(http("500 Oops", b"broken")),
    "garbage": lambda connection: connection.sendall(os.urandom(512)),
    "not JSON": lambda connection: connection.sendall(http("200 OK", b"<html>hello</html>")),
    "hangs up": lambda connection: connection.close(),
    "drips": drip,
}


@pytest.mark.parametrize("fault", [*FAULTS, "down"])
def test_training_does_not_wait_for_a_broken_server(fault, tmp_path, monkeypatch, caplog):
    asked = threading.Event()
    with contextlib.ExitStack() as stack:
        if fault == "down":
            with socket.create_server(("127.0.0.1", 0)) as probe:
                url = f"http://user:{CANARY}@127.0.0.1:{probe.getsockname()[1]}"
        else:
            url = stack.enter_context(tcp_server(FAULTS[fault], asked))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setattr("flows.tracking.run.DRAIN_SECONDS", 1.5)
        start = time.monotonic()
        with tracked_run("stage x", experiment="lesa-x", params={}, tags={}, root=tmp_path) as run:
            for step in range(200):
                run.report(step, {"loss": float(step)})
            worked = time.monotonic() - start
            assert fault == "down" or asked.wait(30), "the sender must have met the fault"
            start = time.monotonic()
        ended = time.monotonic() - start
    assert worked < 1.0, "reporting must not wait"
    assert ended < 4.0, "closing waits for a bounded time"
    assert run.reporter.path.exists(), "what was not taken is kept"
    assert "is kept in" in caplog.text
    assert CANARY not in caplog.text

    # The server is well again: the same run arrives whole, once. (Here: the local database takes its place.)
    stop_sender(tmp_path)
    said = (state_folder(tmp_path) / "sender.log").read_text()
    assert CANARY not in said
    if fault == "down":
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert sender.send_all(tmp_path) == 0
        client = connect(tmp_path)
        experiment = client.get_experiment_by_name("lesa-x").experiment_id
        (found,) = client.search_runs([experiment])
        assert found.info.status == "FINISHED"
        assert len(client.get_metric_history(found.info.run_id, "loss")) == 200


def test_a_sender_that_nobody_needs_ends(tmp_path):
    """Also when its request never comes back."""
    with tcp_server(FAULTS["silent"]) as url:
        (state_folder(tmp_path) / "20260101T000000-00000000.jsonl").write_text(
            '{"kind":"start","experiment":"x","name":"x","time":1,"params":{},"tags":{}}\n'
        )
        code = (
            "import sys\nfrom pathlib import Path\nfrom flows.tracking import sender\n"
            "sender.LINGER_SECONDS = 1.0\nsender.send_all(Path(sys.argv[1]), background=True)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "MLFLOW_TRACKING_URI": url, "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"},
        )
        assert process.wait(timeout=30) == 0
    assert list(state_folder(tmp_path).glob("*.jsonl"))


def stop_sender(root: Path) -> None:
    """Ends the sender that this root's runs started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"flows.tracking.sender" in words and str(root).encode() in words:
                    os.kill(int(entry.name), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not is_free(state_folder(root) / "sender.lock") and time.monotonic() < deadline:
        time.sleep(0.05)
