"""Dynamic mode decomposition as a rule: the features as a sum of exponentials in the step.

Of n equally spaced features x_1 .. x_n of a sample, X = [x_1 .. x_{n-1}] and Y = [x_2 .. x_n], the operator that takes
each to the next is fitted in the space of X's leading singular vectors, `A = U^T Y V S^-1` with `X = U S V^T`; its
eigenvalues l and modes `Y V S^-1 W` carry the newest feature h spacings on, `sum_i b_i l_i^h mode_i` (Schmid 2010;
exact DMD, Tu et al. 2014, arXiv 1312.0041, algorithm 2). All of it is a weighted sum of x_2 .. x_n whose weights follow
from the features' inner products, so that nothing of the features' size is decomposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from lesa.predictor.rule import History, MemoKey, WithoutStages

FEWEST = 3  # features of a fit: two pairs
_TOLERANCE = 1e-4  # singular values below this share of the largest are noise
_CHUNK = 1024  # tokens whose inner products are taken at once, in float64
_EIGENVALUES: MemoKey = ("dmd eigenvalues",)
_MODES: MemoKey = ("dmd modes",)  # weighted, as `fitted` gives them


@dataclass(frozen=True)
class DMD(WithoutStages):
    """The forecast of dynamic mode decomposition, each sample fitted on its own.

    The fit takes the longest run of equally spaced full steps that ends at the newest one; where that is shorter than
    three, the line through the two newest features stands in. Between multiples of the spacing the principal power of
    the eigenvalues is taken, and the real part of the sum.
    """

    rank: int = 5  # modes at most
    history_size: int = 6
    name: str = "dmd"
    keeps_predictions: bool = False

    def __call__(self, history: History, step: int) -> torch.Tensor:
        count = equally_spaced(history.steps)
        newest = history.features[0]
        if count < FEWEST:
            return _line(history, step)
        if _MODES not in history.memo:
            gram = _gram(history.features[:count][::-1])
            fits = [fitted(each, self.rank) for each in gram]
            history.memo[_EIGENVALUES] = torch.stack([eigenvalues for eigenvalues, _ in fits])
            history.memo[_MODES] = torch.stack([columns for _, columns in fits])
        ahead = (step - history.steps[0]) / (history.steps[0] - history.steps[1])
        powers = history.memo[_EIGENVALUES].pow(ahead)  # [B, n - 1]
        weights = torch.einsum("bnr,br->nb", history.memo[_MODES], powers).real.flip(0)
        # In float32, as every sum with weights of either sign.
        total = torch.zeros_like(newest, dtype=torch.float32)
        for feature, weight in zip(history.features, weights.to(newest.device, torch.float32), strict=False):
            total = total + weight.view(-1, 1, 1) * feature.float()
        return total.to(newest.dtype)


def equally_spaced(steps: tuple[int, ...]) -> int:
    """How many of `steps` (newest first) are equally spaced, from the newest on."""
    gaps = [later - earlier for later, earlier in pairwise(steps)]
    same = next((index for index, gap in enumerate(gaps) if gap != gaps[0]), len(gaps))
    return same + 1


def fitted(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [n - 1] and weights [n - 1, n - 1] of x_2 .. x_n (rows) in `b_i mode_i` (columns), complex.

    Args:
        gram: [n, n] inner products of x_1 .. x_n, in float64.
        rank: modes at most; what is left of the columns is zero.
    """
    size = len(gram) - 1
    squares, vectors = torch.linalg.eigh(gram[:-1, :-1])  # ascending
    singular = squares.clamp_min(0).sqrt()
    kept = int((singular > _TOLERANCE * singular[-1]).sum().clamp(1, min(rank, size)))
    whitened = vectors[:, -kept:] / singular[-kept:].clamp_min(torch.finfo(gram.dtype).tiny)  # V S^-1
    eigenvalues, inner = torch.linalg.eig(whitened.T @ gram[:-1, 1:] @ whitened)
    modes = whitened.to(inner.dtype) @ inner
    # Least squares for the newest feature, in the geometry of x_2 .. x_n.
    metric = gram[1:, 1:].to(inner.dtype)
    amplitudes = torch.linalg.pinv(modes.mH @ metric @ modes, hermitian=True) @ (modes.mH @ metric[:, -1])
    padded_values, padded = eigenvalues.new_zeros(size), modes.new_zeros(size, size)
    padded_values[:kept], padded[:, :kept] = eigenvalues, modes * amplitudes
    return padded_values, padded


def _gram(features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[B, n, n] inner products in float64, on the CPU: the decompositions are of tiny matrices."""
    batch, tokens = features[0].shape[:2]
    total = torch.zeros(batch, len(features), len(features), dtype=torch.float64, device=features[0].device)
    for start in range(0, tokens, _CHUNK):
        part = torch.stack([feature[:, start : start + _CHUNK].double().flatten(1) for feature in features], dim=1)
        total += part @ part.mT
    return total.cpu()


def _line(history: History, step: int) -> torch.Tensor:
    newest = history.features[0]
    if len(history.features) < 2:
        return newest
    along = (step - history.steps[0]) / (history.steps[0] - history.steps[1])
    return torch.add(newest, newest - history.features[1], alpha=along)
