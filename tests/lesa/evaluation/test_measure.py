"""Samples shared out to processes: every one once, the same figures, times of warm processes only."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lesa.evaluation import measure
from lesa.evaluation.aggregate import gather
from lesa.evaluation.compare import evaluate_methods
from lesa.evaluation.measure import (
    Measured,
    Part,
    _converged,
    _feature_errors,
    _score,
    converged_indices,
    measure_part,
    samples,
    share_out,
)
from lesa.params import CallParams, EvaluateParams
from lesa.peers.method import Method
from lesa.peers.rules import rule_method
from lesa.peers.solvers import euler_method
from tests.helpers.bundles import CALL
from tests.helpers.evaluation import BUDGETS, SETTINGS, EvenScorer, pipeline
from tests.helpers.tiny import PROMPTS


def settings(**changes: object) -> EvaluateParams:
    return dataclasses.replace(SETTINGS, **{"batch_size": 4, "wall_clock_repeats": 3, **changes})


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_every_batch_goes_to_one_process(processes: int) -> None:
    parts = share_out(22, settings(), processes)
    assert [start for part in parts for start in part.starts] == [0, 4, 8, 12, 16, 20]
    assert len(parts) == min(processes, 6) and all(part.starts for part in parts)


def test_whole_calls_that_nobody_looks_into_are_timed() -> None:
    assert [part.timed for part in share_out(22, settings(), 2)] == [(4, 8), (12, 16)]  # 20 is a batch of two
    assert [part.further for part in share_out(22, settings(), 2)] == [0, 0]
    assert [part.further for part in share_out(22, settings(wall_clock_repeats=6), 2)] == [2, 0]
    assert [part.further for part in share_out(3, settings(), 2)] == [3]
    assert [(part.timed, part.further) for part in share_out(22, settings(), 2, timing=False)] == [((), 0)] * 2


def test_converged_samples_are_spread_over_all() -> None:
    assert converged_indices(128, 0.1)[0] == 4 and len(converged_indices(128, 0.1)) == 13
    assert converged_indices(5, 0.01) == [1, 3] and converged_indices(5, 0.0) == []


def methods() -> list[Method]:
    schedule = BUDGETS["1.67x"]
    return [rule_method("reuse", "b", schedule), rule_method("taylor1", "b", schedule), euler_method("b", 4)]


def test_two_processes_find_what_one_finds() -> None:
    asked = settings(batch_size=2, wall_clock_repeats=1)
    prompts, seeds = samples(PROMPTS[:2], 3, 700)
    given = {"call": CALL, "settings": asked}
    one = evaluate_methods(pipeline(), methods(), prompts, seeds, scorer=EvenScorer(), **given)
    parts = share_out(len(prompts), asked, 2)
    assert [part.starts for part in parts] == [(0,), (2, 4)]
    found = [measure_part(pipeline(), methods(), prompts, seeds, part, scorer=EvenScorer(), **given) for part in parts]
    gather(found, methods(), prompts, seeds, **given)  # leaves the parts as they were
    two = gather(found, methods(), prompts, seeds, **given)
    assert one.counts["processes"] == 1 and two.counts["processes"] == 2
    assert two.samples.keys() == one.samples.keys() and two.converged_indices == one.converged_indices
    for key, values in one.samples.items():
        assert values.keys() == two.samples[key].keys()
        for metric, expected in values.items():
            np.testing.assert_allclose(two.samples[key][metric], expected, rtol=1e-4, err_msg=f"{key} {metric}")
    for mine, theirs in zip(two.rows, one.rows, strict=True):
        assert mine.feature_error_by_step == theirs.feature_error_by_step
        assert (mine.bytes_kept, mine.computed_steps, mine.flops_ratio) == (
            theirs.bytes_kept,
            theirs.computed_steps,
            theirs.flops_ratio,
        )
        assert mine.wall_clock_ratio is not None and mine.wall_clock_ratio > 0


def test_a_converged_image_is_compared_with_the_image_of_its_place() -> None:
    """Of four images of a batch the second and the last have a converged run."""
    images = torch.stack([torch.full((3, 8, 8), value) for value in (0.1, 0.2, 0.3, 0.4)])
    measured = Measured()
    _score(measured, images, None, list("abcd"), None, {1: images[1] + 0.1, 3: images[3] + 0.01})
    (found,) = measured.converged
    assert found.tolist() == pytest.approx([20.0, 40.0], abs=1e-3) and measured.psnr == []


def test_the_converged_run_has_its_own_number_of_steps_and_the_samples_own_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[list[str], list[int], int]] = []

    def sampled(pipe: object, prompts: list[str], seeds: list[int], call: CallParams, **_: object) -> torch.Tensor:
        asked.append((prompts, seeds, call.num_inference_steps))
        return torch.zeros(len(prompts), 3, 8, 8)

    monkeypatch.setattr(measure, "sample", sampled)
    prompts, seeds = list("aabbccdd"), list(range(10, 18))
    chosen = settings(batch_size=2, converged_fraction=0.5, converged_steps=20)
    images = _converged(None, prompts, seeds, Part(starts=(2, 4), timed=()), CALL, chosen)
    assert list(images) == [3, 5] and asked == [(["b", "c"], [13, 15], 20)]


def test_every_batch_has_its_own_prompts_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], list[int]]] = []

    def run(pipe: object, method: object, prompts: list[str], seeds: list[int], *_: object) -> tuple[None, None]:
        asked.append((prompts, list(seeds)))
        return None, None

    monkeypatch.setattr(measure, "_run", run)
    monkeypatch.setattr(measure, "_score", lambda *_: None)
    pipe = SimpleNamespace(scheduler=SimpleNamespace(sigmas=torch.zeros(3)))
    chosen = settings(batch_size=2, converged_fraction=0.0)
    measure_part(pipe, [], list("abcde"), list(range(5)), Part(starts=(2, 4), timed=()), call=CALL, settings=chosen)
    assert asked == [(["c", "d"], [2, 3]), (["e"], [4])]


def test_feature_errors_are_relative_to_the_plain_runs_features() -> None:
    ours, true = [torch.full((1, 2, 2), value) for value in (1.0, 3.0)], [torch.full((1, 2, 2), 4.0)] * 2
    errors = _feature_errors(SimpleNamespace(features=ours), SimpleNamespace(features=true), 2)  # type: ignore[arg-type]
    assert errors == (0.75, 0.25)
