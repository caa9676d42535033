"""The paper's five kinds of model from a saved pipeline to accelerated pictures: record, train, bundle, enable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lesa
from lesa.bundle import Bundle, load_bundle
from lesa.models.families import FAMILIES
from lesa.models.pipelines import sample
from lesa.models.published import PRESETS
from lesa.params import Workload
from lesa.predictor.rule import History
from lesa.recording.dataset import Trajectories
from lesa.recording.tap import FeatureTap
from lesa.schedule import Schedule
from tests.helpers.model_kinds import KINDS, ModelKind, prepare, train_to_bundle

PROMPT = "the white dog"  # in neither of the recorded splits


@dataclass
class Made:
    """What recording and training one kind left."""

    name: str
    kind: ModelKind
    workload: Workload
    pipe: Any
    bundle: Bundle
    train: Trajectories
    figures: dict[str, dict[str, float]]

    def sample(self, **changes: Any) -> torch.Tensor:
        return sample(self.pipe, [PROMPT], [3], self.workload.call, **changes)


@pytest.fixture(scope="module", params=list(KINDS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    root, before = tmp_path_factory.mktemp(request.param), os.getcwd()
    os.chdir(root)
    try:
        workload, pipe = prepare(root, request.param)
        bundle, train, figures = train_to_bundle(workload, pipe)
        yield Made(request.param, KINDS[request.param], workload, pipe, bundle, train, figures)
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def _left_as_found(made: Made) -> Iterator[None]:
    yield
    lesa.disable(made.pipe)


def test_both_training_steps_lower_what_they_are_to_lower(made: Made) -> None:
    assert set(made.figures) > {"closed_loop"}
    for numbers in made.figures.values():
        assert numbers["validation_loss"] < numbers["validation_loss_start"]


def test_a_trajectory_has_the_family_s_branches(made: Made) -> None:
    assert made.bundle.manifest.branches == made.kind.branches
    assert len(made.train) == 3 * len(made.kind.branches)
    assert made.train.features is not None
    assert made.train.features.shape[:2] == (len(made.train), made.workload.call.num_inference_steps)
    assert torch.isfinite(made.train.features).all()


def test_accelerated_pictures(made: Made) -> None:
    plain = made.sample()
    lesa.enable(made.pipe, load_bundle(made.workload.paths.bundle))
    made.pipe(PROMPT, output_type="latent", **lesa.call_kwargs(made.pipe))
    images = made.sample()
    statistics = lesa.summary(made.pipe)
    assert images.shape == plain.shape and images.shape[-3:] == (3, 16, 16)
    assert torch.isfinite(images).all() and not torch.equal(images, plain)
    assert statistics.finished and statistics.num_fallbacks == 0
    assert [r.step for r in statistics.steps if r.kind == "full"] == list(made.kind.full_steps)
    assert statistics.num_branches == len(made.kind.branches)


def test_interval_one_and_disabling_are_the_plain_pipeline_bit_for_bit(made: Made) -> None:
    plain = made.sample()
    lesa.enable(made.pipe, made.bundle, interval=1)
    assert torch.equal(made.sample(), plain)
    assert lesa.summary(made.pipe).num_full == made.workload.call.num_inference_steps
    lesa.disable(made.pipe)
    lesa.enable(made.pipe, made.bundle)
    made.sample()
    lesa.disable(made.pipe)
    assert torch.equal(made.sample(), plain)


def test_every_branch_is_predicted_from_its_own_features_alone(made: Made) -> None:
    """What leaves the last block is worked out again by hand from what that branch, and no other, had at full steps."""
    manifest, num = made.bundle.manifest, len(made.kind.branches)
    schedule = Schedule.explicit(len(manifest.sigmas) - 1, made.kind.full_steps)
    bound = made.bundle.predictor.bind(schedule, torch.tensor(manifest.sigmas))
    lesa.enable(made.pipe, made.bundle)
    with FeatureTap(made.pipe.transformer, dtype=torch.float32) as tap:
        made.sample()
    features = torch.stack(tap.features).unflatten(0, (schedule.num_steps, num))

    def by_hand(branch: int, step: int) -> torch.Tensor:
        history = History(bound.history_size)
        for full in schedule.full_steps:
            if full < step:
                history.push(full, features[full, branch])
        return bound(history, step)

    for step in schedule.predicted_steps:
        for branch in range(num):
            assert torch.allclose(features[step, branch], by_hand(branch, step), atol=1e-5)
            if num > 1:
                assert not torch.allclose(features[step, branch], by_hand(1 - branch, step), atol=1e-2)


def test_another_number_of_branches_is_refused(made: Made) -> None:
    lesa.enable(made.pipe, made.bundle)
    family = FAMILIES[made.kind.family]
    other = {"true_cfg_scale": 1.0} if len(made.kind.branches) == 2 else {"true_cfg_scale": 3.0}
    call = {**lesa.call_kwargs(made.pipe), "output_type": "latent", "negative_prompt": " ", **other}
    with pytest.raises(ValueError, match="guidance branches"):
        made.pipe(PROMPT, **call)
    # Every kind of the paper is a published model of its family.
    assert family.transformer_class in {preset.transformer_class for preset in PRESETS.values()}
    made.sample()
    assert lesa.summary(made.pipe).finished
