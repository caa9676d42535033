"""`make retrain-local`: Prefect server, work pool, deployment and worker on this machine, until Ctrl-C.

Everything listens on loopback only. The server asks for a password that is made at the first start and lies
in .prefect/local/password, readable by this user alone; the page in the browser asks for it once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flows.environment import LOOPBACK, ROOT, prefect_home
from flows.prefect_server import START_TIMEOUT_SECONDS, healthy
from flows.processes import end, identify
from lesa.errors import redacted

POOL = "lesa"
STOP_SECONDS = 20.0


def local_environment(home: Path, port: int) -> dict[str, str]:
    """The environment of server, worker and their children."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    password = home / "password"
    if not password.exists():
        descriptor = os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"lesa:{secrets.token_urlsafe(18)}")
    auth = password.read_text()
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://{LOOPBACK}:{port}/api",
        "PREFECT_API_AUTH_STRING": auth,
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_SERVER_API_HOST": LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
    }


@contextlib.contextmanager
def child(
    arguments: list[str], environment: dict[str, str], log: Path | None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the block; at its end the process and all its descendants are gone."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(log, "ab")) if log else None
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        known = identify(process.pid)
        try:
            yield process
        finally:
            end([known] if known else [], patience_s=STOP_SECONDS)
            process.kill()  # nothing where it has ended
            process.wait()


def prefect(*arguments: str, environment: dict[str, str]) -> None:
    """One Prefect command; its output is shown when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"prefect {' '.join(arguments)} failed:\n{redacted(done.stdout + done.stderr)}")


def wait_for_server(server: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        if healthy(environment["PREFECT_API_URL"], environment["PREFECT_API_AUTH_STRING"]):
            return
        time.sleep(0.2)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the Prefect server did not start (is the port taken?); the end of {log}:\n{redacted(tail)}")


def run_local(port: int) -> None:
    """Server, pool, deployments and worker until interrupted."""
    home = prefect_home() / "local"
    environment = local_environment(home, port)
    log = home / "server.log"
    python = [sys.executable, "-m", "prefect"]
    with child(
        [*python, "server", "start", "--host", LOOPBACK, "--port", str(port)], environment, log
    ) as server:
        wait_for_server(server, environment, log)
        prefect("work-pool", "create", POOL, "--type", "process", "--overwrite", environment=environment)
        prefect("deploy", "--all", environment=environment)
        subprocess.run([*python, "deployment", "ls"], cwd=ROOT, env=environment, check=False)
        subprocess.run(
            [*python, "deployment", "schedule", "ls", "retrain/nightly"],
            cwd=ROOT,
            env=environment,
            check=False,
        )
        print(f"server http://{LOOPBACK}:{port} (password in {home / 'password'}, log in {log})")
        print("run it now: prefect deployment run retrain/nightly; stop all with Ctrl-C", flush=True)
        with child([*python, "worker", "start", "--pool", POOL, "--limit", "1"], environment, None) as worker:
            while worker.poll() is None and server.poll() is None:
                time.sleep(0.5)
        raise RuntimeError("the worker or the server ended by itself; its output is above and in the log")


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.retrain_local", description="Scheduled retraining on this machine."
    )
    parser.add_argument("--port", type=int, default=4200, help="port of the Prefect server on loopback")
    args = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        run_local(args.port)
    except KeyboardInterrupt:
        print("stopped: server, worker and runs are gone; deployments and history stay in .prefect/local")
        return 0
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
