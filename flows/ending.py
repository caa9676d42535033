"""How the process of a stage ends: what it says last, its exit code, and never long after its work.

Exit codes: 0 done, 1 failed, 2 refused (one message, no traceback), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from flows.confidential import is_refusal, printed
from lesa.errors import redacted

NOTE_SECONDS = 15.0  # after its work a stage waits so long for Prefect to note its end
STOP_SECONDS = 25.0  # after a signal so long for its work to let go; `flows.repro` waits a little longer


@dataclasses.dataclass(slots=True)
class Outcome:
    """How the work of a flow ended, whatever becomes of Prefect's record of it."""

    began: bool = False
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None
    on_sigterm: Any = None  # handler of SIGTERM while the work runs, instead of Prefect's


_watched: Outcome | None = None


def watch(outcome: Outcome | None) -> None:
    """The next flow of this process notes there how its work ends."""
    global _watched
    _watched = outcome


def watched() -> Outcome:
    """Where a flow that begins notes its end; a flow inside it is not the stage."""
    outcome = _watched or Outcome()
    watch(None)
    return outcome


class Ending:
    """Says once how the stage ended."""

    def __init__(self) -> None:
        self._said = threading.Lock()
        self._code: int | None = None
        self._signal = signal.SIGINT

    def conclude(self, result: Any = None, error: BaseException | None = None) -> int:
        """Prints the result or what went wrong, unless that was done already; the exit code."""
        with self._said:
            if self._code is None:
                self._code = self._say(result, error)
            return self._code

    def soon_after(self, outcome: Outcome) -> None:
        """Ends this process NOTE_SECONDS after the work at the latest, whatever Prefect is still waiting for."""

        def end() -> None:
            outcome.ended.wait()
            time.sleep(NOTE_SECONDS)
            with self._said:
                is_late = self._code is None
            code = self.conclude(outcome.result, outcome.error)
            if is_late:
                print("Prefect does not answer, its record of this run stays open; the work has ended", file=sys.stderr)
            _leave(code)

        threading.Thread(target=end, daemon=True, name="ending").start()

    @contextlib.contextmanager
    def by_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the block as a `KeyboardInterrupt`, so that sessions and locks are closed.

        No other exception gets through a call that waits for Ray.
        """
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self._signal = signal.Signals(number)

        def end() -> None:
            time.sleep(STOP_SECONDS)
            _leave(self.conclude(error=KeyboardInterrupt()))

        threading.Thread(target=end, daemon=True, name="stopping").start()
        raise KeyboardInterrupt

    def _say(self, result: Any, error: BaseException | None) -> int:
        if error is None:
            if result is not None:
                print(json.dumps(result, indent=1, sort_keys=True, default=str), flush=True)
            return 0
        if isinstance(error, KeyboardInterrupt):
            word = "terminated" if self._signal is signal.SIGTERM else "interrupted"
            print(f"{word}: what is committed stays, run again to go on", file=sys.stderr)
            return 128 + self._signal
        if is_refusal(error):
            print(f"error: {redacted(str(error))}", file=sys.stderr)
            return 2
        print(printed(error), end="", file=sys.stderr)
        return 1


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
