"""What the error meter knows of a picture's error, and what full steps given by need could make of it.

python -m benchmarks.studies.error_meter data/bundles/flux-digits --prompts 32 --seeds 10

At each full step the meter compares the feature with what the predictor would have said. This asks two things of it on
validation prompts with fresh noise, one sample a run:
    r       correlation, over samples, of the picture's PSNR with what a ridge regression on the logarithms of the
            errors at the first full steps says of it (cross-validated in eight folds)
    giving  5th percentile when each sample gets one of the bundle's budgets such that the mean number of full steps
            stays that of the default budget: the cheapest one that reaches a level common to all samples, by the true
            PSNR at every budget (`oracle`), and by the regression on the first half of the default budget's full steps
            (`meter`). A rule made for the 5th percentile alone could give up the worst twentieth and do a little better
Results: benchmarks/results/error_meter-<workload>.{json,md}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lesa
from benchmarks.results_files import keep
from lesa.bundle import Bundle, load_bundle
from lesa.metrics import psnr
from lesa.models.pipelines import load_pipeline, sample
from lesa.params_file import load_params
from lesa.recording.prompts import read_splits

RESULTS = Path("benchmarks/results")
SEED_OFFSET = 90_000  # noise of the validation prompts here: nothing else uses it
FOLDS = 8
RIDGE = 1e-3

Array = NDArray[np.float64]


def measure(pipe: Any, bundle: Bundle, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, tuple[Array, Array]]:
    """For each budget the PSNR [N] of every sample and the errors [N, F] at its full steps that were measured."""
    call = bundle.manifest.call
    plain = sample(pipe, prompts, seeds, call)
    found = {}
    for budget in bundle.manifest.budgets:
        values, errors = [], []
        lesa.enable(pipe, bundle, budget=budget)
        try:
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                values.append(float(psnr(sample(pipe, [prompt], [seed], call), plain[number : number + 1])[0]))
                errors.append([s.error for s in lesa.summary(pipe).steps if s.error is not None])
        finally:
            lesa.disable(pipe)
        found[budget] = (np.asarray(values, np.float64), np.asarray(errors, np.float64))
        print(f"{budget}: {np.mean(values):.2f} dB", file=sys.stderr, flush=True)
    return found


def predicted(regressors: Array, values: Array) -> Array:
    """[N] what a ridge regression fitted on the other folds says of each sample's value.

    Args:
        regressors: [N, F].
        values: [N].
    """
    fold = np.arange(len(values)) % FOLDS
    result = np.empty_like(values)
    for number in range(FOLDS):
        seen, held = fold != number, fold == number
        center, scale = regressors[seen].mean(axis=0), regressors[seen].std(axis=0) + 1e-12
        x, mean = (regressors[seen] - center) / scale, values[seen].mean()
        system = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
        weights = np.linalg.solve(system, x.T @ (values[seen] - mean))
        result[held] = (regressors[held] - center) / scale @ weights + mean
    return result


def correlation(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def given_by_need(
    believed: Mapping[str, Array], true: Mapping[str, Array], full: Mapping[str, int], default: str
) -> dict[str, float]:
    """Each sample gets the cheapest budget believed to reach one level, the level such that the mean count stays.

    Args:
        believed: PSNR [N] thought of each budget.
        true: PSNR [N] measured.
        full: full steps of each budget.
        default: the budget whose number of full steps is the mean.

    Returns:
        mean number of full steps, and mean and 5th percentile of the true PSNR.
    """
    names = sorted(full, key=full.__getitem__)
    thought = np.stack([believed[name] for name in names])
    reached = np.stack([true[name] for name in names])
    counts = np.array([full[name] for name in names])
    best: tuple[float, NDArray[np.intp]] | None = None
    for level in np.quantile(thought, np.linspace(0, 1, 2001)):
        good = thought >= level
        chosen = np.where(good.any(axis=0), good.argmax(axis=0), len(names) - 1)
        off = abs(float(counts[chosen].mean()) - full[default])
        if best is None or off < best[0]:
            best = (off, chosen)
    assert best is not None
    values = reached[best[1], np.arange(reached.shape[1])]
    return {
        "mean_full_steps": float(counts[best[1]].mean()),
        "psnr_mean": float(values.mean()),
        "psnr_p5": float(np.percentile(values, 5)),
    }


def analyse(found: Mapping[str, tuple[Array, Array]], full: Mapping[str, int], default: str) -> dict[str, Any]:
    """The document that is written: `budgets` with r, and `giving`."""
    budgets = {}
    for name, (values, errors) in found.items():
        logs = np.log(np.maximum(errors, 1e-12))
        budgets[name] = {
            "full_steps": full[name],
            "psnr_mean": float(values.mean()),
            "psnr_std": float(values.std()),
            "psnr_p5": float(np.percentile(values, 5)),
            "r_by_errors_seen": [
                correlation(predicted(logs[:, :count], values), values) for count in range(1, logs.shape[1] + 1)
            ],
            "r_with_default_budget": correlation(values, found[default][0]),
        }
    true = {name: values for name, (values, _) in found.items()}
    early = np.log(np.maximum(found[default][1], 1e-12))
    early = early[:, : max(1, early.shape[1] // 2)]
    giving = {
        "oracle": given_by_need(true, true, full, default),
        "meter": given_by_need({name: predicted(early, v) for name, v in true.items()}, true, full, default),
    }
    return {"default_budget": default, "budgets": budgets, "giving": giving}


def table(document: Mapping[str, Any]) -> str:
    """The document as Markdown."""
    default = document["default_budget"]
    lines = [
        f"{document['workload']}: {document['samples']} samples of {document['prompts']} validation prompts, "
        "one sample a run.",
        "",
        "| budget | full steps | PSNR, dB | std | 5th pct. | r with the default | r by errors seen: 1, half, all |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in document["budgets"].items():
        seen = row["r_by_errors_seen"]
        shown = ", ".join(f"{value:.2f}" for value in (seen[0], seen[(len(seen) - 1) // 2], seen[-1]))
        lines.append(
            f"| {name} | {row['full_steps']} | {row['psnr_mean']:.2f} | {row['psnr_std']:.2f} | {row['psnr_p5']:.2f} | "
            f"{row['r_with_default_budget']:.2f} | {shown} |"
        )
    own = document["budgets"][default]
    lines += ["", "| full steps given by | mean full steps | PSNR, dB | 5th pct. |", "| --- | --- | --- | --- |"]
    lines.append(
        f"| nobody: {default} for all | {own['full_steps']:.2f} | {own['psnr_mean']:.2f} | {own['psnr_p5']:.2f} |"
    )
    for name, row in document["giving"].items():
        lines.append(f"| {name} | {row['mean_full_steps']:.2f} | {row['psnr_mean']:.2f} | {row['psnr_p5']:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.error_meter",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=32, help="validation prompts, from the first")
    parser.add_argument("--seeds", type=int, default=10, help="of each prompt")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        bundle = load_bundle(options.bundle)
        workload = load_params(workload=bundle.manifest.workload)
        prompts = read_splits(workload.paths.prompts)["validation"][: options.prompts]
        texts = [prompt for prompt in prompts for _ in range(options.seeds)]
        if len(texts) < 2 * FOLDS:
            raise ValueError(f"{len(texts)} samples are too few for {FOLDS} folds: raise --prompts or --seeds")
        seeds = list(range(SEED_OFFSET, SEED_OFFSET + len(texts)))
        found = measure(load_pipeline(workload.model, workload.resources.device), bundle, texts, seeds)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    manifest = bundle.manifest
    full = {name: budget.schedule.num_full for name, budget in manifest.budgets.items()}
    document = {
        "workload": manifest.workload,
        "bundle": bundle.digest,
        "samples": len(texts),
        "prompts": len(prompts),
        **analyse(found, full, manifest.default_budget),
    }
    out = options.out or RESULTS / f"error_meter-{manifest.workload}.json"
    text = table(document)
    keep(out, document, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
