"""Full steps by need: each run gets the budget that its first full step asks for, the mean number of full steps kept.

All budgets compute step 0. What its feature says of the PSNR that each of them will reach (`lesa.difficulty`) picks
the one with the fewest full steps that is expected to reach a level, the slowest where none does. The level belongs to
the budget that was asked for: over training runs, the mean number of full steps is that budget's. Nothing is predicted
before the choice, so a run is to the bit that of the budget it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lesa.difficulty import Difficulty
from lesa.fallback import Fallback
from lesa.forecast import Rule
from lesa.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """How a run goes on after its first step."""

    schedule: Schedule
    rule: Rule
    bounds: Mapping[int, float] = field(default_factory=dict)  # of the errors at its full steps
    fallback: Fallback | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ByNeed:
    """What a run may become, and the level that decides."""

    difficulty: Difficulty
    names: tuple[str, ...]  # budgets, fewest full steps first, as the regression's columns
    paths: Mapping[str, Path]
    level: float  # dB
    asked: str

    def choose(self, features: Sequence[torch.Tensor]) -> tuple[Path, str]:
        """The way of the run whose first features [B, L, C] these are, one a guidance branch, and words for it.

        The sample of a batch that needs most decides for all.
        """
        expected = self.difficulty.expected(features)
        needs = cheapest(expected, self.level)
        worst = int(needs.argmax())
        name, says = self.names[int(needs[worst])], expected[worst]
        told = ", ".join(f"{other} {value:.1f}" for other, value in zip(self.names, says.tolist(), strict=True))
        return self.paths[name], f"{name}; expected PSNR in dB {told}, wanted {self.level:.1f}"

    @property
    def promise(self) -> str:
        full = self.paths[self.asked].schedule.num_full
        return f"{', '.join(self.names)} as the first step asks, {full} full steps in the mean of single-sample runs"


def menu(schedules: Mapping[str, Schedule], quality: Mapping[str, float]) -> tuple[str, ...]:
    """The best budget of each number of full steps, fewest first.

    Args:
        schedules: of the budgets.
        quality: measured mean PSNR of those that were measured, dB.
    """
    best: dict[int, str] = {}
    for name, schedule in schedules.items():
        known = best.get(schedule.num_full)
        if known is None or quality.get(name, float("-inf")) > quality.get(known, float("-inf")):
            best[schedule.num_full] = name
    return tuple(best[count] for count in sorted(best))


def cheapest(expected: torch.Tensor, level: float) -> torch.Tensor:
    """Places [N] of the first budget expected [N, M] to reach the level, the last where none does."""
    good = expected >= level
    good[:, -1] = True
    return good.int().argmax(dim=1)


def levels(expected: torch.Tensor, names: Sequence[str], counts: Sequence[int]) -> dict[str, float]:
    """For each budget but fastest and slowest the level at which the mean number of full steps is the budget's own.

    Levels that give the same mean are a range, whose middle is taken: where samples hardly differ, all of them get the
    budget that was asked for.

    Args:
        expected: PSNR [N, M], dB.
        names: of the budgets, fewest full steps first.
        counts: their numbers of full steps.
    """
    places = expected.flatten().unique()  # sorted; the choice is the same from above one of them to the next
    full = torch.tensor(counts, dtype=torch.float64)
    means = torch.stack([full[cheapest(expected, level)].mean() for level in places.tolist()])
    found = {}
    for name, count in list(zip(names, counts, strict=True))[1:-1]:
        off = (means - count).abs()
        first = int((off == off.min()).nonzero()[0])
        last = first + int((means[first:] == means[first]).sum()) - 1
        low = places[first - 1] if first else places[first]
        found[name] = float((low + places[last]) / 2)
    return found
