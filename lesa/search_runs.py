"""What a search has run: told as it ends, and kept in a file, so that a search that was killed goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lesa import atomic
from lesa.finalists import Steps
from lesa.loop import Report
from lesa.race import Race

Run = tuple[int, Steps]  # optimiser steps before it, full steps


class Runs:
    """The runs of one search in their order.

    Begun again, a search asks for the same runs in the same order: those that its journal has are taken from it.

    Args:
        journal: the file.
        key: identity of the search: what its errors depend on.
        report: called after every run with how many there are, its error and the lowest so far, in dB.

    Attributes:
        made: every run and what it came to.
        known: the same by run; of one that was made again, the last.
    """

    def __init__(self, journal: Path, key: str, report: Report) -> None:
        self.made: list[tuple[Run, Race]] = []
        self.known: dict[Run, Race] = {}
        self._journal, self._key, self._report = journal, key, report
        self._kept = read_journal(journal, key)

    def make(self, run: Run, value: str, play: Callable[[], Race]) -> Race:
        """Make a run, or take it from the journal where it was the next one there; `value` names its error."""
        place = len(self.made)
        if place < len(self._kept) and self._kept[place][0] == run:
            race = self._kept[place][1]
        else:
            race, self._kept = play(), []
        self.made.append((run, race))
        self.known[run] = race
        if not self._kept:
            write_journal(self._journal, self._key, self.made)
        best = min(race.error for (iterations, _), race in self.known.items() if iterations == run[0])
        self._report(len(self.made), {f"{value}_db": race.error, f"best_{value}_db": best})
        return race


def read_journal(path: Path, key: str) -> list[tuple[Run, Race]]:
    """The runs that are done; none where the journal is of another search or torn."""
    try:
        record = json.loads(path.read_text())
        if record["key"] == key:
            return [
                ((int(iterations), tuple(steps)), Race(error=float(error), errors=tuple(map(float, errors))))
                for iterations, steps, error, errors in record["runs"]
            ]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing is lost but time
    return []


def write_journal(path: Path, key: str, runs: list[tuple[Run, Race]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[iterations, list(steps), race.error, list(race.errors)] for (iterations, steps), race in runs]
    atomic.write_json(path, {"key": key, "runs": rows})
