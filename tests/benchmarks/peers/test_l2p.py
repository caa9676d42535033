from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.peers.l2p import (
    RIDGE,
    full_steps_factory,
    gram_matrix,
    l2p_methods,
    least_squares_weights,
    published_factory,
    trained_weights,
)
from lesa.models.pipelines import sample
from lesa.models.probe import probe
from lesa.predictor.rule import History
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule
from tests.helpers import training_set
from tests.helpers.bundles import CALL, NUM_STEPS
from tests.helpers.evaluation import pipeline, sigmas

STEPS = training_set.STEPS
SCHEDULE = Schedule.uniform(STEPS, 4)  # 0 1 2 3 7 11


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return training_set.splits(Path(tmp_path_factory.mktemp("store")) / "t.zarr")[0]


def test_the_gram_matrix_is_that_of_all_features(data: Trajectories) -> None:
    features = data.feature_batch(range(len(data)), range(STEPS)).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(gram_matrix(data), features @ features.T / features.shape[1])


def test_least_squares_weights_are_the_least_squares(data: Trajectories) -> None:
    gram = gram_matrix(data)
    weights = least_squares_weights(gram, SCHEDULE, 3)
    assert set(weights) == set(SCHEDULE.predicted_steps)
    features = data.feature_batch(range(len(data)), range(STEPS)).transpose(0, 1).flatten(1).double()
    ridge = (RIDGE * gram.diagonal().mean() * features.shape[1]).sqrt()
    for step in (5, 9):
        past = list(SCHEDULE.anchors(step, 3))
        stacked = torch.cat([features[past].T, ridge * torch.eye(3, dtype=torch.float64)])
        wanted = torch.cat([features[step], torch.zeros(3, dtype=torch.float64)])[:, None]
        best = torch.linalg.lstsq(stacked, wanted).solution[:, 0]
        torch.testing.assert_close(torch.tensor(weights[step], dtype=torch.float64), best)


def test_the_published_training_only_looks_back_and_learns(data: Trajectories) -> None:
    gram = gram_matrix(data)
    weights = trained_weights(gram)
    assert torch.equal(weights, weights.tril(-1)) and not weights[0].any()

    def error(rows: torch.Tensor) -> float:
        rows = rows[1:]
        return float((((rows @ gram) * rows).sum(1) - 2 * (rows * gram[1:]).sum(1) + gram.diagonal()[1:]).mean())

    reuse = torch.diag(torch.ones(STEPS - 1, dtype=torch.float64), -1)
    assert error(weights) < 0.5 * error(reuse)


def test_rules_weigh_what_they_were_fitted_for(data: Trajectories) -> None:
    gram = gram_matrix(data)
    published = published_factory(trained_weights(gram))(SCHEDULE, data.sigmas)
    assert published.keeps_predictions and published.history_size == STEPS
    features = data.feature_batch([0], range(STEPS))[0]
    history = History(published.history_size)
    for step in range(6):
        history.push(step, features[step][None])
    by_hand = sum(float(w) * features[s] for s, w in enumerate(trained_weights(gram)[6, :6]))
    torch.testing.assert_close(published(history, 6)[0], by_hand, atol=1e-5, rtol=1e-5)
    on_full = full_steps_factory(gram, 2)(SCHEDULE, data.sigmas)
    history = History(2)
    for step in (3, 7):
        history.push(step, features[step][None])
    newest, older = least_squares_weights(gram, SCHEDULE, 2)[9]
    torch.testing.assert_close(on_full(history, 9)[0], newest * features[7] + older * features[3])


def test_through_the_pipeline_at_equal_full_steps() -> None:
    pipe, schedule = pipeline(), Schedule.uniform(NUM_STEPS, 3)
    line = torch.linspace(1.0, 2.0, NUM_STEPS, dtype=torch.float64)
    gram = torch.outer(line, line) + 0.1 * torch.eye(NUM_STEPS, dtype=torch.float64)
    methods = l2p_methods("b", schedule, gram, (2, 3))
    assert [method.name for method in methods] == ["l2p", "l2p_full_steps", "l2p_full_steps"]
    for method in methods:
        with method.using(pipe, sigmas()), probe(pipe) as trace:
            drawn = sample(pipe, ["a dog"], [0], CALL, "latent")
        assert trace.computed == schedule.num_full and torch.isfinite(drawn).all()
