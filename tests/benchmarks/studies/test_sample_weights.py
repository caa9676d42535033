"""Weights of each sample's own: found where there is something to find, and not where there is not."""

from __future__ import annotations

import torch

from benchmarks.studies.sample_weights import fitted, measure, told
from lesa.schedule import Schedule

SCHEDULE = Schedule.explicit(12, (0, 1, 4, 8))


class Recorded:
    """Features that move along one direction at a speed of each sample's own, which changes by `bend` of it."""

    def __init__(self, seed: int, bend: float, samples: int = 24) -> None:
        random = torch.Generator().manual_seed(seed)
        self.sigmas = torch.linspace(1, 0, 13)
        speed = 1 + torch.rand(samples, 1, 1, 1, generator=random)
        way = torch.ones(1, 1, 3, 4)
        time = torch.arange(12.0)[None, :, None, None]
        start = torch.randn(samples, 1, 3, 4, generator=random)
        noise = 0.01 * torch.randn(samples, 12, 3, 4, generator=random)
        self.features = start + way * (speed * time + bend * speed**2 * time**2) + noise

    def __len__(self) -> int:
        return len(self.features)

    def feature_batch(self, indices, steps):
        return self.features[list(indices)][:, list(steps)]


def test_a_bend_that_goes_with_the_speed_is_told_from_the_run() -> None:
    found = measure(Recorded(0, 0.05), Recorded(1, 0.05), SCHEDULE, 2, 1e-6)
    assert found["fitted"]["mean"] > found["told"]["mean"] > 1.0


def test_where_samples_move_alike_nothing_is_told() -> None:
    found = measure(Recorded(0, 0.0), Recorded(1, 0.0), SCHEDULE, 2, 1e-6)
    assert abs(found["told"]["mean"]) < 1.0 and found["K = 4"]["mean"] < 1.0


def test_fitted_weights_leave_what_is_at_right_angles() -> None:
    vectors = torch.eye(4).double()[None, :2]
    residual = torch.tensor([[3.0, 4.0, 5.0, 0.0]]).double()
    assert torch.allclose(fitted(vectors, residual), torch.tensor([25.0]).double(), rtol=1e-4)
    same = told((vectors.repeat(8, 1, 1), residual.repeat(8, 1)), (vectors, residual))
    assert 24.9 < float(same) < 25.2
