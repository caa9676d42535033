"""One small evaluation that several tests look at: tiny pipeline, extrapolating predictor, every peer."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from lesa.evaluation.compare import evaluate_methods
from lesa.evaluation.measure import samples
from lesa.evaluation.results import Results
from lesa.params import EvaluateParams
from lesa.peers.caches import first_block_method, mag_cache_method
from lesa.peers.lineup import default_methods
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL, NUM_STEPS, extrapolating, run_sigmas
from tests.helpers.tiny import PROMPTS, tiny_flux

BUDGETS = {"1.67x": Schedule.uniform(NUM_STEPS, 3), "1.43x": Schedule.uniform(NUM_STEPS, 2)}
SETTINGS = EvaluateParams(
    prompts=2,
    seeds_per_prompt=2,
    converged_fraction=0.5,
    converged_steps=20,
    batch_size=2,
    bootstrap=100,
    wall_clock_repeats=1,
)


class EvenScorer:
    """Says yes to every other picture, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def agreement(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert len(images) == len(prompts)
        self.asked += prompts
        return torch.arange(len(images)) % 2 == 0


@cache
def pipeline() -> Any:
    return tiny_flux()


@cache
def sigmas() -> torch.Tensor:
    """[S + 1] noise levels of a run."""
    return run_sigmas(pipeline())


@cache
def results() -> Results:
    pipe = pipeline()
    predictor = extrapolating(pipe.transformer.inner_dim, sigmas(), BUDGETS["1.67x"])
    methods = default_methods(
        pipe,
        {"lesa": predictor},
        BUDGETS,
        call=CALL,
        settings=SETTINGS,
    )
    for budget in BUDGETS:  # as if tuned: tuning has tests of its own
        methods.append(first_block_method(budget, NUM_STEPS, 0.3))
        methods.append(
            mag_cache_method(
                budget, NUM_STEPS, [1.0] * NUM_STEPS, threshold=0.1, retention_steps=2, max_skip_steps=1
            )
        )
    prompts, seeds = samples(PROMPTS[:2], 2, 500)
    return evaluate_methods(
        pipe,
        methods,
        prompts,
        seeds,
        call=CALL,
        settings=SETTINGS,
        scorer=EvenScorer(),
        about={"workload": "tiny", "default_budget": "1.67x"},
    )
