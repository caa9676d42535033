"""The optimiser the base model is trained with."""

import pytest
import torch
from torch import nn

from lesa.base_models.optim import Muon, Optimiser, orthogonalise, pick


def test_orthogonalise_brings_singular_values_near_one() -> None:
    for shape in ((3, 8, 8), (2, 4, 16), (2, 16, 4)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        singular = torch.linalg.svdvals(orthogonalise(matrices))
        assert singular.min() > 0.3 and singular.max() < 1.3
    rotation = torch.linalg.qr(torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(1)))[0]
    cosine = nn.functional.cosine_similarity(orthogonalise(5 * rotation).flatten(), rotation.flatten(), dim=0)
    assert cosine > 0.999


def test_muon_fits_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(6, 4, generator=generator)
    weights = [nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))]
    optimiser = Muon(weights, lr=0.2, weight_decay=0.0)
    for step in range(200):
        for group in optimiser.param_groups:
            group["lr"] = 0.2 * (1 - step / 200)
        optimiser.zero_grad()
        torch.stack([(w - wanted).square().mean() for w in weights]).sum().backward()
        optimiser.step()
    assert all((w - wanted).abs().max() < 0.1 for w in weights)


def test_rate_warms_up_and_decays() -> None:
    bias, matrix = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, 4))
    optimiser = Optimiser(
        [bias], learning_rate=0.1, num_steps=100, matrices=[matrix], matrix_learning_rate=0.3, warmup=0.1
    )
    rates = []
    for _ in range(100):
        rates.append(optimiser.learning_rate)
        optimiser.step((bias - 1).square().sum() + (matrix - 1).square().sum())
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.09 and rates[-1] < 0.002
    assert bias.min() > 0.2 and matrix.min() > 0.2


def test_a_loss_that_is_not_finite_stops_training() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimiser = Optimiser([weight], learning_rate=0.1, num_steps=3)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        optimiser.step(weight.sum() * float("nan"))
    assert weight.item() == 0


def test_pick_draws_below_size() -> None:
    index = pick(5, 1000, torch.Generator().manual_seed(0))
    assert index.min() == 0 and index.max() == 4 and len(index) == 1000
