"""Projections in training: an exact start, and whitened inputs, of which numbers of one move predictions alike."""

from __future__ import annotations

import pytest
import torch

from lesa.predictor.projection import initial_projection, project, projection_shapes
from lesa.predictor.spec import PROJECTIONS
from lesa.training.whitened_projection import WhitenedProjection

C, K, RANK = 5, 2, 3


def features(count: int = 4000) -> list[torch.Tensor]:
    """Two that are nearly the same, of channels that differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1e-2, 0.1, 1.0, 10.0, 100.0])
    newest = torch.randn(count, C, generator=generator) * size
    return [newest, newest + 0.05 * size * torch.randn(count, C, generator=generator)]


def whitening(unit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of `features`, uncorrelated and of size one, and units of every channel."""
    rows = torch.stack([*features(), torch.ones(4000, C)]).permute(2, 1, 0)  # [C, n, R]
    factor = torch.linalg.cholesky(rows.transpose(1, 2).double() @ rows.double() / 4000)
    one = torch.eye(K + 1).double().expand_as(factor)
    return torch.linalg.solve_triangular(factor.transpose(1, 2), one, upper=True).float(), torch.full((C,), unit)


def started(kind: str, start: str = "extrapolation") -> WhitenedProjection:
    return WhitenedProjection(
        initial_projection(kind, C, K, RANK, start, torch.Generator().manual_seed(1))
    )


@pytest.mark.parametrize("start", ["extrapolation", "random"])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_whitening_changes_no_prediction(kind: str, start: str) -> None:
    projection, history = started(kind, start), features()
    before = project(history, projection.tensors())
    projection.whiten(*whitening(0.3))
    tensors = projection.tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == projection_shapes(kind, C, K, RANK)
    assert torch.equal(project(history, tensors), before)


def test_a_channels_numbers_move_it_by_its_unit_whatever_its_size() -> None:
    projection, history = started("per_channel"), features()
    projection.whiten(*whitening(0.3))
    before = project(history, projection.tensors())
    moves = []
    for place in range(K + 1):
        with torch.no_grad():
            projection.moved["channel"].zero_()[:, place] = 1.0
        moves.append((project(history, projection.tensors()) - before).detach())
    products = torch.einsum("inc,jnc->cij", torch.stack(moves), torch.stack(moves)) / 4000
    torch.testing.assert_close(products, 0.3**2 * torch.eye(K + 1).expand_as(products), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_a_matrix_learns_in_the_same_inputs_and_units(kind: str) -> None:
    """Quiet channels weigh as much as loud ones, and sums of many numbers no more than a few."""
    projection, history = started(kind), features()
    inputs, unit = whitening(0.3)
    projection.whiten(inputs, unit)
    before = project(history, projection.tensors())
    combined = torch.einsum("cij,inc->njc", inputs[:, :K, :K], torch.stack(history))  # [n, K, C]
    generator = torch.Generator().manual_seed(2)
    drawn = {name: torch.randn(value.shape, generator=generator) for name, value in projection.moved.items()}
    with torch.no_grad():
        for name, value in projection.moved.items():
            if name != "channel":
                value.copy_(drawn[name])
    moved = (project(history, projection.tensors()) - before).detach()
    if kind == "dense":
        expected = 0.3 * combined.flatten(1) @ drawn["weight"].T / (K * C) ** 0.5
    else:
        down = initial_projection(kind, C, K, RANK, "extrapolation", torch.Generator().manual_seed(1))["down"]
        latent = combined.flatten(1) @ (3**0.5 * down + drawn["down"] / (K * C) ** 0.5).T
        assert 0.5 < float(latent.square().mean().sqrt()) < 2.0
        expected = 0.3 * latent @ drawn["up"].T / RANK**0.5
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=2e-3)


def test_what_was_learned_outlives_another_whitening() -> None:
    projection = started("low_rank")
    with torch.no_grad():
        projection.moved["up"].normal_()
        projection.moved["channel"].normal_()
    learned = {name: tensor.detach().clone() for name, tensor in projection.tensors().items()}
    other = started("low_rank")
    other.load(learned)
    other.whiten(*whitening(0.3))
    assert all(torch.equal(tensor, learned[name]) for name, tensor in other.tensors().items())


def test_held_tensors_are_made_once_and_carry_gradients() -> None:
    projection, history = started("low_rank"), features()
    projection.whiten(*whitening(0.3))
    free = project(history, projection.tensors())
    with projection.held():
        assert projection.tensors() is projection.tensors()
        held = project(history, projection.tensors())
    assert projection.tensors() is not projection.tensors()
    assert torch.equal(held, free)
    held.sum().backward()
    assert all(value.grad is not None for value in projection.moved.values())
    with pytest.raises(RuntimeError), projection.held():
        raise RuntimeError
    assert projection.tensors() is not projection.tensors(), "let go of where what is within fails"
