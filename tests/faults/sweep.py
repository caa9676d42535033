"""How long a sweep of kills is, and when its kills come.

`python -m tests.faults` sets LESA_FAULT_KILLS; without it a sweep is a few moments long.
"""

from __future__ import annotations

import os
import random


def kills(few: int) -> int:
    """How many kills a sweep makes: as many as were asked for, else `few`."""
    return int(os.environ.get("LESA_FAULT_KILLS") or few)


def moments(whole: float, count: int, seed: int) -> list[float]:
    """`count` seeded moments, in seconds, one in each of as many equal parts of an undisturbed duration `whole`."""
    dice = random.Random(seed)
    return [(part + dice.random()) / count * whole for part in range(count)]
