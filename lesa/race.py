"""A schedule run against the best so far, trajectory by trajectory, until it has plainly lost.

Neighbouring schedules fail on the same trajectories, so the differences of their errors vary much less than the errors
do, and a few of them tell most losers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

STRIDE = 8  # trajectories run at a time
BEHIND = 2.0  # standard errors of the mean difference that a loser is behind
WORST = 1e3  # dB: of a run that left the finite numbers


@dataclass(frozen=True, slots=True)
class Race:
    """What a schedule came to.

    error: in dB, of all trajectories; of a loser the best one's error and the mean difference to it, so far as it ran.
    errors: in dB, of the trajectories that were run.
    """

    error: float
    errors: tuple[float, ...]

    @classmethod
    def of(cls, errors: Sequence[float], rival: Race | None = None) -> Race:
        """Of the errors of all trajectories; with a rival, of the first ones."""
        finite = [error if math.isfinite(error) else WORST for error in errors]
        if WORST in finite:
            return cls(WORST, tuple(finite))
        if rival is None or len(errors) == len(rival.errors):
            return cls(fmean(finite), tuple(finite))
        behind = fmean(a - b for a, b in zip(finite, rival.errors, strict=False))
        return cls(rival.error + behind, tuple(finite))


def raced(places: Sequence[int], run: Callable[[list[int]], list[float]], rival: Race | None) -> Race:
    """Run a schedule on trajectories, `STRIDE` at a time, until it has lost or they are through.

    Args:
        places: trajectories, in the order of the rival's errors.
        run: the errors of some of them, in dB.
        rival: the best schedule's race, run on all of them; None runs all.
    """
    if rival is not None and rival.error == WORST:
        rival = None
    errors: list[float] = []
    for start in range(0, len(places), STRIDE):
        errors += run(list(places[start : start + STRIDE]))
        if not all(map(math.isfinite, errors)) or (rival is not None and _lost(errors, rival.errors)):
            break
    return Race.of(errors, rival)


def _lost(errors: Sequence[float], rivals: Sequence[float]) -> bool:
    if len(errors) < STRIDE:
        return False  # too few to tell
    differences = [a - b for a, b in zip(errors, rivals, strict=False)]
    return fmean(differences) > BEHIND * stdev(differences) / math.sqrt(len(differences))
