"""What the search for the peers' best steps tries: moves, kicks and starts, of a solver's grid or a rule's full steps.

The search itself is `lesa.search.local_search`, the same as for our own schedules. The judge runs the pipeline on
tuning prompts and is expensive; `guessed_optimum` makes starts from a cheap guess (`recorded_path`). A guess only ever
chooses starts: near an optimum errors of different steps cancel, and no guess from recorded velocities has been found
to order candidates there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache

import torch

from lesa.search.local_search import Move, moved
from lesa.search.trials import Steps

Guess = Callable[[Steps], float]  # the smaller the better
_KICK = 3  # random moves away from the best steps, where the search goes on from when it is stuck
_KICK_STRIDES = (-3, -2, 2, 3)
_GUESSES = 600  # that a descent by a guess may take


def moves(steps: Steps, generator: torch.Generator | None = None) -> list[Move]:
    """One step moved by one, then one and all after it; in a fixed order, nothing is drawn."""
    count = len(steps)
    alone = [_move(count, place, place + 1, by) for by in (1, -1) for place in range(1, count)]
    tails = [_move(count, place, count, by) for by in (1, -1) for place in range(1, count - 1)]
    return [*alone, *tails]


def _move(count: int, first: int, last: int, by: int) -> Move:
    """The steps from `first` on, before `last`, by so many."""
    return tuple(by if first <= place < last else 0 for place in range(count))


def kicked(steps: Steps, generator: random.Random, *, num_steps: int) -> Steps:
    """The steps after a few random moves of one step, those that fit."""
    for _ in range(_KICK):
        place, stride = generator.randrange(1, max(len(steps), 2)), generator.choice(_KICK_STRIDES)
        move = _move(len(steps), place, place + 1, stride)
        steps = next((candidate for _, candidate in moved(steps, [move], num_steps)), steps)
    return steps


def guessed_optimum(guess: Guess, start: Steps, num_steps: int) -> Steps:
    """Where steepest descent by a cheap guess ends."""
    guess = cache(guess)
    current, spent = tuple(start), 0
    while spent < _GUESSES:
        around = [candidate for _, candidate in moved(current, moves(current), num_steps)]
        spent += len(around)
        best = min(around, key=guess, default=current)
        if guess(best) >= guess(current):
            break
        current = best
    return current


def insertions(steps: Steps, num_steps: int) -> list[Steps]:
    """The steps with one more, anywhere: where a search with one evaluation more may start."""
    return [tuple(sorted((*steps, step))) for step in range(1, num_steps) if step not in steps]


def spread_starts(num_steps: int, count: int) -> list[Steps]:
    """`count` steps spread evenly, denser at one end, denser at the other, and at both (cosine)."""
    shapes: list[Callable[[float], float]] = [
        lambda u: u,
        lambda u: u**1.5,
        lambda u: 1 - (1 - u) ** 1.5,
        lambda u: (1 - math.cos(math.pi * u)) / 2,
    ]
    spread = [_distinct([shape(i / count) * num_steps for i in range(count)], num_steps) for shape in shapes]
    return list(dict.fromkeys(spread))


def _distinct(places: Sequence[float], num_steps: int) -> Steps:
    """Rounded to increasing steps below `num_steps`, the first being 0."""
    steps = [0]
    for index, place in enumerate(places[1:], start=1):
        highest = num_steps - (len(places) - index)
        steps.append(min(max(round(place), steps[-1] + 1), highest))
    return tuple(steps)
