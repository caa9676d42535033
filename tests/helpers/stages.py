"""A tiny stage in a process of its own: at work until it is told to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from flows.environment import ROOT

STAGE = """
import os, sys, time
from pathlib import Path
from flows import ending
from flows.prefect_flow import flow, task
from flows.ray_jobs import ray_session
from flows.stage import stage_main
from lesa.errors import LesaError

ending.NOTE_SECONDS = float(os.environ.get("LESA_TEST_NOTE_SECONDS", "3"))

def wait(folder):
    print("working", flush=True)
    while not (Path(folder) / "go").exists():
        time.sleep(0.1)

@task(name="work")
def work(how):
    kind, folder = how.split(":")
    if kind == "ray":
        with ray_session(1) as ray:
            call = ray.remote(lambda: time.sleep(600)).remote()
            print("working", flush=True)
            ray.wait([call])
    wait(folder)
    if kind == "refused":
        raise LesaError("not like this")
    return {"sum": 3}

@flow(name="tiny")
def tiny(workload: str | None = None) -> dict:
    "A tiny stage."
    return work(workload)

if __name__ == "__main__":
    raise SystemExit(stage_main(tiny, check=lambda name: None))
"""


def start(folder: Path, kind: str, home: Path, **environment: str) -> subprocess.Popen[str]:
    """The stage, on its way to its work; that ends once a file `go` is in its folder.

    Args:
        kind: how the work goes: `ray` waits for an actor, `refused` ends with a refusal, any other with a result.
        home: Prefect's.
    """
    script = folder / "tiny.py"
    script.write_text(STAGE)
    return subprocess.Popen(
        [sys.executable, str(script), "--workload", f"{kind}:{folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As a terminal's: tests in the background may have been told to ignore it, and so would the stage.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def at_work(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """The stage, once it is at work."""
    assert process.stdout is not None
    for line in process.stdout:
        if line == "working\n":
            return process
    raise AssertionError(process.communicate()[1])


def begin(folder: Path, kind: str, home: Path) -> subprocess.Popen[str]:
    """The stage, at work."""
    return at_work(start(folder, kind, home))


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a stage that has to end by itself, in good time also on a busy machine."""
    try:
        output, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    return process.returncode, output, errors
