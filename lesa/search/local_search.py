"""One local search over steps that increase from 0: our full steps, the full steps of other rules, a solver's grid.

Our schedules and the peers' are found by the same function, `local_search`: every start is evaluated first; a descent
takes the first better steps a move away again and again, the move that helped last first, and ends where no move helps;
the next descent begins somewhere else, until the budget of evaluations is spent. Nothing is evaluated twice and a seed
fixes everything that is drawn. What differs is handed in:

    moves      ours: one full step or all from one on, by 1 and then by 2, in a drawn order (`lesa.search.descent`);
               the peers': by 1, in a fixed order (`benchmarks.peers.grid_search`)
    origins    where descents begin. Ours: at the starts in turn, with equal shares of the budget (`in_turn`); the
               peers': at the best steps after a few random moves, until the budget is spent (`kicks`)
    evaluate   ours runs a candidate against the incumbent and stops when it is plainly worse (racing,
               `lesa.search.trials`); a peer's candidates are run on all samples
    allowed    ours: whether the predictor has the history it wants; every step is allowed to a peer
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from lesa.errors import LesaError
from lesa.search.trials import Steps, Trial

Move = tuple[int, ...]  # by how much each step is moved
Moves = Callable[[Steps, torch.Generator], Iterable[Move]]  # those to try from some steps, in their order
Evaluate = Callable[[Steps, Trial | None], Trial]  # against the incumbent; None: in full
Kick = Callable[[Steps, random.Random], Steps]


@dataclass
class Evaluations:
    """What has been evaluated in a search. The smaller an error the better.

    A trial with fewer than `samples` errors is an estimate: good enough to tell that steps are worse than the incumbent
    they were run against. Before an estimate could win against a worse incumbent, the steps are evaluated again.
    """

    evaluate: Evaluate
    samples: int  # errors of a trial that was run in full
    budget: int  # calls of `evaluate`
    count: int = 0  # of them made
    trials: dict[Steps, Trial] = field(default_factory=dict)

    def error(self, steps: Steps, incumbent: Steps | None = None) -> float:
        """Error of some steps, evaluated if need be; beyond the budget too, which the caller holds to."""
        trial = self.trials.get(steps)
        best = None if incumbent is None else self.trials[incumbent]
        if trial is None or (len(trial.errors) < self.samples and best is not None and trial.error < best.error):
            trial = self.trials[steps] = self.evaluate(steps, best)
            self.count += 1
        return trial.error

    @property
    def spent(self) -> bool:
        return self.count >= self.budget

    @property
    def best(self) -> Steps:
        """The steps with the lowest error; of equal ones the first in order."""
        return min(self.trials, key=lambda steps: (self.trials[steps].error, steps))


Origins = Callable[[Evaluations, Sequence[Steps], int], Iterator[tuple[Steps, int]]]


def local_search(
    evaluate: Evaluate,
    starts: Iterable[Steps],
    moves: Moves,
    *,
    num_steps: int,
    budget: int,
    seed: int,
    origins: Origins,
    samples: int = 1,
    allowed: Callable[[Steps], bool] = lambda steps: True,
) -> tuple[list[Steps], Evaluations]:
    """Descend from several places; step 0 is never moved.

    Args:
        evaluate: error of some steps.
        starts: where to begin; all of one length. Of more than the budget allows the first ones are taken.
        moves: what is tried around some steps; the generator is the descent's own.
        num_steps: of the unaccelerated run.
        budget: calls of `evaluate`, at least one.
        seed: of the descents' generators and of what `origins` draws.
        origins: where each descent begins, and how many evaluations may have been made when it ends.
        samples: errors of a trial that was run in full.
        allowed: whether some steps may be evaluated at all.

    Returns:
        Where each descent ended, in their order, and all that was evaluated.

    Raises:
        ValueError: no starts, or starts that are not increasing steps of the run from 0, of one length.
    """
    given = [tuple(start) for start in starts]
    _refuse(given, num_steps, budget)
    done = Evaluations(evaluate, samples, budget)
    for start in list(dict.fromkeys(given))[:budget]:
        done.error(start)
    evaluated = [start for start in given if start in done.trials]
    ends = []
    for number, (origin, limit) in enumerate(origins(done, evaluated, seed)):
        generator = torch.Generator().manual_seed(seed + number)
        ends.append(_descend(done, origin, moves, generator, num_steps, limit, allowed))
    return ends, done


def in_turn(descents: int, *, within: float = math.inf) -> Origins:
    """So many descents, at the best start first, then at the others in their order, and so on around.

    What is left of the budget is shared evenly by the descents to come.

    Args:
        within: how far behind the best start one may be; at a start farther behind no descent begins.
    """

    def origins(done: Evaluations, starts: Sequence[Steps], seed: int) -> Iterator[tuple[Steps, int]]:
        ranked = sorted(starts, key=done.error)
        near = [start for start in ranked if done.error(start) <= done.error(ranked[0]) + within]
        for number in range(descents):
            share = (done.budget - done.count) // (descents - number)
            yield near[number % len(near)], done.count + share

    return origins


def kicks(kick: Kick) -> Origins:
    """Iterated local search: the first descent begins at the best start, each other one at the best steps after a kick.

    It ends when the budget is spent, or when as many descents in a row as it has evaluations found nothing new.
    """

    def origins(done: Evaluations, starts: Sequence[Steps], seed: int) -> Iterator[tuple[Steps, int]]:
        generator, idle = random.Random(seed), 0
        origin = done.best
        while not done.spent and idle < done.budget:
            before = done.count
            yield origin, done.budget
            idle = idle + 1 if done.count == before else 0
            origin = kick(done.best, generator)
            if not done.spent:
                done.error(origin)

    return origins


def _descend(
    done: Evaluations,
    origin: Steps,
    moves: Moves,
    generator: torch.Generator,
    num_steps: int,
    limit: int,
    allowed: Callable[[Steps], bool],
) -> Steps:
    """The first steps that are better than all a move away, or the best ones when `limit` evaluations were made."""
    best = origin
    last: tuple[Move, ...] = ()  # the move that helped
    improved = True
    while improved and done.count < limit:
        improved = False
        for move, candidate in moved(best, (*last, *moves(best, generator)), num_steps):
            if done.count >= limit:
                break
            if allowed(candidate) and done.error(candidate, best) < done.error(best):
                best, last, improved = candidate, (move,), True
                break
    return best


def moved(steps: Steps, moves: Iterable[Move], num_steps: int) -> Iterator[tuple[Move, Steps]]:
    """The steps after each move, once each; without those that do not increase or leave the run."""
    for move in dict.fromkeys(moves):
        candidate = tuple(step + shift for step, shift in zip(steps, move, strict=True))
        if candidate[-1] < num_steps and all(a < b for a, b in pairwise(candidate)):
            yield move, candidate


def _refuse(starts: Sequence[Steps], num_steps: int, budget: int) -> None:
    problems = []
    if budget < 1:
        problems.append(f"budget must be at least 1, got {budget}")
    if not starts:
        problems.append("starts: at least one is needed")
    if len({len(start) for start in starts}) > 1:
        problems.append("starts must all have as many steps")
    for start in starts:
        if not start or start[0] != 0 or start[-1] >= num_steps or any(b <= a for a, b in pairwise(start)):
            problems.append(f"start {list(start)} does not increase from 0 to at most {num_steps - 1}")
    if problems:
        raise LesaError("local_search: " + "; ".join(problems))
