"""A local search for the best steps: of a solver's grid, or of a rule's full steps. One search for both.

The judge runs the pipeline on tuning prompts and is expensive; `guessed_optimum` makes starts from a cheap guess
(`recorded_path`). A guess only ever chooses starts: near an optimum errors of different steps cancel, and no
guess from recorded velocities has been found to order candidates there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise

from lesa.params import Report

Steps = tuple[int, ...]
Evaluate = Callable[[Steps], float]  # the smaller the better
Move = tuple[str, int, int]  # kind, place in the steps, stride
_KICK = 3  # random moves away from the best steps, where the search goes on from when it is stuck
_KICK_STRIDES = (-3, -2, 2, 3)
_GUESSES = 600  # that a descent by a guess may take


def search_steps(
    evaluate: Evaluate,
    starts: Iterable[Steps],
    num_steps: int,
    *,
    budget_of_evaluations: int,
    report: Report | None = None,
    seed: int = 0,
) -> Steps:
    """The best steps found; all starts are of one length, and step 0 is never moved.

    Iterated local search. Every start is judged first. From the best one on, steps a move away are judged until some
    are better, and the search goes on from those; the move that helped last is tried again first. Where nothing a move
    away is better, the search goes on from the best steps with a few random moves, until the budget is spent or
    nothing is left to judge.

    Args:
        evaluate: called at most once for the same steps; the smaller the better.
        starts: where to begin.
        num_steps: of the plain run.
        budget_of_evaluations: calls of `evaluate`, at least one.
        report: called after every evaluation with their number and the best value yet.
        seed: of the random moves.

    Raises:
        ValueError: no starts, or starts that are not increasing steps of the run from 0, of one length.
    """
    first = [tuple(start) for start in dict.fromkeys(starts)]
    _check(first, num_steps, budget_of_evaluations)
    known: dict[Steps, float] = {}

    def judged(steps: Steps) -> float:
        if steps in known:
            return known[steps]
        if len(known) >= budget_of_evaluations:
            return math.inf
        known[steps] = evaluate(steps)
        if report is not None:
            report(len(known), {"runs": float(len(known)), "best": min(known.values())})
        return known[steps]

    for start in first:
        judged(start)
    generator, idle = random.Random(seed), 0
    current = best_of(known)
    while len(known) < budget_of_evaluations and idle < budget_of_evaluations:
        before = len(known)
        _descend(judged, current, num_steps)
        idle = idle + 1 if len(known) == before else 0
        current = kicked(best_of(known), num_steps, generator)
        judged(current)
    return best_of(known)


def _descend(judged: Evaluate, current: Steps, num_steps: int) -> None:
    """To the first steps that are better than all a move away."""
    last: Move | None = None
    value = judged(current)
    while True:
        better = next(
            (
                (move, candidate)
                for move, candidate in moves(current, num_steps, last)
                if judged(candidate) < value
            ),
            None,
        )
        if better is None:
            return
        last, current = better
        value = judged(current)


def best_of(known: dict[Steps, float]) -> Steps:
    """The steps with the smallest value; the first in order where two have it."""
    return min(known, key=lambda steps: (known[steps], steps))


def guessed_optimum(guess: Evaluate, start: Steps, num_steps: int) -> Steps:
    """Where steepest descent by a cheap guess ends."""
    guess = cache(guess)
    current, spent = tuple(start), 0
    while spent < _GUESSES:
        around = [candidate for _, candidate in moves(current, num_steps)]
        spent += len(around)
        best = min(around, key=guess, default=current)
        if guess(best) >= guess(current):
            break
        current = best
    return current


def moves(steps: Steps, num_steps: int, last: Move | None = None) -> Iterator[tuple[Move, Steps]]:
    """One step moved by one, or it and all after it; `last` comes first, where it still fits."""
    every: list[Move] = [] if last is None else [last]
    every += [("one", place, stride) for stride in (1, -1) for place in range(1, len(steps))]
    every += [("tail", place, stride) for stride in (1, -1) for place in range(1, len(steps) - 1)]
    for move in dict.fromkeys(every):
        if (moved := _moved(steps, num_steps, move)) is not None:
            yield move, moved


def kicked(steps: Steps, num_steps: int, generator: random.Random) -> Steps:
    """The steps after a few random moves that fit."""
    for _ in range(_KICK):
        place, stride = generator.randrange(1, max(len(steps), 2)), generator.choice(_KICK_STRIDES)
        steps = _moved(steps, num_steps, ("one", place, stride)) or steps
    return steps


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


def _moved(steps: Steps, num_steps: int, move: Move) -> Steps | None:
    """None where the result would not be increasing steps of the run from 0."""
    kind, place, stride = move
    if not 1 <= place < len(steps):
        return None
    if kind == "one":
        changed = (*steps[:place], steps[place] + stride, *steps[place + 1 :])
    else:
        changed = (*steps[:place], *(step + stride for step in steps[place:]))
    return changed if changed[-1] < num_steps and all(a < b for a, b in pairwise(changed)) else None


def _check(starts: Sequence[Steps], num_steps: int, budget: int) -> None:
    problems = []
    if budget < 1:
        problems.append(f"budget_of_evaluations must be at least 1, got {budget}")
    if not starts:
        problems.append("starts: at least one is needed")
    if len({len(start) for start in starts}) > 1:
        problems.append("starts must all have as many steps")
    for start in starts:
        if not start or start[0] != 0 or start[-1] >= num_steps or any(b <= a for a, b in pairwise(start)):
            problems.append(f"start {list(start)} does not increase from 0 to at most {num_steps - 1}")
    if problems:
        raise ValueError("search_steps: " + "; ".join(problems))
