"""TeaCache (arXiv 2411.19108): full steps where the modulated input of the first block has changed enough.

At each step the relative L1 change of `norm1(hidden, temb)` of the first block since the step before is put through a
polynomial, fitted to say the change of the blocks' output, and added up; while the sum is below a threshold the blocks
are skipped and the newest residual (last block's image tokens minus the first block's input) is added instead. First
and last step are full. The polynomial (or none) and the threshold are found on training prompts, the latter by
bisection until the mean number of full steps is the schedule's. One decision serves the whole batch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.hooks import ModelHook
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.utils.torch_utils import unwrap_module

from lesa.models.families import BlockList, blocks, family_of
from lesa.peers.method import Method
from lesa.peers.tuning import Bench, Trial, best_trial, bisect_threshold
from lesa.sampling.clock import SchedulerClock
from lesa.sampling.hook_registry import add_hook, forget_children, remove_hook
from lesa.schedule import Schedule

DEGREE = 4
UNSCALED = (1.0, 0.0)
TRIALS = 10  # bisection steps of the threshold
THRESHOLDS = (1e-4, 1e2)  # sums of relative changes
_HOOK = "lesa_benchmark_teacache"


class _Branch:
    """What one guidance branch remembers from step to step."""

    def __init__(self) -> None:
        self.modulated: torch.Tensor | None = None
        self.output: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None
        self.sum = 0.0


class TeaCache:
    """The decision, shared by the hooks of all blocks of one transformer."""

    def __init__(self, scheduler: Any, polynomial: Sequence[float], threshold: float) -> None:
        self.polynomial, self.threshold = np.poly1d(list(polynomial)), threshold
        self.clock = SchedulerClock(scheduler)
        self.branches: dict[str, _Branch] = {}
        self.changes: list[tuple[float, float]] = []  # (of the modulated input, of the output), where both are known
        self.skip = False
        self.now = _Branch()
        self.entered: torch.Tensor | None = None
        self.change: float | None = None

    def enter(self, hidden: torch.Tensor, modulated: torch.Tensor) -> None:
        tick = self.clock.tick(None, None)
        if tick.new_run:
            self.branches = {}
        self.now = now = self.branches.setdefault(tick.branch, _Branch())
        self.entered, self.change = hidden, None
        self.skip = False
        if now.modulated is not None:
            self.change = _relative_change(modulated, now.modulated)
            now.sum += max(float(self.polynomial(self.change)), 0.0)  # a fit may dip below
            is_last = tick.step == self.clock.num_steps - 1
            self.skip = not is_last and now.residual is not None and now.sum < self.threshold
        now.modulated = modulated
        if not self.skip:
            now.sum = 0.0

    def leave(self, hidden: torch.Tensor) -> None:
        """After a full step."""
        assert self.entered is not None
        if self.change is not None and self.now.output is not None:
            self.changes.append((self.change, _relative_change(hidden, self.now.output)))
        self.now.output, self.now.residual = hidden, hidden - self.entered


class _BlockHook(ModelHook):
    """Runs the block or passes its inputs through; the first one decides, the last one adds the residual."""

    def __init__(self, cache: TeaCache, block: torch.nn.Module, row: BlockList, is_head: bool, is_tail: bool) -> None:
        super().__init__()
        self.cache, self.row, self.is_head, self.is_tail = cache, row, is_head, is_tail
        self.names = list(inspect.signature(type(unwrap_module(block)).forward).parameters)[1:]

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden, cache = given["hidden_states"], self.cache
        if self.is_head:
            modulated = unwrap_module(module).norm1(hidden, emb=given["temb"])[0]
            cache.enter(hidden, modulated)
        if not cache.skip:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if self.is_tail:
                cache.leave(output if self.row.encoder_index is None else output[self.row.hidden_index])
            return output
        if self.is_tail:
            assert cache.now.residual is not None and cache.entered is not None
            hidden = cache.entered + cache.now.residual
        if self.row.encoder_index is None:
            return hidden
        encoder = given["encoder_hidden_states"]
        return (hidden, encoder) if self.row.hidden_index == 0 else (encoder, hidden)


@contextmanager
def teacache(pipe: Any, polynomial: Sequence[float], threshold: float) -> Iterator[TeaCache]:
    """TeaCache on the pipeline's transformer.

    Raises:
        ValueError: for a transformer whose first block has no `norm1` that takes the conditioning.
    """
    transformer = unwrap_module(pipe.transformer)
    rows = blocks(transformer, family_of(transformer))
    if not isinstance(getattr(rows[0][1], "norm1", None), AdaLayerNormZero):
        raise ValueError(f"TeaCache: the first block of {type(transformer).__name__} has no modulated input `norm1`")
    cache = TeaCache(lambda: pipe.scheduler, polynomial, threshold)
    for index, (_, block, row) in enumerate(rows):
        hook = _BlockHook(cache, block, row, is_head=index == 0, is_tail=index == len(rows) - 1)
        add_hook(unwrap_module(block), hook, _HOOK)
    forget_children(transformer)
    try:
        yield cache
    finally:
        for _, block, _ in rows:
            remove_hook(unwrap_module(block), _HOOK)
        forget_children(transformer)


def teacache_method(budget: str, num_steps: int, polynomial: Sequence[float], threshold: float) -> Method:
    @contextmanager
    def using(pipe: Any, sigmas: torch.Tensor) -> Iterator[None]:
        with teacache(pipe, polynomial, threshold):
            yield

    return Method(
        name="teacache",
        label="TeaCache",
        budget=budget,
        kind="cache",
        using=using,
        num_steps=num_steps,
        settings={"threshold": threshold, "polynomial": [float(value) for value in polynomial]},
    )


def fitted_polynomial(bench: Bench) -> list[float]:
    """Coefficients, highest power first: change of the output from that of the modulated input, on plain runs."""
    with torch.no_grad(), teacache(bench.pipe, [0.0], -1.0) as cache:  # nothing is below it: every step is full
        bench.sample(bench.call)
    inputs, outputs = np.array(cache.changes).T
    return np.polyfit(inputs, outputs, DEGREE).tolist()


def tuned_teacache(bench: Bench, budgets: Mapping[str, Schedule]) -> list[Method]:
    """One row a budget, with the fitted polynomial or none, whichever is better at the schedule's full steps."""
    num_steps = len(bench.sigmas) - 1
    trials: dict[int, list[Trial]] = {}  # of each polynomial; the trials of one budget serve the next
    polynomials = (fitted_polynomial(bench), UNSCALED)
    chosen = []
    for budget, schedule in budgets.items():
        target = float(schedule.num_full)
        for number, polynomial in enumerate(polynomials):
            known = trials.setdefault(number, [])
            make = partial(teacache_method, "", num_steps, polynomial)
            with torch.no_grad():
                known += bisect_threshold(bench, make, target, known, between=THRESHOLDS, tries=TRIALS)
        best = best_trial([trial for every in trials.values() for trial in every], target)
        knobs = best.method.settings
        method = teacache_method(budget, num_steps, knobs["polynomial"], knobs["threshold"])
        notes = {"tuning_computed_steps": round(best.computed, 2), "tuning_psnr": round(best.psnr, 3)}
        chosen.append(dataclasses.replace(method, settings={**method.settings, **notes}))
    return chosen


def _relative_change(now: torch.Tensor, before: torch.Tensor) -> float:
    return float((now.float() - before.float()).abs().mean() / before.float().abs().mean().clamp_min(1e-12))
