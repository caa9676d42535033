"""What `adaptive=True` does for runs like those the bundle was measured with, and for runs that are not.

python -m benchmarks.studies.adaptive data/bundles/flux-digits --prompts 64 --seeds 2
python -m benchmarks.studies.adaptive data/bundles/flux-photos --prompts 256 --seeds 2 --strengths 0

Held-out prompts with fresh noise, one sample a run, on the model as it is and with adapters (LoRA of random weights, at
several strengths) that the predictor was never trained with. Each is compared with the plain run of the same adapted
model: the budget alone, the budget with `adaptive=True`, and the next slower budget for all.
    traffic   half of the samples without and half with an adapter: the same mean number of full steps spent by need
              (`adaptive`) or blindly, the slower budget for a share of the samples drawn without looking
Results: benchmarks/results/adaptive-<workload>.{json,md}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import lesa
from benchmarks.results_files import keep
from lesa.bundle import Bundle, load_bundle
from lesa.bundle.budgets import slower_budget
from lesa.evaluation.bootstrap import Resamples
from lesa.evaluation.compare import refuse_trained
from lesa.metrics import psnr
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.recording.prompts import read_splits

RESULTS = Path("benchmarks/results")
SEED_OFFSET = 80_000  # noise of the test prompts here: nothing else uses it
RANK = 4
STRENGTHS = (0.0, 2.0, 4.0, 8.0)  # what the random adapter's up matrices are multiplied by; 0: no adapter

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """One way to sample: PSNR [N] to the plain run, full steps [N], and which runs changed over [N]."""

    psnr: Array
    full_steps: Array
    changed: NDArray[np.bool_]

    def take(self, chosen: NDArray[np.intp]) -> Runs:
        return Runs(psnr=self.psnr[chosen], full_steps=self.full_steps[chosen], changed=self.changed[chosen])


def adapted(workload: Workload, strength: float, seed: int = 0) -> tuple[Any, float]:
    """A fresh pipeline with a random adapter on its attention, and the median relative change of those weights."""
    from peft import LoraConfig

    pipe = load_pipeline(workload.model, workload.resources.device)
    if strength == 0:
        return pipe, 0.0
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config, adapter_name="random")
    changes = []
    for module in pipe.transformer.modules():
        if hasattr(module, "lora_B") and "random" in module.lora_B:
            with torch.no_grad():
                module.lora_B["random"].weight.mul_(strength)
                delta = module.get_delta_weight("random")
            changes.append(float(delta.norm() / module.get_base_layer().weight.norm()))
    if not changes:
        raise ValueError(f"{type(pipe.transformer).__name__}: no attention projections for an adapter")
    return pipe, float(np.median(changes))


def shares(runs: Runs) -> dict[str, float]:
    """Share of the runs by their number of full steps, fewest first."""
    counts, found = np.unique(runs.full_steps, return_counts=True)
    return {f"{count:g}": float(share) for count, share in zip(counts, found / len(runs.full_steps), strict=True)}


def measure(
    pipe: Any, bundle: Bundle, prompts: Sequence[str], seeds: Sequence[int], plain: torch.Tensor, **choice: Any
) -> Runs:
    """Sample one at a time, so that each run decides for its own sample."""
    values, full, changed = [], [], []
    lesa.enable(pipe, bundle, allow=("lora",), **choice)
    try:
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            picture = sample(pipe, [prompt], [seed], bundle.manifest.call)
            values.append(float(psnr(picture, plain[number : number + 1])[0]))
            statistics = lesa.summary(pipe)
            full.append(statistics.num_full)
            changed.append(statistics.change is not None)
    finally:
        lesa.disable(pipe)
    return Runs(psnr=np.asarray(values), full_steps=np.asarray(full, np.float64), changed=np.asarray(changed))


def figures(runs: Runs) -> dict[str, float]:
    return {
        "psnr_mean": float(runs.psnr.mean()),
        "psnr_p5": float(np.percentile(runs.psnr, 5)),
        "mean_full_steps": float(runs.full_steps.mean()),
        "share_changed": float(runs.changed.mean()),
    }


def blind(fast: Runs, slow: Runs, mean_full_steps: float, resamples: int = 200) -> dict[str, float]:
    """The slower budget for a share of samples drawn blindly, the share such that the mean number of full steps is met.

    Returns:
        mean and 5th percentile, averaged over draws.
    """
    extra = slow.full_steps.mean() - fast.full_steps.mean()
    share = float(np.clip((mean_full_steps - fast.full_steps.mean()) / extra, 0.0, 1.0))
    random = np.random.default_rng(0)
    count = round(share * len(fast.psnr))
    means, tails = [], []
    for _ in range(resamples):
        values = fast.psnr.copy()
        chosen = random.permutation(len(values))[:count]
        values[chosen] = slow.psnr[chosen]
        means.append(values.mean())
        tails.append(np.percentile(values, 5))
    return {
        "psnr_mean": float(np.mean(means)),
        "psnr_p5": float(np.mean(tails)),
        "mean_full_steps": float(fast.full_steps.mean() + extra * count / len(fast.psnr)),
        "share_slower": share,
    }


def traffic(parts: Sequence[Mapping[str, Runs]]) -> dict[str, dict[str, float]]:
    """Half the samples of each part, different ones: adaptive beside blind spending of the same mean."""
    size = len(parts[0]["fast"].psnr)
    chosen = [np.arange(place, size, len(parts)) for place in range(len(parts))]

    def joined(name: str) -> Runs:
        taken = [part[name].take(places) for part, places in zip(parts, chosen, strict=True)]
        return Runs(
            psnr=np.concatenate([t.psnr for t in taken]),
            full_steps=np.concatenate([t.full_steps for t in taken]),
            changed=np.concatenate([t.changed for t in taken]),
        )

    adaptive = figures(joined("adaptive"))
    return {
        "fast": figures(joined("fast")),
        "adaptive": adaptive,
        "blind": blind(joined("fast"), joined("slow"), adaptive["mean_full_steps"]),
        "slow": figures(joined("slow")),
    }


def study(
    workload: Workload, bundle: Bundle, budget: str, prompts: Sequence[str], seeds: int, strengths: Sequence[float]
) -> dict[str, Any]:
    """The document that is written."""
    texts = [prompt for prompt in prompts for _ in range(seeds)]
    noise = list(range(SEED_OFFSET, SEED_OFFSET + len(texts)))
    groups = [number for number in range(len(prompts)) for _ in range(seeds)]
    slower = slower_budget(bundle.manifest, budget)
    parts: dict[float, dict[str, Runs]] = {}
    rows = []
    for strength in strengths:
        pipe, change = adapted(workload, strength)
        plain = sample(pipe, texts, noise, bundle.manifest.call, batch_size=workload.evaluate.batch_size)
        runs = {
            "fast": measure(pipe, bundle, texts, noise, plain, budget=budget),
            "adaptive": measure(pipe, bundle, texts, noise, plain, budget=budget, adaptive=True),
            "slow": measure(pipe, bundle, texts, noise, plain, budget=slower),
        }
        parts[strength] = runs
        both, resamples = (runs["adaptive"].psnr, runs["fast"].psnr), Resamples(groups)
        gain, tail = resamples.mean_difference(*both), resamples.percentile_difference(*both, 5.0)
        rows.append(
            {
                "strength": strength,
                "relative_weight_change": change,
                **{name: figures(values) for name, values in runs.items()},
                "gain": [gain.mean, gain.low, gain.high],
                "tail_gain": [tail.mean, tail.low, tail.high],
                "share_by_full_steps": shares(runs["adaptive"]),
            }
        )
        print(f"strength {strength:g}: {rows[-1]['adaptive']}", file=sys.stderr, flush=True)
    return {
        "workload": bundle.manifest.workload,
        "bundle": bundle.digest,
        "budget": budget,
        "slower": slower,
        "samples": len(texts),
        "prompts": len(prompts),
        "rows": rows,
        "traffic": {f"{s:g}": traffic([parts[0.0], parts[s]]) for s in strengths if s > 0 and 0.0 in parts},
    }


def table(document: Mapping[str, Any]) -> str:
    budget, slower = document["budget"], document["slower"]
    lines = [
        f"{document['workload']}, budget {budget} and {slower}: {document['samples']} samples of {document['prompts']} "
        "held-out prompts, one a run; PSNR in dB to the plain run of the same model and adapter, 95% intervals over "
        "prompts.",
        "",
        f"| adapter: strength, change of weights | {budget} | 5th pct. | adaptive | 5th pct. | gain | gain of the 5th "
        f"pct. | full steps | runs by full steps | runs changed over | {slower} for all | 5th pct. |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in document["rows"]:
        fast, adaptive, slow = row["fast"], row["adaptive"], row["slow"]
        gain, tail = ("{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[key]) for key in ("gain", "tail_gain"))
        spread = ", ".join(f"{count}: {share:.0%}" for count, share in row["share_by_full_steps"].items())
        name = "none" if row["strength"] == 0 else f"{row['strength']:g}, {row['relative_weight_change']:.0%}"
        lines.append(
            f"| {name} | {fast['psnr_mean']:.2f} | {fast['psnr_p5']:.2f} | {adaptive['psnr_mean']:.2f} | "
            f"{adaptive['psnr_p5']:.2f} | {gain} | {tail} | {adaptive['mean_full_steps']:.2f} | {spread} | "
            f"{adaptive['share_changed']:.1%} | {slow['psnr_mean']:.2f} | {slow['psnr_p5']:.2f} |"
        )
    if document["traffic"]:
        lines += [
            "",
            "Half of the runs without an adapter, half with one of the strength named:",
            "",
            "| strength | how full steps are spent | mean full steps | PSNR | 5th pct. |",
            "| --- | --- | --- | --- | --- |",
        ]
    words = {"fast": f"{budget} for all", "adaptive": "adaptive", "blind": f"{slower} for a share drawn blindly"}
    for strength, ways in document["traffic"].items():
        for name, said in words.items():
            way = ways[name]
            lines.append(
                f"| {strength} | {said} | {way['mean_full_steps']:.2f} | {way['psnr_mean']:.2f} | "
                f"{way['psnr_p5']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status is 2 for anything the caller can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.adaptive", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--budget", help="default: the bundle's default budget")
    parser.add_argument("--prompts", type=int, default=64, help="test prompts, from the first")
    parser.add_argument("--seeds", type=int, default=2, help="of each prompt")
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS), help="of the adapter; 0: none")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        if min(options.prompts, options.seeds) < 1 or min(options.strengths) < 0:
            raise ValueError("--prompts and --seeds must be at least 1, --strengths at least 0")
        bundle = load_bundle(options.bundle)
        workload = load_params(workload=bundle.manifest.workload)
        prompts = read_splits(workload.paths.prompts)["test"][: options.prompts]
        refuse_trained(prompts, bundle.manifest.data["training"])
        budget = options.budget or bundle.manifest.default_budget
        document = study(workload, bundle, budget, prompts, options.seeds, options.strengths)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    out = options.out or RESULTS / f"adaptive-{document['workload']}-{budget}.json"
    text = table(document)
    keep(out, document, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
