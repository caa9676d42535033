"""Would weights of each sample's own predict better, and does a run show what they should be?

python -m benchmarks.studies.sample_weights            # writes benchmarks/results/sample_weights-<workload>.{json,md}

The default kind has one set of weights for all samples. On recorded validation trajectories (open loop, the default
budget's schedule) least-squares step weights leave a residual at each predicted step. This asks what part of it goes
when the sample adds a few scalar weights of its own, on vectors that its run knows by then: the predicted change, the
newest two differences of features, and what the error meter saw at the newest two full steps.
    fitted    weights fitted to the very residual: no rule with these vectors does better
    told      weights linear in the vectors' lengths and angles, by ridge regression on training trajectories
    K = n     no weights of the sample's own, but n full steps of history in place of the default's
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_files import keep
from benchmarks.studies.error_meter import RESULTS
from lesa.params_file import load_params
from lesa.predictor.step_weights import differences
from lesa.recording.dataset import Trajectories, recorded_splits
from lesa.schedule import Schedule
from lesa.search.jobs import with_schedules
from lesa.training.step_weights import fit_step_weights

LONGER = (4, 5, 6)  # K, full steps of history
RIDGE = 1e-2  # of `told`, relative
TINY = 1e-6  # of `fitted`, relative: two of the vectors may be one

Predicted = dict[int, torch.Tensor]  # step -> [N, L, C]


def linear(
    train: Trajectories, judged: Sequence[Trajectories], schedule: Schedule, size: int, ridge: float
) -> list[Predicted]:
    """What least-squares step weights with `size` full steps of history say at every step from 1 on, of each set."""
    steps = list(range(1, schedule.num_steps))
    weights = fit_step_weights(
        train, schedule, steps, lambda history, _: history[0], history_size=size, ridge=ridge
    )
    found = []
    for data in judged:
        features, said = everything(data, schedule), {}
        for step in steps:
            history = [features[:, past] for past in schedule.anchors(step, size)]
            with torch.no_grad():
                said[step] = history[0] + weights(history[0], differences(history, size), step)
        found.append(said)
    return found


def everything(data: Trajectories, schedule: Schedule) -> torch.Tensor:
    """[N, S, L, C] features."""
    return data.feature_batch(list(range(len(data))), list(range(schedule.num_steps))).float()


def known_vectors(features: torch.Tensor, said: Predicted, schedule: Schedule, step: int) -> torch.Tensor:
    """[N, V, D] vectors that a run knows before it predicts `step`; D = tokens times channels."""
    past = schedule.anchors(step, 3)
    vectors = [said[step] - features[:, past[0]]]
    vectors += [features[:, newer] - features[:, older] for newer, older in pairwise(past)]
    vectors += [features[:, full] - said[full] for full in past[:2] if full in said]
    return torch.stack([vector.flatten(1) for vector in vectors], dim=1).double()


def shapes(vectors: torch.Tensor) -> torch.Tensor:
    """[N, F] what is said of the vectors [N, V, D]: one, the logarithms of their lengths, the cosines between them."""
    lengths = vectors.norm(dim=2).clamp_min(1e-12)
    cosines = [
        (vectors[:, a] * vectors[:, b]).sum(dim=1) / (lengths[:, a] * lengths[:, b])
        for a, b in combinations(range(vectors.shape[1]), 2)
    ]
    return torch.stack([torch.ones(len(vectors)).double(), *lengths.log().T, *cosines], dim=1)


def fitted(vectors: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """[N] squared error left by weights fitted to each sample's residual [N, D]."""
    gram = vectors @ vectors.transpose(1, 2)
    gram = gram + torch.diag_embed(gram.diagonal(dim1=1, dim2=2) * TINY + 1e-12)
    weights = torch.linalg.solve(gram, vectors @ residual[..., None])
    return (residual - (weights * vectors).sum(dim=1)).square().sum(dim=1)


