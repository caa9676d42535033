"""Targets of an expert and the whitening of its inputs, from recorded trajectories."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule, stage_of_steps
from lesa.training.experts import Job, new_expert
from lesa.training.targets import Targets, whiten
from tests.helpers.training_set import CHANNELS, design, sigmas, splits

SIGMAS = sigmas()


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return splits(tmp_path_factory.mktemp("data") / "store.zarr")[0]


def targets_on(interval: int) -> Targets:
    return Targets.on(Schedule.uniform(12, interval), SIGMAS, stage_of_steps(SIGMAS, (0.6,)), 1, 2, "full_steps")


def test_inputs_are_uncorrelated_and_units_are_what_is_lacking(train: Trajectories) -> None:
    expert = new_expert(design(), Job("2x", 1), SIGMAS, CHANNELS)
    targets = targets_on(3)
    whiten(expert, [(train, targets)], ridge=0.0, batch_size=3)
    features = train.feature_batch(range(len(train)), targets.needed)
    at = {step: index for index, step in enumerate(targets.needed)}
    with torch.no_grad():
        lacking = features[:, [at[step] for step in targets.steps]] - targets.predict(expert, features)
        alphas = expert.alpha(targets.offsets, targets.steps)
    torch.testing.assert_close(expert.projection.unit, lacking.square().mean(dim=(0, 1, 2)).sqrt(), rtol=1e-4, atol=0)
    rows = torch.cat(
        [
            alpha * torch.stack([features[:, at[past[0]]], features[:, at[past[1]]], torch.ones_like(features[:, 0])])
            for alpha, past in zip(alphas, targets.past, strict=True)
        ],
        dim=1,
    )  # [R, n, L, C]
    combined = torch.einsum("cij,inlc->jnlc", expert.projection.inputs, rows)
    products = torch.einsum("inlc,jnlc->cij", combined, combined) / combined[0, ..., 0].numel()
    torch.testing.assert_close(products, torch.eye(3).expand(CHANNELS, 3, 3), rtol=0, atol=0.02)
    assert expert.projection.inputs[:, 2, :2].eq(0).all()  # no constant in what the matrices read


def test_cases_count_alike_however_far_off_they_are(train: Trajectories) -> None:
    """The unit of two cases is between those of each; one a hundred times as large does not decide alone."""
    assert train.features is not None
    loud = dataclasses.replace(train, features=train.features * 100)
    units = []
    for data in ([train], [loud], [train, loud]):
        expert = new_expert(design(), Job("2x", 1), SIGMAS, CHANNELS)
        whiten(expert, [(one, targets_on(3)) for one in data], ridge=1e-3, batch_size=3)
        units.append(expert.projection.unit)
    assert (units[1] / units[0]).sub(100).abs().max() < 1
    assert (units[2] < 2 * units[0]).all() and (units[2] > units[0]).all()


def test_nothing_to_predict_changes_nothing(train: Trajectories) -> None:
    expert = new_expert(design(), Job("2x", 1), SIGMAS, CHANNELS)
    before = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
    whiten(expert, [(train, targets_on(1))], ridge=1e-3, batch_size=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in expert.state_dict().items())
