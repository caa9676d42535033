"""A command under its supervisor: its code and output as they are; asked to end, also where nobody is left to ask."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.environment import ROOT
from flows.supervisor import supervised

# Puts its things away when it is asked to end, a moment after the one that stands for the shell above it has gone.
WORK = """
import signal, subprocess, sys, time
from pathlib import Path
inner = (
    "import signal, sys, time; from pathlib import Path\\n"
    "def stop(*_):\\n"
    "    time.sleep(0.5); Path('put-away').touch(); sys.exit()\\n"
    "signal.signal(signal.SIGTERM, stop); print('working', flush=True); time.sleep(600)\\n"
)
raise SystemExit(subprocess.run([sys.executable, "-c", inner]).returncode)
"""
ASKER = """
import os, sys
from pathlib import Path
from flows.supervisor import supervised
folder = Path(sys.argv[1])
process = supervised([sys.executable, "-c", sys.argv[2]], folder, os.environ, folder / "work.lock")
print(process.stdout.readline().decode(), end="", flush=True)
process.wait()
"""


def start(folder: Path, script: str) -> subprocess.Popen[bytes]:
    return supervised([sys.executable, "-c", script], folder, os.environ, folder / "work.lock")


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Exit code and output; its input stays open until then."""
    assert process.stdin is not None and process.stdout is not None
    output = process.stdout.read()
    code = process.wait(120)
    process.stdin.close()
    process.stdout.close()
    return code, output


@pytest.mark.parametrize(
    ("script", "code"), [("print('hello')", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_code_and_output_are_the_commands(tmp_path: Path, script: str, code: int) -> None:
    assert ended(start(tmp_path, script)) == (code, b"hello\n" if code == 0 else b"")
    assert not (tmp_path / "work.lock").exists()


def test_closing_its_input_asks_the_whole_group(tmp_path: Path) -> None:
    process = start(tmp_path, WORK)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    process.stdin.close()
    assert process.wait(120) == 128 + signal.SIGTERM
    process.stdout.close()
    assert (tmp_path / "put-away").exists()


def test_a_killed_asker_is_as_good_and_the_next_one_waits(tmp_path: Path) -> None:
    asker = subprocess.Popen(
        [sys.executable, "-c", ASKER, str(tmp_path), WORK], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert asker.stdout is not None and asker.stdout.readline() == "working\n"
    asker.kill()
    asker.communicate()
    process = start(tmp_path, "from pathlib import Path; print(Path('put-away').exists())")
    assert ended(process) == (0, b"True\n"), "the next one ran beside the last"


def test_what_does_not_hear_is_forced(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('working', flush=True); time.sleep(600)"
    quick = "import flows.supervisor as s, sys; s.STOP_SECONDS = 0.5; raise SystemExit(s.main(*sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", quick, str(tmp_path), str(tmp_path / "work.lock"), sys.executable, "-c", deaf],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    before = time.monotonic()
    process.stdin.close()
    assert process.wait(120) == 128 + signal.SIGKILL
    process.stdout.close()
    assert time.monotonic() - before > 0.4, "it was asked first"
