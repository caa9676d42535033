"""Rows out of figures that a person can check: what belongs to which sample, prompt, run and step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lesa.evaluation.aggregate import gather
from lesa.evaluation.bootstrap import interval, paired_interval
from lesa.evaluation.measure import PLAIN, Measured, MeasuredPart
from lesa.evaluation.results import Results
from lesa.models.flops import ModelFlops
from lesa.params import CallParams, EvaluateParams
from lesa.peers.method import Method
from lesa.schedule import Schedule

SETTINGS = EvaluateParams(batch_size=2, converged_fraction=0.5, bootstrap=200)
PROMPTS, SEEDS = ["a", "a", "b", "b", "c", "c"], list(range(6))
CONVERGED = [1, 3, 5]  # half of six samples: one of each prompt
PSNR = [20.0, 31.0, 40.0, 50.0, 60.0, 10.0]
SIGMAS = torch.linspace(1, 0, 7)
FEATURE_ERRORS = (0.0, 0.0, 0.1, 0.2, 0.5, 0.3)
MODEL = ModelFlops(total=100.0, head=4.0, blocks=(48.0, 48.0), tokens=1, channels=1)


def method(name: str, kind: Literal["rule", "solver"], num_steps: int, schedule: Schedule | None) -> Method:
    def using(pipe: Any, sigmas: torch.Tensor) -> Any:
        return nullcontext()

    return Method(name=name, label=name, budget="2x", kind=kind, using=using, num_steps=num_steps, schedule=schedule)


METHODS = [method("ours", "rule", 6, Schedule.explicit(6, (0, 1, 4))), method("fewer", "solver", 3, None)]


def measured(psnr: list[float], converged: list[float], seconds: list[float], calls: int, computed: int) -> Measured:
    return Measured(
        psnr=[torch.tensor(psnr[start : start + 2], dtype=torch.float64) for start in (0, 2, 4)] if psnr else [],
        ssim=[torch.ones(2, dtype=torch.float64)] * 3 if psnr else [],
        converged=[torch.tensor([value], dtype=torch.float64) for value in converged],
        seconds=seconds,
        calls=calls,
        computed=computed,
        images=torch.zeros(2, 3, 8, 8),
        feature_errors=FEATURE_ERRORS if psnr else None,
        peak_bytes=64,
    )


@pytest.fixture(scope="module")
def results() -> Results:
    by_method = {
        PLAIN: measured([], [15.0, 25.0, 65.0], [6.0, 8.0, 9.0], 18, 18),
        ("2x", "ours"): measured(PSNR, [10.0, 20.0, 60.0], [2.0, 2.0, 3.0], 18, 9),
        ("2x", "fewer"): measured([20.0] * 6, [12.0, 13.0, 14.0], [3.0, 4.0, 3.0], 9, 9),
    }
    part = MeasuredPart(by_method=by_method, sigmas=SIGMAS, model=MODEL, threads=1)
    call = CallParams(height=16, width=16, num_inference_steps=6)
    return gather([part], METHODS, PROMPTS, SEEDS, call=call, settings=SETTINGS)


def test_intervals_resample_prompts(results: Results) -> None:
    groups = [0, 0, 1, 1, 2, 2]
    found = results.row("2x", "ours").psnr
    assert (found.mean, found.low, found.high) == tuple(interval(PSNR, groups, SETTINGS.bootstrap))
    assert found.p5 == np.percentile(PSNR, 5) < found.mean


def test_a_converged_sample_belongs_to_its_own_prompt(results: Results) -> None:
    assert list(results.converged_indices) == CONVERGED
    found = results.row("2x", "ours").converged_psnr
    assert found is not None
    expected = interval([10.0, 20.0, 60.0], [0, 1, 2], SETTINGS.bootstrap)
    assert (found.mean, found.low, found.high) == tuple(expected)
    ours, theirs = [10.0, 20.0, 60.0], [12.0, 13.0, 14.0]
    gain = results.difference("2x", "ours", "fewer", "converged_psnr")
    assert gain == paired_interval(ours, theirs, [0, 1, 2], SETTINGS.bootstrap) and gain.mean == 17.0


def test_a_gain_is_this_method_less_the_other(results: Results) -> None:
    assert results.difference("2x", "ours", "fewer").mean == pytest.approx(np.mean(PSNR) - 20.0)


def test_another_picture_is_one_far_below(results: Results) -> None:
    assert results.row("2x", "ours").outliers.mean == pytest.approx(2 / 6)


def test_ratios_are_the_plain_run_over_the_method(results: Results) -> None:
    ours, fewer = results.row("2x", "ours"), results.row("2x", "fewer")
    assert ours.wall_clock_ratio == 3.0 and ours.wall_clock_range == (3.0, 4.0)
    assert (ours.computed_steps, ours.step_ratio) == (3.0, 2.0)
    assert (fewer.computed_steps, fewer.step_ratio) == (3.0, 2.0)  # of its own run of three
    assert ours.flops_ratio == pytest.approx(600 / (3 * 100 + 3 * 4)) and fewer.flops_ratio == pytest.approx(2.0)
    assert ours.bytes_kept == 32  # a sample of a batch of two


def test_the_feature_error_is_that_of_predicted_steps(results: Results) -> None:
    assert results.row("2x", "ours").feature_error == pytest.approx((0.1 + 0.2 + 0.3) / 3)
