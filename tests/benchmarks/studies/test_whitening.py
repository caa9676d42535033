"""Bases of step weights: the same weights, moved one regressor at a time or in combinations."""

from __future__ import annotations

import torch

from benchmarks.studies.whitening import scaled, table
from lesa.schedule import Schedule
from lesa.training.step_weights import StepFits
from tests.lesa.training.test_closed_loop import Place, place  # noqa: F401 - fixtures


def test_a_scaled_basis_has_the_regressors_sizes(place: Place) -> None:  # noqa: F811
    """Moving a parameter of one by one moves the prediction as far, whichever regressor it is of."""
    schedule = Schedule.explicit(8, (0, 2, 5))
    indices = list(range(len(place.train)))
    weights = StepFits(place.train, indices, 2, 0.0, torch.device("cpu")).weights(schedule)
    apart = scaled(weights)
    assert torch.equal(apart.start, weights.start) and apart.values.shape == weights.values.shape
    step, past = 7, [5, 2]
    features = place.train.feature_batch(indices, [step, *past])
    target = features[:, 0] - features[:, 1]
    size = target.square().sum(dim=(0, 1)).sqrt()  # [C]
    regressors = [features[:, 1], features[:, 1] - features[:, 2], torch.ones_like(target)]
    for row, regressor in enumerate(regressors):
        moved = (regressor * apart.basis[step, :, row, row]).square().sum(dim=(0, 1)).sqrt()
        torch.testing.assert_close(moved, size, rtol=2e-2, atol=1e-3)
    off = apart.basis - torch.diag_embed(apart.basis.diagonal(dim1=-2, dim2=-1))
    assert not off.any() and not apart.basis[list(schedule.full_steps)].any()


def test_the_table_has_every_row() -> None:
    rows = [{"iterations": 20, "learning_rate": 0.03, "scaled_db": -41.0, "uncorrelated_db": -42.5}]
    document = {
        "workload": "toy", "full_steps": 10, "steps": 50, "fitted": 4, "judged": 2, "start_db": -40.0, "rows": rows,
    }  # fmt: skip
    assert "| 20 | 0.03 | -41.00 | -42.50 | -1.50 |" in table(document)
