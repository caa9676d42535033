"""A schedule raced against the best so far, the incumbent, until it is plainly worse.

Neighbouring schedules fail on the same trajectories, so the differences of their errors vary much less than the errors
do, and a few of them tell most of the worse ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from lesa import atomic
from lesa.params import Report

STRIDE = 8  # trajectories run at a time
BEHIND = 2.0  # standard errors of the mean difference by which a trial is eliminated
WORST = 1e3  # dB: of a run that left the finite numbers


@dataclass(frozen=True, slots=True)
class Trial:
    """What a schedule came to.

    error: in dB, of all trajectories; of an eliminated trial the incumbent's error and the mean difference to it over
        the trajectories that were run.
    errors: in dB, of the trajectories that were run.
    """

    error: float
    errors: tuple[float, ...]

    @classmethod
    def of(cls, errors: Sequence[float], incumbent: Trial | None = None) -> Trial:
        """Of the errors of all trajectories; with an incumbent, of the first ones."""
        finite = [error if math.isfinite(error) else WORST for error in errors]
        if WORST in finite:
            return cls(WORST, tuple(finite))
        if incumbent is None or len(errors) == len(incumbent.errors):
            return cls(fmean(finite), tuple(finite))
        behind = fmean(a - b for a, b in zip(finite, incumbent.errors, strict=False))
        return cls(incumbent.error + behind, tuple(finite))


def run_trial(places: Sequence[int], run: Callable[[list[int]], list[float]], incumbent: Trial | None) -> Trial:
    """Run a schedule on trajectories, `STRIDE` at a time, until it is eliminated or all were run.

    Args:
        places: trajectories, in the order of the incumbent's errors.
        run: the errors of some of them, in dB.
        incumbent: the best schedule's trial, run on all of them; None runs all.
    """
    if incumbent is not None and incumbent.error == WORST:
        incumbent = None
    errors: list[float] = []
    for start in range(0, len(places), STRIDE):
        errors += run(list(places[start : start + STRIDE]))
        if not all(map(math.isfinite, errors)) or (incumbent is not None and _eliminated(errors, incumbent.errors)):
            break
    return Trial.of(errors, incumbent)


def _eliminated(errors: Sequence[float], incumbents: Sequence[float]) -> bool:
    """Whether the mean difference is more standard errors behind than chance explains."""
    if len(errors) < STRIDE:
        return False  # too few to tell
    differences = [a - b for a, b in zip(errors, incumbents, strict=False)]
    return fmean(differences) > BEHIND * stdev(differences) / math.sqrt(len(differences))


Steps = tuple[int, ...]  # increasing from 0
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
        self.made: list[tuple[Run, Trial]] = []
        self.known: dict[Run, Trial] = {}
        self._journal, self._key, self._report = journal, key, report
        self._kept = read_journal(journal, key)

    def make(self, run: Run, value: str, play: Callable[[], Trial]) -> Trial:
        """Make a run, or take it from the journal where it was the next one there; `value` names its error."""
        place = len(self.made)
        if place < len(self._kept) and self._kept[place][0] == run:
            trial = self._kept[place][1]
        else:
            trial, self._kept = play(), []
        self.made.append((run, trial))
        self.known[run] = trial
        if not self._kept:
            write_journal(self._journal, self._key, self.made)
        best = min(trial.error for (iterations, _), trial in self.known.items() if iterations == run[0])
        self._report(len(self.made), {f"{value}_db": trial.error, f"best_{value}_db": best})
        return trial


def read_journal(path: Path, key: str) -> list[tuple[Run, Trial]]:
    """The runs that are done; none where the journal is of another search or torn."""
    try:
        record = json.loads(path.read_text())
        if record["key"] == key:
            return [
                ((int(iterations), tuple(steps)), Trial(error=float(error), errors=tuple(map(float, errors))))
                for iterations, steps, error, errors in record["runs"]
            ]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the runs are made again
    return []


def write_journal(path: Path, key: str, runs: list[tuple[Run, Trial]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[iterations, list(steps), trial.error, list(trial.errors)] for (iterations, steps), trial in runs]
    atomic.write_json(path, {"key": key, "runs": rows})
