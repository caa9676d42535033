"""The linear projection of the history, in its three forms."""

from __future__ import annotations

import pytest
import torch

from lesa.predictor.projection import fold, initial_projection, project, project_folded, projection_shapes
from lesa.predictor.spec import PROJECTIONS

C, K, RANK = 3, 2, 2


def random_projection(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in projection_shapes(kind, C, K, RANK).items()
    }


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_against_the_formula(kind: str) -> None:
    tensors = random_projection(kind)
    newest, second = torch.randn(2, 5, C), torch.randn(2, 5, C)
    expected = tensors["scale"][0] * newest + tensors["scale"][1] * second + tensors["bias"]
    both = torch.cat([newest, second], dim=-1)
    if kind == "dense":
        expected = expected + both @ tensors["weight"].T
    elif kind == "low_rank":
        expected = expected + both @ tensors["down"].T @ tensors["up"].T
    torch.testing.assert_close(project([newest, second], tensors), expected)


def test_per_channel_by_hand() -> None:
    tensors = {"scale": torch.tensor([[2.0, 0.0], [-1.0, 3.0]]), "bias": torch.tensor([0.5, -0.5])}
    z = project([torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])], tensors)
    assert z.tolist() == [[2.0 - 10.0 + 0.5, 60.0 - 0.5]]


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_folded_is_the_same(kind: str) -> None:
    tensors = random_projection(kind)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    folded = fold(tensors)
    assert ("folded" in folded) == (kind == "dense")
    features = [torch.randn(2, 5, C) for _ in range(K)]
    torch.testing.assert_close(project_folded(features, folded), project(features, tensors))
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_starts(kind: str) -> None:
    features = [torch.randn(4, C) for _ in range(3)]

    def made(start: str) -> dict[str, torch.Tensor]:
        return initial_projection(kind, C, 3, RANK, start, torch.Generator().manual_seed(1))

    z = project(features, made("extrapolation"))
    torch.testing.assert_close(z, features[0] - features[1])
    for start in ("extrapolation", "random"):
        tensors = made(start)
        assert {name: tuple(t.shape) for name, t in tensors.items()} == projection_shapes(kind, C, 3, RANK)
        assert all(torch.equal(tensors[name], again) for name, again in made(start).items())
    if kind == "low_rank":
        assert made("extrapolation")["down"].any() and not made("extrapolation")["up"].any()
    assert made("random")["scale"].abs().max() <= (3 * C) ** -0.5


def test_a_history_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError):
        project([torch.zeros(1, C)], random_projection("dense"))
