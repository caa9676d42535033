"""The fixed list of planted faults: mistakes that an honest programmer could make at a call site.

Swapped arguments, the wrong split, off by one, the wrong end of an interval, a missing reset, a wrong sign or axis, min
for max, a stale variable. A fault stays in the list when a test is written for it.
"""

from __future__ import annotations

from tests.planted import judging, measuring, predicting, sampling, searching, training
from tests.planted.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *sampling.FAULTS,
    *predicting.FAULTS,
    *training.FAULTS,
    *searching.FAULTS,
    *measuring.FAULTS,
    *judging.FAULTS,
)
