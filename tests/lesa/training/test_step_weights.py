"""Weights of their own for each step: the formula, its closed form, and what a predictor of the kind will serve."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lesa.predictor.predictor import Predictor
from lesa.predictor.projection import project
from lesa.predictor.rule import History
from lesa.predictor.spec import STEPS, Variant
from lesa.predictor.step_weights import correction, differences, to_difference_weights, to_feature_weights
from lesa.schedule import Schedule, stage_of_steps
from lesa.training.step_weights import LeastSquares, StepWeights, fit_step_weights
from tests.helpers import training_set
from tests.lesa.predictor.test_predictor import SCHEDULE, SIGMAS, SPEC, C, S, run_history, tensors_of

OWN = dataclasses.replace(
    SPEC,
    kind="per_step",
    step_history=3,
    projection="low_rank",
    variants=(Variant(name="2x", full_steps=SCHEDULE.full_steps), Variant(name="3x", full_steps=(0, 1, 2, 5))),
)


def test_weights_of_differences_are_the_same_sum() -> None:
    scale, history = torch.randn(3, C), [torch.randn(2, 5, C) for _ in range(3)]
    plain = sum(factor * feature for factor, feature in zip(scale, history, strict=True))
    said = correction(history[0], differences(history, 3), to_difference_weights(scale), torch.zeros(C))
    torch.testing.assert_close(to_feature_weights(to_difference_weights(scale)), scale)
    torch.testing.assert_close(said, plain, rtol=1e-5, atol=1e-5)


def test_least_squares_finds_the_weights_that_made_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    regressors = torch.randn(3, 4, 5, C, generator=generator)
    regressors[1] = 0.0  # history that is not there
    weights = torch.randn(3, C, generator=generator)
    sums = LeastSquares(1, 3, C, torch.device("cpu"))
    sums.add([0], regressors, (weights[:, None, None] * regressors).sum(0, keepdim=True))
    found = sums.solve(ridge=0.0)
    torch.testing.assert_close(found[0, [0, 2]], weights[[0, 2]], rtol=1e-4, atol=1e-4)
    assert found[0, 1].eq(0).all()
    shrunk = sums.solve(ridge=1.0)
    assert shrunk[0, 0].abs().sum() < found[0, 0].abs().sum()


def test_the_basis_combines_regressors_to_uncorrelated_ones_of_size_one() -> None:
    generator = torch.Generator().manual_seed(1)
    newest = torch.randn(4, 50, C, generator=generator)
    older = newest + 0.03 * torch.randn(4, 50, C, generator=generator)  # nearly what the newest is
    regressors = torch.stack([newest, older, torch.zeros_like(newest), torch.ones_like(newest)])
    target = 3.0 * torch.randn(4, 50, C, generator=generator)
    sums = LeastSquares(1, 4, C, torch.device("cpu"))
    sums.add([0], regressors, target[None])
    basis = sums.basis(ridge=0.0)[0]  # [C, R, R]
    assert basis[:, 2].eq(0).all() and basis[:, :, 2].eq(0).all()
    combined = torch.einsum("cij,ibtc->jbtc", basis, regressors.double())[[0, 1, 3]]
    products = torch.einsum("ibtc,jbtc->cij", combined, combined)
    torch.testing.assert_close(products, torch.eye(3).double().expand_as(products), rtol=0, atol=1e-2)
    quiet = sums.basis(ridge=1e-2)[0]
    assert quiet.abs().amax() < basis.abs().amax(), "the ridge bounds what hardly varies by itself"


def test_regressors_that_go_together_exactly_have_a_basis_without_a_ridge() -> None:
    newest = torch.randn(4, 50, C, generator=torch.Generator().manual_seed(2))
    sums = LeastSquares(1, 3, C, torch.device("cpu"))
    sums.add([0], torch.stack([newest, newest, torch.ones_like(newest)]), newest[None])
    assert sums.basis(ridge=0.0).isfinite().all()


def test_regressions_are_pooled_by_their_shares() -> None:
    generator = torch.Generator().manual_seed(3)
    regressors, target = torch.randn(2, 3, 4, 50, C, generator=generator), torch.randn(2, 4, 50, C, generator=generator)
    apart, together = LeastSquares(2, 3, C, torch.device("cpu")), LeastSquares(1, 3, C, torch.device("cpu"))
    for place, share in enumerate((1.0, 4.0)):
        apart.add([place], regressors[place], target[place][None])
        together.add([0], share**0.5 * regressors[place], share**0.5 * target[place][None])
    pooled = apart.pooled(torch.tensor([1.0, 4.0]).double())
    torch.testing.assert_close(pooled.solve(0.1), together.solve(0.1))
    torch.testing.assert_close(pooled.basis(0.1), together.basis(0.1))
    torch.testing.assert_close(pooled.power, together.power)


def test_an_export_is_what_was_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = StepWeights(torch.rand(S, 4, C, generator=generator), torch.rand(S, C, 4, 4, generator=generator))
    with torch.no_grad():
        weights.values.normal_(generator=generator)
    history = run_history(upto=7)
    trained = weights(history.features[0], differences(history.features, 3), 8)
    tensors = weights.export()
    said = correction(
        history.features[0], differences(history.features, 3), tensors["weight"][8], tensors["bias"][8]
    )
    torch.testing.assert_close(said, trained)
    again = StepWeights(torch.zeros(S, 4, C), weights.basis)
    again.load_export(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in again.export().items())


@pytest.mark.parametrize("projection", ["per_channel", "low_rank", "dense"])
def test_a_bound_predictor_adds_its_steps_own_weights(projection: str) -> None:
    """h_0 + alpha z + c h_0 + sum u (differences) + b, whatever was folded on the way."""
    spec = dataclasses.replace(OWN, projection=projection)
    predictor = Predictor(spec, tensors_of(spec))
    rule = predictor.bind(SCHEDULE, SIGMAS)
    alphas, stages = predictor.alphas(SCHEDULE, SIGMAS), stage_of_steps(SIGMAS, (0.6,))
    own = predictor.step_tensors(spec.variants[0])
    for step, upto in ((4, 4), (8, 8), (7, 7)):
        history = run_history(upto=upto)
        stage = stages[step]
        z = project(
            history.features[: spec.history_sizes[stage]], predictor.expert(spec.variants[0], stage, "projection")
        )
        changes = differences(history.features, 3)
        wanted = history.features[0] + float(alphas[step]) * z
        wanted = wanted + correction(history.features[0], changes, own["weight"][step], own["bias"][step])
        torch.testing.assert_close(rule(history, step), wanted, rtol=1e-4, atol=1e-4)
        before = dict(history.memo)
        rule(history, step)  # a second step of the anchor: nothing is computed anew
        assert all(history.memo[key] is value for key, value in before.items()) and before


def test_early_steps_use_the_history_there_is() -> None:
    predictor = Predictor(OWN, tensors_of(OWN))
    rule = predictor.bind(Schedule.explicit(S, (0, 1, 2, 5)), SIGMAS)
    history = History(3)
    history.push(0, torch.ones(1, 2, C))
    history.push(1, 2 * torch.ones(1, 2, C))
    assert rule(history, 2).isfinite().all()
    early = Schedule.explicit(S, (0, 4, 8))  # step 1 has one feature behind it, which no expert is asked about
    spec = dataclasses.replace(OWN, variants=(Variant(name="3x", full_steps=early.full_steps),))
    tensors = tensors_of(spec)
    rule = Predictor(spec, tensors).bind(early, SIGMAS)
    history = History(3)
    history.push(0, torch.randn(1, 2, C))
    wanted = history.features[0] * (1 + tensors["3x/steps/weight"][1, 0]) + tensors["3x/steps/bias"][1]
    torch.testing.assert_close(rule(history, 1), wanted)
    plain = dataclasses.replace(spec, kind="lesa")
    with pytest.raises(ValueError, match="needs 2 full steps before step 1"):
        Predictor(plain, {n: t for n, t in tensors.items() if f"/{STEPS}/" not in n}).bind(early, SIGMAS)


def test_other_full_steps_are_refused_and_plain_sampling_is_not() -> None:
    predictor = Predictor(OWN, tensors_of(OWN))
    with pytest.raises(ValueError, match="weights of each step serve the full steps they were trained for only"):
        predictor.bind(Schedule.explicit(S, (0, 1, 2, 4, 6, 9)), SIGMAS)
    plain = predictor.bind(Schedule.uniform(S, 1), SIGMAS)
    assert not plain.by_step
    missing = {name: t for name, t in predictor.tensors.items() if f"2x/{STEPS}/bias" != name}
    with pytest.raises(ValueError, match="missing tensor 2x/steps/bias"):
        Predictor(OWN, missing)


def test_of_two_variants_with_as_many_full_steps_the_trained_one_serves() -> None:
    variants = (Variant(name="a", full_steps=(0, 1, 2, 5)), Variant(name="b", full_steps=(0, 1, 2, 6)))
    spec = dataclasses.replace(OWN, variants=variants)
    predictor = Predictor(spec, tensors_of(spec))
    assert predictor.spec.variant_for(Schedule.explicit(S, (0, 1, 2, 6))).name == "b"
    assert predictor.spec.variant_for(Schedule.explicit(S, (0, 1, 2, 5))).name == "a"


def test_the_closed_form_is_nearer_than_what_it_corrects(tmp_path: Path) -> None:
    train, _ = training_set.splits(tmp_path / "set.zarr")
    schedule = Schedule.uniform(training_set.STEPS, 3)
    steps = [s for s in range(schedule.num_steps) if schedule.anchors(s, 2)[1:]]
    fitted = fit_step_weights(
        train, schedule, steps, lambda history, _: history[0], history_size=3, ridge=1e-3
    )
    assert fitted.basis[0].eq(0).all() and fitted.basis[3].abs().gt(0).any()
    for step in schedule.predicted_steps:
        history = [train.feature_batch(range(8), [past])[:, 0] for past in schedule.anchors(step, 3)]
        target = train.feature_batch(range(8), [step])[:, 0]
        with torch.no_grad():
            said = history[0] + fitted(history[0], differences(history, 3), step)
        assert (said - target).square().mean() < 0.2 * (history[0] - target).square().mean()


def test_as_much_history_is_kept_as_the_longer_of_both_looks_back_on() -> None:
    spec = dataclasses.replace(OWN, history_sizes=(2, 2), step_history=3)
    assert Predictor(spec, tensors_of(spec)).bind(SCHEDULE, SIGMAS).history_size == 3
    plain = dataclasses.replace(spec, kind="lesa")
    assert Predictor(plain, tensors_of(plain)).bind(SCHEDULE, SIGMAS).history_size == 2