def told(
    seen: tuple[torch.Tensor, torch.Tensor], asked: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """[N] squared error left where the weights are a linear function of `shapes`, fitted on `seen`.

    Args:
        seen, asked: vectors [N, V, D] and residuals [N, D].
    """
    vectors, residual = seen
    mean, scale = shapes(vectors).mean(dim=0), shapes(vectors).std(dim=0) + 1e-6
    mean[0], scale[0] = 0.0, 1.0
    form = (shapes(vectors) - mean) / scale
    gram = vectors @ vectors.transpose(1, 2)
    count = form.shape[1] * gram.shape[1]
    system = torch.einsum("nf,nvw,ng->fvgw", form, gram, form).reshape(count, count)
    moment = torch.einsum("nf,nv->fv", form, (vectors @ residual[..., None])[..., 0]).reshape(count)
    table = torch.linalg.solve(system + torch.diag(system.diagonal() * RIDGE + 1e-9), moment)
    vectors, residual = asked
    weights = (shapes(vectors) - mean) / scale @ table.reshape(form.shape[1], -1)
    return (residual - (weights[..., None] * vectors).sum(dim=1)).square().sum(dim=1)


def measure(
    train: Trajectories, validation: Trajectories, schedule: Schedule, size: int, ridge: float
) -> dict[str, dict[str, float]]:
    """Gain of each way over one set of weights for all, in dB: the mean, and that of the hardest fifth of samples."""
    features = [everything(data, schedule) for data in (train, validation)]
    said = linear(train, (train, validation), schedule, size, ridge)
    ways: dict[str, list[torch.Tensor]] = {"": [], "fitted": [], "told": []}
    for step in schedule.predicted_steps:
        sets = [
            (known_vectors(f, s, schedule, step), (f[:, step] - s[step]).flatten(1).double())
            for f, s in zip(features, said, strict=True)
        ]
        ways[""].append(sets[1][1].square().sum(dim=1))
        ways["fitted"].append(fitted(*sets[1]))
        ways["told"].append(told(*sets))
    for longer in LONGER:
        (own,) = linear(train, (validation,), schedule, longer, ridge)
        ways[f"K = {longer}"] = [
            (features[1][:, step] - own[step]).flatten(1).double().square().sum(dim=1)
            for step in schedule.predicted_steps
        ]
    moves = (train.sigmas[1:] - train.sigmas[:-1]).square()[list(schedule.predicted_steps)].double()
    errors = {name: (torch.stack(parts) * moves[:, None]).sum(dim=0) for name, parts in ways.items()}
    base = errors.pop("")
    hardest = base.argsort(descending=True)[: max(1, len(base) // 5)]
    gains = {name: -10 * torch.log10(error / base) for name, error in errors.items()}
    return {name: {"mean": float(g.mean()), "hardest_fifth": float(g[hardest].mean())} for name, g in gains.items()}


def table(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    lines = [
        f"{document['workload']}, {len(document['full_steps'])} full steps, {document['validation']} validation "
        f"trajectories, weights from {document['training']}; open loop, gain in dB of the feature's error.",
        "",
        "| way | mean | hardest fifth |",
        "| --- | --- | --- |",
    ]
    for name, row in document["ways"].items():
        lines.append(f"| {name} | {row['mean']:+.2f} | {row['hardest_fifth']:+.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.sample_weights",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--workload")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        workload = with_schedules(load_params(workload=options.workload))
        train, validation = recorded_splits(workload.recording)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    schedule = workload.budgets()[workload.schedule.default_budget]
    predictor = workload.predictor
    document = {
        "workload": workload.name,
        "full_steps": list(schedule.full_steps),
        "training": len(train),
        "validation": len(validation),
        "ways": measure(train, validation, schedule, predictor.step_history, predictor.ridge),
    }
    text = table(document)
    keep(options.out or RESULTS / f"sample_weights-{workload.name}.json", document, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
