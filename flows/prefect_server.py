"""One short-lived Prefect server for all stages of a run.

A flow without a server starts a temporary one of its own (9-17 s) and a pipeline has six flows. So the first
stage starts a background server on loopback, later stages find it through a file, and it stops by itself when
no flow has held its lease for a while. Nothing of it is needed afterwards: what matters is on disk.

    python -m flows.prefect_server status | stop

Files, all under the Prefect home (private, ignored by git):
    server.json   process, url and the password of this server (mode 0600)
    server.lock   there while somebody starts or stops the server
    server.lease  shared lock of every running flow; the kernel frees it when a process dies
    server.log    the server's own output
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

from flows.confidential import keep_secrets
from flows.environment import LOOPBACK, ROOT, prefect_home, quiet_environment
from flows.processes import Process, command_line, identify, is_running, send
from lesa.atomic import write_json
from lesa.errors import redacted
from lesa.locks import file_lock, is_free, process_alive, shared_lock
from lesa.strict_json import StrictJsonError, parse
from lesa.validation import build, setting

IDLE_SECONDS = 60.0  # longer than DVC ever pauses between two stages to hash what they wrote
START_TIMEOUT_SECONDS = 120.0  # a fresh database is migrated at the first start, 10-20 s on two busy cores
_MAX_BYTES = 4096  # of server.json


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where a running server is, and the password it asks for."""

    pid: int = setting(low=1)
    start: str  # what `flows.processes` knows it by; empty where the system does not tell
    url: str
    auth: str = dataclasses.field(repr=False)


def _starting_or_stopping(home: Path) -> contextlib.AbstractContextManager[None]:
    """Held by who starts or stops the server of this home."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return file_lock(home / "server.lock", timeout=math.inf, mode=0o600)


def healthy(url: str, auth: str, timeout: float = 5.0) -> bool:
    """Whether the API at `url` answers and knows the password."""
    token = b64encode(auth.encode()).decode()
    request = urllib.request.Request(f"{url}/admin/version", headers={"Authorization": f"Basic {token}"})
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # loopback never goes through a proxy
    try:
        with opener.open(request, timeout=timeout) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError, ValueError):
        return False


def read(home: Path) -> Server | None:
    """The server of this home if its process is alive, else None."""
    try:
        document = parse((home / "server.json").read_bytes(), max_bytes=_MAX_BYTES)
    except (OSError, StrictJsonError):
        return None
    problems: list[str] = []
    server = build(Server, document, "server.json", problems)
    return server if not problems and _runs(server) else None


def _runs(server: Server) -> bool:
    """Whether it is this server that has the number, and not a stranger's process that was given it since."""
    if not server.start:  # a system that does not tell; elsewhere that server ended as it started
        return identify(os.getpid()) is None and process_alive(server.pid)
    process = Process(server.pid, server.start)
    return is_running(process) and "flows.prefect_server" in command_line(process)


def _signal(server: Server, number: int) -> None:
    """Sends a signal to the server; to nobody where it is not proved that the process is it."""
    if _runs(server):
        send(Process(server.pid, server.start), number)


@contextlib.contextmanager
def shared_server(home: Path) -> Iterator[Server]:
    """Finds or starts the server of this home and keeps it from stopping while the block runs.

    Raises RuntimeError (with the end of the log) when it does not come up in time.
    """
    with contextlib.ExitStack() as stack:
        # The lease is taken inside the start lock: the server decides to stop under the same lock, so it can
        # never stop between our finding it and our holding it.
        with _starting_or_stopping(home):
            stack.enter_context(shared_lock(home / "server.lease"))
            server = read(home)
            if server is None or not _wait_healthy(server):
                server = _start(home)
        yield server


def _wait_healthy(server: Server, seconds: float = START_TIMEOUT_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and _runs(server):
        if healthy(server.url, server.auth):
            return True
        time.sleep(0.1)
    return False


def _start(home: Path) -> Server:
    stale = read(home)
    if stale is not None:  # alive, but it stopped answering
        _signal(stale, signal.SIGKILL)
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    auth = f"lesa:{secrets.token_urlsafe(24)}"
    log_path = home / "server.log"
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flows.prefect_server",
                "serve",
                "--home",
                str(home),
                "--port",
                str(port),
                "--idle-seconds",
                str(IDLE_SECONDS),
            ],
            env={**_server_environment(home), "PREFECT_SERVER_API_AUTH_STRING": auth},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C of one stage is not meant for it
        )
    known = identify(process.pid)
    url = f"http://{LOOPBACK}:{port}/api"
    server = Server(pid=process.pid, start=known.start if known else "", url=url, auth=auth)
    write_json(home / "server.json", dataclasses.asdict(server), mode=0o600)
    if not _wait_healthy(server):
        process.kill()
        tail = log_path.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the Prefect server did not start; the end of {log_path}:\n{redacted(tail)}")
    return server


def _server_environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"PREFECT_API_URL", "PREFECT_API_AUTH_STRING"}}
    return {
        **kept,
        "PREFECT_HOME": str(home),
        "PREFECT_UI_ENABLED": "0",
        "PREFECT_SERVER_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",  # no scheduler, no late-run service: nobody deploys to it
        "PREFECT__SERVER_FINAL": "1",
    }


def stop(home: Path, seconds: float = 10.0) -> bool:
    """Stops the server of this home; True when there was one."""
    with _starting_or_stopping(home):
        server = read(home)
        (home / "server.json").unlink(missing_ok=True)
    if server is None:
        return False
    _signal(server, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while _runs(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(server, signal.SIGKILL)
    return True


def _serve(home: Path, port: int, idle_seconds: float) -> None:
    """The server process: Prefect's API on loopback until nobody has needed it for `idle_seconds`."""
    import uvicorn
    from prefect.server.api.server import create_app

    config = uvicorn.Config(create_app(), host=LOOPBACK, port=port, log_level="error", lifespan="on")
    server = uvicorn.Server(config)

    def watch() -> None:
        last_used = time.monotonic()
        while not server.should_exit:
            time.sleep(min(2.0, idle_seconds / 4))
            if not home.is_dir():  # a temporary checkout was removed under us
                server.should_exit = True
                return
            if not is_free(home / "server.lease", shared=True):
                last_used = time.monotonic()
            elif time.monotonic() - last_used > idle_seconds:
                with _starting_or_stopping(home):
                    if is_free(home / "server.lease", shared=True):  # a lease is taken under this lock only
                        known = read(home)
                        if known is not None and known.pid == os.getpid():
                            (home / "server.json").unlink(missing_ok=True)
                        server.should_exit = True

    threading.Thread(target=watch, daemon=True, name="idle-watch").start()
    server.run()
    # The lifespan has closed the database; Prefect's leftover threads must not keep an idle server alive.
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """`status` and `stop` are for people, `serve` is what `shared_server` starts."""
    parser = argparse.ArgumentParser(prog="python -m flows.prefect_server", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("serve", "status", "stop"))
    parser.add_argument("--home", type=Path, default=None, help="Prefect home (default: the repository's)")
    parser.add_argument("--port", type=int, default=4200)
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS)
    args = parser.parse_args(argv)
    quiet_environment()
    keep_secrets()
    home = args.home or prefect_home()
    if args.command == "serve":
        _serve(home, args.port, args.idle_seconds)
    elif args.command == "stop":
        print("stopped" if stop(home) else "not running")
    else:
        server = read(home)
        print(f"running: pid {server.pid}, {server.url}" if server else "not running")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
