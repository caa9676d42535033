"""cache-dit's DBCache on a FLUX pipeline, with its calibrators, as rows of a comparison.

DBCache runs the first Fn blocks at every step; where their residual has changed by less than a threshold since the last
computed step, the middle blocks are skipped: their newest residual, or what a calibrator (TaylorSeer, FoCa, DMD) makes
of the earlier ones, is added instead, and the last Bn blocks run on that. Warm-up steps are all computed, and no more
than so many steps are skipped in a row. With a computation mask the computed steps are fixed. On FLUX cache-dit takes
double and single blocks as one list and decides once for the whole batch.

The package is optional (`pip install -c constraints.txt -e '.[bench]'`). It is used as it comes; that its FoCa and DMD
are their papers' is its authors' word.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lesa.models.families import blocks, family_of
from lesa.params import CallParams
from lesa.peers.method import Method
from lesa.schedule import Schedule

INSTALL = "pip install -c constraints.txt -e '.[bench]'"
ALWAYS = 1.0  # from this threshold on cache-dit does not look at the change at all
CALIBRATORS = {  # name of the row, without its common beginning -> label
    "": "DBCache",
    "taylorseer": "DBCache, TaylorSeer calibrator",
    "foca": "DBCache, FoCa calibrator",
    "dmd": "DBCache, DMD calibrator",
}


@dataclass(frozen=True, kw_only=True)
class DBCache:
    """One setting of it."""

    calibrator: str = ""  # of CALIBRATORS
    order: int = 1  # of the TaylorSeer calibrator
    first_blocks: int = 1  # Fn, which run at every step
    last_blocks: int = 0  # Bn, likewise
    threshold: float = ALWAYS  # relative L1 change of the first blocks' residual
    warmup_steps: int = 1  # computed whatever the change
    max_skipped: int | None = None  # steps skipped in a row; None: any number
    computed_steps: tuple[int, ...] | None = None  # the mask, which replaces the threshold; None: none

    @property
    def name(self) -> str:
        return f"cache_dit_{self.calibrator}".rstrip("_")

    def settings(self) -> dict[str, Any]:
        """As the table shows them: cache-dit's defaults left out."""
        values = dataclasses.asdict(self)
        if self.calibrator != "taylorseer":
            del values["order"]
        if self.computed_steps is not None:
            values = {**values, "computed_steps": list(self.computed_steps)}
            del values["threshold"], values["warmup_steps"]
        return {name: value for name, value in values.items() if value not in (None, "")}


def missing(pipe: Any, call: CallParams) -> str | None:
    """Why there can be no row of cache-dit, in one line; None where there can be."""
    if importlib.util.find_spec("cache_dit") is None:
        return f"cache-dit is not installed, its rows are left out: {INSTALL}"
    if family_of(pipe.transformer).name != "flux" or (call.true_cfg_scale or 1.0) > 1.0:
        return "cache-dit's rows are left out: written for FLUX with embedded guidance only"
    return None


def reported_missing(pipe: Any, call: CallParams) -> bool:
    """Whether its rows must be left out; says why on stderr."""
    if (reason := missing(pipe, call)) is not None:
        print(reason, file=sys.stderr)
    return reason is not None


def cache_dit_method(budget: str, num_steps: int, setting: DBCache) -> Method:
    """A row at one setting.

    Raises:
        ValueError: at use, on a transformer of too few blocks or one that is hooked or cached already.
    """

    @contextmanager
    def using(pipe: Any, sigmas: Any) -> Iterator[None]:
        with enabled(pipe, num_steps, setting):
            yield

    return Method(
        name=setting.name,
        label=f"cache-dit {CALIBRATORS[setting.calibrator]}",
        budget=budget,
        kind="cache",
        using=using,
        num_steps=num_steps,
        leading_blocks=setting.first_blocks,
        trailing_blocks=setting.last_blocks,
        held=held_tensors,
        settings=setting.settings(),
    )


