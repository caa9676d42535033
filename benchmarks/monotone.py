"""Peers that do worse with more evaluations: a failed search, or a setting that was never searched."""

from __future__ import annotations

import sys
from itertools import combinations

from lesa.bootstrap import paired_interval
from lesa.results import Results


def failed_searches(results: Results) -> list[str]:
    """A line for every row of a peer whose mean PSNR is lower than the same peer's with fewer computed steps.

    Each names the better row with the most steps, and the paired difference with its 95% interval.
    """
    lines = []
    for name in dict.fromkeys(row.method for row in results.rows if row.kind != "lesa"):
        rows = sorted((row for row in results.rows if row.method == name), key=lambda row: row.computed_steps)
        worse = {}
        for fewer, more in combinations(rows, 2):
            if fewer.computed_steps < more.computed_steps and fewer.psnr.mean > more.psnr.mean:
                worse[more.budget] = (fewer, more)
        for fewer, more in worse.values():
            pair = (results.values(more.budget, name), results.values(fewer.budget, name))
            gap = paired_interval(*pair, results.groups, results.resamples)
            lines.append(
                f"{more.budget}/{name}: {more.psnr.mean:.2f} dB with {more.computed_steps:g} computed steps, "
                f"{fewer.psnr.mean:.2f} dB with {fewer.computed_steps:g} at {fewer.budget} "
                f"({gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]): worse with more, search it again"
            )
    return lines


def warned(results: Results) -> list[str]:
    """`failed_searches`, also on stderr."""
    lines = failed_searches(results)
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    return lines
