"""Everything that a predictor is compared with unless somebody asks for more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lesa.cache_search import tuned_caches
from lesa.fixed_peers import fixed_peers
from lesa.methods import Method, lesa_method
from lesa.params import CallParams, EvaluateParams
from lesa.predictor import Predictor
from lesa.schedule import Schedule

Report = Callable[[int, dict[str, float]], None]
_LABELS = {"lesa": "LESA", "lesa_ground_truth": "LESA, ground truth only", "champion": "champion"}


def predictor_methods(predictors: Mapping[str, Predictor], budgets: Mapping[str, Schedule]) -> list[Method]:
    """Every predictor at every budget."""
    return [
        lesa_method(budget, predictor, schedule, name=name, label=_LABELS.get(name, name))
        for budget, schedule in budgets.items()
        for name, predictor in predictors.items()
    ]


def peer_methods(budgets: Mapping[str, Schedule]) -> list[Method]:
    """The peers that nothing has to be tuned for, at every budget."""
    return [method for budget, schedule in budgets.items() for method in fixed_peers(budget, schedule)]


def by_budget(methods: Iterable[Method], budgets: Iterable[str]) -> list[Method]:
    """The same methods, budget by budget."""
    everything = list(methods)
    return [method for budget in budgets for method in everything if method.budget == budget]


def default_methods(
    pipe: Any,
    predictors: Mapping[str, Predictor],
    budgets: Mapping[str, Schedule],
    *,
    call: CallParams,
    settings: EvaluateParams,
    tuning_prompts: Sequence[str] = (),
    tuning_seeds: Sequence[int] = (),
    report: Report | None = None,
) -> list[Method]:
    """The predictors and every peer, at every budget.

    Args:
        pipe: the pipeline; only the tuning of caches samples with it.
        predictors: by name; the first one is the measure for the caches' time.
        budgets: full steps of each budget.
        call: the plain run.
        settings: batch size and repeats.
        tuning_prompts: training prompts, one a sample, for the caches; empty leaves the caches out.
        tuning_seeds: their noise.
        report: progress of the tuning.
    """
    ours = predictor_methods(predictors, budgets)
    caches: list[Method] = []
    if tuning_prompts and ours:
        first = next(iter(predictors))
        caches = tuned_caches(
            pipe,
            {method.budget: method for method in ours if method.name == first},
            call=call,
            prompts=tuning_prompts,
            seeds=tuning_seeds,
            batch_size=settings.batch_size,
            repeats=settings.wall_clock_repeats,
            report=report,
        )
    return by_budget([*ours, *peer_methods(budgets), *caches], budgets)