def masked_methods(budget: str, schedule: Schedule) -> list[Method]:
    """Every calibrator at equal full steps: a computation mask, one block at every step."""
    rows = []
    for calibrator, label in CALIBRATORS.items():
        setting = DBCache(calibrator=calibrator, computed_steps=schedule.full_steps)
        method = cache_dit_method(budget, schedule.num_steps, setting)
        label = f"cache-dit {label}, fixed steps"
        rows.append(dataclasses.replace(method, name=f"{method.name}_fixed", label=label, schedule=schedule))
    return rows


@contextmanager
def enabled(pipe: Any, num_steps: int, setting: DBCache) -> Iterator[None]:
    """cache-dit on the pipeline; afterwards the pipeline is as it was.

    Raises:
        ValueError: the transformer has too few blocks, or something else is on it.
    """
    import cache_dit

    _quiet()
    transformer = pipe.transformer
    _check(transformer, setting)
    # It leaves two things behind: its FLUX adapter's forward on the transformer, and the block lists, which every call
    # swaps, in another order among the children, in which diffusers' caches do not find the first block.
    before, children = dict(vars(transformer)), dict(transformer._modules)
    try:
        cache_dit.enable_cache(pipe, cache_config=_config(num_steps, setting), calibrator_config=_calibrator(setting))
        yield
    finally:
        cache_dit.disable_cache(pipe)
        _restore(vars(transformer), before)
        transformer._modules.clear()
        transformer._modules.update(children)


def held_tensors(pipe: Any) -> list[Any]:
    """What the cache keeps from step to step: buffers of its contexts and all that calibrators remember."""
    held: list[Any] = []
    for context in pipe.transformer._context_manager._cached_context_manager.values():
        held.append(context.buffers)
        for calibrator in (context.calibrator, context.encoder_calibrator):
            if calibrator is not None:
                held += [vars(state) for state in calibrator.states.values()]
    return held


def _quiet() -> None:
    """It logs at every switch, of which there are hundreds, and to stdout, where the JSON goes; errors are raised."""
    for handler in logging.getLogger("CACHE_DIT").handlers:
        handler.setLevel(logging.CRITICAL)


def _config(num_steps: int, setting: DBCache) -> Any:
    from cache_dit import DBCacheConfig

    mask = setting.computed_steps
    return DBCacheConfig(
        Fn_compute_blocks=setting.first_blocks,
        Bn_compute_blocks=setting.last_blocks,
        residual_diff_threshold=setting.threshold,
        max_warmup_steps=setting.warmup_steps,
        max_continuous_cached_steps=-1 if setting.max_skipped is None else setting.max_skipped,
        num_inference_steps=num_steps,
        steps_computation_mask=None if mask is None else [int(step in mask) for step in range(num_steps)],
        steps_computation_policy="static",
    )


def _calibrator(setting: DBCache) -> Any:
    import cache_dit

    match setting.calibrator:
        case "":
            return None
        case "taylorseer":
            return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=setting.order)
        case "foca":
            return cache_dit.FoCaCalibratorConfig()
        case "dmd":
            return cache_dit.DMDCalibratorConfig()
    raise ValueError(f"{setting.calibrator!r} is not a calibrator; known: {', '.join(filter(None, CALIBRATORS))}")


def _check(transformer: Any, setting: DBCache) -> None:
    every = blocks(transformer, family_of(transformer))
    fixed = setting.first_blocks + setting.last_blocks
    if setting.first_blocks < 1 or fixed >= len(every):
        raise ValueError(f"DBCache: {fixed} of {len(every)} blocks would run at every step, at least the first must")
    modules: Sequence[Any] = [transformer, *(block for _, block, _ in every)]
    if any(getattr(module, "_diffusers_hook", None) and module._diffusers_hook.hooks for module in modules):
        # Its own forward would pass the transformer's hooks by.
        raise ValueError("DBCache: something is hooked to the transformer already; disable that first")


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in now.keys() - before.keys():
        del now[name]
    now.update(before)
