"""A recorder to be killed: loads everything once, then forks a fresh recording for every line it is given.

    python -m tests.faults.forking_recorder ROOT        a line of stdin: the store to fill

Answers with the recording's pid, and with its wait status once it has ended. So a sweep of kills costs one
start-up, and every recording still is a process of its own that dies as processes die.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from lesa.params import load_params
from lesa.pipelines import load_pipeline
from lesa.record import record_all
from lesa.store import TrajectoryStore


def main() -> None:
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    workload = load_params()
    pipe = load_pipeline(workload)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                record_all(workload, TrajectoryStore.create(Path(line.strip())), pipe)
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
