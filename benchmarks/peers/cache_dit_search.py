"""DBCache at its best on training prompts, a row a calibrator; `lesa/peers/tuning.py` says what is equal time.

Of each number of blocks that run at every step: even skips after several warm-ups, our own full steps as computation
masks, and the residual threshold by bisection, with the skips in a row left free and bounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.peers.cache_dit import ALWAYS, CALIBRATORS, DBCache, cache_dit_method
from lesa.models.families import blocks, family_of
from lesa.params import Report
from lesa.peers.method import Method
from lesa.peers.tuning import Bench, CacheSearch, Trial, best_trial, bisect_threshold, tune_caches

FIXED_BLOCKS = ((1, 0), (2, 0), (1, 1), (8, 0), (4, 4))  # Fn and Bn; those that leave half of the blocks are tried
WARMUPS = (1, 2, 3, 5)
MORE_SKIPS = 2  # beyond the even ones, where the threshold decides too
THRESHOLDS = (1e-3, 0.999 * ALWAYS)
THRESHOLD_TRIALS = 6  # bisection steps for one target


def tuned_cache_dit(
    bench: Bench, ours: Mapping[str, Method], *, repeats: int = 3, report: Report | None = None
) -> list[Method]:
    """DBCache with each calibrator, and without one, for every budget.

    Args:
        bench: training prompts; never those that are judged.
        ours: the predictor's method at each budget, whose time is the measure.
        repeats: timed runs of each kind.
        report: called after each search.
    """
    num_steps = len(bench.sigmas) - 1
    num_blocks = len(blocks(bench.pipe.transformer, family_of(bench.pipe.transformer)))
    masks = tuple(dict.fromkeys(method.schedule.full_steps for method in ours.values() if method.schedule))
    searches = []
    for calibrator in CALIBRATORS:
        for base in _bases(calibrator, num_blocks):
            eager = cache_dit_method("", num_steps, base)
            searches.append(CacheSearch(name=base.name, eager=eager, search=_Search(base=base, masks=masks)))
    with torch.no_grad():
        return tune_caches(bench, ours, searches, repeats=repeats, report=report)


def _bases(calibrator: str, num_blocks: int) -> list[DBCache]:
    bases = [
        DBCache(calibrator=calibrator, first_blocks=first, last_blocks=last)
        for first, last in FIXED_BLOCKS
        if 2 * (first + last) <= num_blocks
    ]
    return [*bases, DBCache(calibrator=calibrator, order=2)] if calibrator == "taylorseer" else bases


@dataclass
class _Search:
    """The search of one calibrator and number of fixed blocks; what it has run serves the next target."""

    base: DBCache
    masks: Sequence[tuple[int, ...]]
    known: dict[DBCache, Trial] = field(default_factory=dict)

    def __call__(self, bench: Bench, target: float, trials: list[Trial]) -> Trial:
        num_steps = len(bench.sigmas) - 1

        def run(setting: DBCache) -> Trial:
            if setting not in self.known:
                self.known[setting] = bench.trial(cache_dit_method("", num_steps, setting))
                trials.append(self.known[setting])
            return self.known[setting]

        for mask in self.masks:
            run(dataclasses.replace(self.base, computed_steps=mask))
        even = [
            dataclasses.replace(self.base, warmup_steps=warmup, max_skipped=even_skips(num_steps, warmup, target))
            for warmup in WARMUPS
            if warmup <= max(target, 1.0)
        ]
        best = max(even, key=lambda setting: run(setting).psnr)
        bound = None if best.max_skipped is None else best.max_skipped + MORE_SKIPS
        for skips in dict.fromkeys((None, bound)):
            self._bisect(bench, target, dataclasses.replace(best, max_skipped=skips), trials)
        return best_trial(trials, target)

    def _bisect(self, bench: Bench, target: float, setting: DBCache, trials: list[Trial]) -> None:
        family = [
            trial
            for other, trial in self.known.items()
            if dataclasses.replace(other, threshold=setting.threshold) == setting
        ]

        def method(threshold: float) -> Method:
            return cache_dit_method("", len(bench.sigmas) - 1, dataclasses.replace(setting, threshold=threshold))

        made = bisect_threshold(bench, method, target, family, between=THRESHOLDS, tries=THRESHOLD_TRIALS)
        for trial in made:
            self.known[dataclasses.replace(setting, threshold=trial.method.settings["threshold"])] = trial
        trials += made


def even_skips(num_steps: int, warmup: int, target: float) -> int | None:
    """Skips in a row, the most with which `warmup + (num_steps - warmup) // (skips + 1)` reaches the target.

    None where the warm-up does alone.
    """
    needed = math.ceil(target - 1e-9) - warmup
    return None if needed <= 0 else max((num_steps - warmup) // needed - 1, 0)
