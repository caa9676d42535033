"""A stage's last words and exit code, though what reports its end to Prefect never comes back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from flows.ending import Ending, Outcome, watch, watched
from flows.environment import ROOT
from lesa.errors import LesaError

# A stage whose work ends as the first word says; then its process is stuck, and hears no interrupt either.
STAGE = """
import sys, time
from flows import ending
from lesa.errors import LesaError

ending.NOTE_SECONDS = ending.STOP_SECONDS = 0.5
outcome, end = ending.Outcome(), ending.Ending()

def stuck(word=None):
    while True:
        try:
            if word is not None:
                print(word, flush=True)  # in here: the signal comes as soon as it is read
                word = None
            time.sleep(600)
        except KeyboardInterrupt:
            pass

with end.by_signals():
    end.soon_after(outcome)
    if sys.argv[1] == "at work":
        stuck("working")
    outcome.result = {"sum": 3}
    outcome.error = {"done": None, "refused": LesaError("not like this"), "failed": KeyError("x")}[sys.argv[1]]
    outcome.ended.set()
    if sys.argv[2] == "said":
        end.conclude(outcome.result, outcome.error)
    stuck()
"""


def stage(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # As a terminal's: tests in the background may have been told to ignore it, and so would the stage.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("how", "code", "error"),
    [("done", 0, ""), ("refused", 2, "error: not like this\n"), ("failed", 1, "KeyError: 'x'\n")],
)
def test_what_is_over_ends_and_says_how(how: str, code: int, error: str) -> None:
    process = stage(how, "stuck")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert output == ('{\n "sum": 3\n}\n' if how == "done" else "")
    said, note = errors[: errors.index("Prefect does not answer")], errors[errors.index("Prefect does not answer") :]
    assert said.endswith(error) and note.endswith("the work has ended\n")


def test_it_is_said_once() -> None:
    """The stage has said how it ended, and its process does not come to an end: nothing is said again."""
    process = stage("done", "said")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, json.loads(output), errors) == (0, {"sum": 3}, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_does_not_hear_it(number: int) -> None:
    process = stage("at work")
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert (process.returncode, errors) == (128 + number, f"{word}: what is committed stays, run again to go on\n")


def test_the_handlers_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before, ending = signal.getsignal(signal.SIGTERM), Ending()
    with ending.by_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert ending.conclude(error=LesaError("no")) == ending.conclude({"sum": 1}) == 2
    assert capsys.readouterr().err == "error: no\n"


def test_only_the_outer_flow_is_watched() -> None:
    outcome = Outcome()
    watch(outcome)
    assert watched() is outcome and watched() is not outcome
