"""Records in a folder that it is told, for stages that only ask: what takes seconds to import is imported once.

    python -m tests.faults.recording_server SOCKET

A client sends a folder. It is answered `pid N`, the process that records there (one of its own, to be killed), and then
what the recording returned, or `failed`. Where the folder has a file `stop-at` with a number, that process stops itself
(SIGSTOP) as it is about to write the trajectory of this number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import traceback
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from lesa.models.pipelines import load_pipeline
from lesa.params_file import load_params
from lesa.recording.drive import LocalRecorder, drive
from lesa.recording.store import TrajectoryStore

# The stage's command: standard library alone.
ASK = """
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["LESA_TEST_RECORDER"])
server.sendall(os.getcwd().encode() + b"\\n")
last = ""
for last in server.makefile():
    print(last, end="", flush=True)
sys.exit(not last.startswith("{"))
"""


def stop_at(number: int) -> None:
    """No machine is then too slow or too quick for the moment that is meant."""
    begun: list[str] = []  # zarr makes each of these folders once more

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event == "os.mkdir" else ""
        if fnmatch(path, "*.zarr/*.partial") and path not in begun:
            begun.append(path)
            if len(begun) == number:
                os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(watch)


def record(folder: str) -> str:
    os.chdir(folder)
    if Path("stop-at").exists():
        stop_at(int(Path("stop-at").read_text()))
    workload = load_params("params.yaml")
    store = TrajectoryStore.create(workload.paths.trajectories)
    recorder = LocalRecorder(load_pipeline(workload.model, workload.resources.device), workload.recording, store)
    return json.dumps(drive(workload.recording, store, contextlib.closing(recorder), logging.getLogger("record")))


def serve(client: socket.socket) -> None:
    """In a process of its own."""
    with client, client.makefile("rw") as stream:
        folder = stream.readline().rstrip("\n")
        print(f"pid {os.getpid()}", file=stream, flush=True)
        try:
            said = record(folder)
        except BaseException:
            said = f"{traceback.format_exc()}\nfailed"
        print(said, file=stream, flush=True)


def main() -> None:
    torch.set_num_threads(1)
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    print("ready", flush=True)
    while True:
        client, _ = server.accept()
        pid = os.fork()
        if pid == 0:
            serve(client)
            os._exit(0)
        client.close()
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
