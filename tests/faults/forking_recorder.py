"""A recorder to be killed: loads everything once, then forks a fresh recording for every line it is given.

    python -m tests.faults.forking_recorder ROOT      a line of stdin: the store to fill, and a pattern or nothing

Answers `pid N` when the recording starts and `ended STATUS` (its wait status) once it is over. So a sweep of kills
costs one start-up, and every recording still is a process of its own that dies as processes die. With a pattern
(a tab before it) it kills itself as it is about to open or make the first path that matches it.
"""

from __future__ import annotations

import os
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from lesa.models.pipelines import load_pipeline
from lesa.params_file import load_params
from lesa.recording.store import TrajectoryStore
from tests.helpers.recording import record


def die_at(pattern: str) -> None:
    """SIGKILL from within, so that no machine is too slow or too quick for the moment that is meant."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in {"open", "os.mkdir"} and fnmatch(str(arguments[0]), pattern):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main() -> None:
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    workload = load_params()
    pipe = load_pipeline(workload.model, workload.resources.device)
    print("ready", flush=True)
    for line in sys.stdin:
        store, _, pattern = line.rstrip("\n").partition("\t")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if pattern:
                    die_at(pattern)
                record(workload, pipe, TrajectoryStore.create(Path(store)))
                code = 0
            finally:
                os._exit(code)
        print("pid", pid, flush=True)
        print("ended", os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
