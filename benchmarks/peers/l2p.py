"""L2P, Learnable Linear Predictor (Shen et al., CVPR 2026, arXiv 2604.26365): weights of their own for each step.

A predicted feature is a sum of earlier ones, with scalars that were fitted to recorded trajectories for that step. The
published recipe weighs *all* earlier steps, own predictions among them, and trains the lower-triangular matrix of
weights on true features with Adam from the identity. A second reading, weights of the newest full steps alone by
least squares, is a row of its own. All either needs of the trajectories is the Gram matrix of their steps.
L2P's code also splits features by frequency with one matrix for all: a linear sum is the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lesa.peers.method import Method
from lesa.peers.rules import Weighted, hooked_method
from lesa.predictor.rule import RuleFactory
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule

ITERATIONS, LEARNING_RATE = 201, 0.01  # of the published recipe
RIDGE = 1e-6  # of the least squares, relative to the mean square of the features
_BATCH = 16  # trajectories read at a time


def gram_matrix(data: Trajectories) -> torch.Tensor:
    """float64 [S, S]: mean over trajectories, tokens and channels of the product of the features of two steps."""
    num_steps = len(data.sigmas) - 1
    total = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for start in range(0, len(data), _BATCH):
        indices = range(start, min(start + _BATCH, len(data)))
        flat = data.feature_batch(indices, range(num_steps)).transpose(0, 1).flatten(1).double()
        total += flat @ flat.T / flat.shape[1] * len(indices)
    return total / len(data)


def trained_weights(gram: torch.Tensor) -> torch.Tensor:
    """[S, S]: row s weighs steps 0 .. s - 1 for step s; the published training, on the Gram matrix.

    The mean squared error of row w is `w G w - 2 w g + g_ss`, so that no features are needed.
    """
    gram = gram / gram.diagonal().mean()
    num_steps = len(gram)
    allowed = torch.ones(num_steps, num_steps, dtype=torch.float64).tril(-1)
    weights = torch.diag(torch.ones(num_steps - 1, dtype=torch.float64), -1).requires_grad_()  # the step before
    optimiser = torch.optim.Adam([weights], lr=LEARNING_RATE)
    with torch.enable_grad():
        for _ in range(ITERATIONS):
            rows = (weights * allowed)[1:]
            errors = ((rows @ gram) * rows).sum(dim=1) - 2 * (rows * gram[1:]).sum(dim=1) + gram.diagonal()[1:]
            optimiser.zero_grad()
            errors.mean().backward()
            optimiser.step()
    return (weights * allowed).detach()


def least_squares_weights(gram: torch.Tensor, schedule: Schedule, history_size: int) -> dict[int, list[float]]:
    """Predicted step -> weights of its newest full steps, newest first."""
    ridge = RIDGE * gram.diagonal().mean()
    weights = {}
    for step in schedule.predicted_steps:
        past = list(schedule.anchors(step, history_size))
        system = gram[past][:, past] + ridge * torch.eye(len(past), dtype=torch.float64)
        weights[step] = torch.linalg.solve(system, gram[past, step]).tolist()
    return weights


def published_factory(weights: torch.Tensor) -> RuleFactory:
    """All earlier steps, own predictions included."""
    rows = {step: weights[step, :step].flip(0).tolist() for step in range(1, len(weights))}
    return lambda schedule, sigmas: Weighted(
        lambda past, step: rows[step], "l2p", history_size=len(weights), keeps_predictions=True
    )


def full_steps_factory(gram: torch.Tensor, history_size: int) -> RuleFactory:
    """The newest full steps alone."""

    def factory(schedule: Schedule, sigmas: torch.Tensor) -> Weighted:
        rows = least_squares_weights(gram, schedule, history_size)
        return Weighted(lambda past, step: rows[step], "l2p_full_steps", history_size=history_size)

    return factory


def l2p_methods(budget: str, schedule: Schedule, gram: torch.Tensor, history_sizes: Sequence[int]) -> list[Method]:
    """The published recipe, and one candidate a history size of the second reading (all of one name)."""
    published = hooked_method("l2p", "L2P", budget, schedule, published_factory(trained_weights(gram)))
    candidates = [
        hooked_method(
            "l2p_full_steps",
            "L2P on full steps",
            budget,
            schedule,
            full_steps_factory(gram, size),
            settings={"history_size": size},
        )
        for size in history_sizes
    ]
    return [published, *candidates]
