"""What the gate measures for itself: candidate, champion and every peer on the same fresh samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from flows.gate import Decision, decide
from lesa.bundle import Bundle
from lesa.evaluate import default_methods, evaluate_methods, refuse_trained, samples
from lesa.params import Workload
from lesa.prompts import read_splits

CANDIDATE, CHAMPION = "lesa", "champion"  # names of the two among the methods; all others are peers
TUNING_PROMPTS = 16  # training prompts that peers with a threshold are tuned on


def measure_and_decide(
    workload: Workload,
    pipe: Any,
    candidate: Bundle,
    champion: Bundle | None,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Decision, dict[str, Any]]:
    """Samples with every method, compares, decides.

    Args:
        candidate: the bundle as it lies on disk, not what its makers say of it.
        champion: the champion's bundle if it was made for the same transformer; it runs at the candidate's
            schedules.

    Returns:
        The decision, and what it was measured on: prompts, seeds, samples.

    Raises:
        ValueError: gate seeds or prompts that training or evaluation used too; a champion that cannot serve
            the candidate's schedules.
    """
    splits = read_splits(workload.paths.prompts)
    chosen = splits["test"][: workload.publish.gate_prompts]
    for bundle in filter(None, (candidate, champion)):
        refuse_trained(chosen, bundle.manifest.data["training"])
    offset = fresh_offset(workload, candidate, champion)
    prompts, seeds = samples(chosen, workload.evaluate.seeds_per_prompt, offset)
    budgets = {name: budget.schedule for name, budget in candidate.manifest.budgets.items()}
    predictors = {CANDIDATE: candidate.predictor}
    if champion is not None:
        predictors[CHAMPION] = champion.predictor
    settings = dataclasses.replace(workload.evaluate, converged_fraction=0.0)
    tuning = splits["train"][:TUNING_PROMPTS]
    methods = default_methods(
        pipe,
        predictors,
        budgets,
        call=candidate.manifest.call,
        settings=settings,
        tuning_prompts=tuning,
        tuning_seeds=[workload.record.seed_offset + index for index in range(len(tuning))],
    )
    results = evaluate_methods(
        pipe,
        methods,
        prompts,
        seeds,
        call=candidate.manifest.call,
        settings=settings,
        report=report,
        timing=False,
    )
    psnr: dict[str, dict[str, Sequence[float]]] = {}
    for row in results.rows:
        psnr.setdefault(row.method, {})[row.budget] = results.values(row.budget, row.method, "psnr").tolist()
    groups = [chosen.index(prompt) for prompt in prompts]
    decision = decide(
        psnr.get(CANDIDATE, {}),
        None if champion is None else psnr.get(CHAMPION, {}),
        {name: values for name, values in psnr.items() if name not in (CANDIDATE, CHAMPION)},
        groups=groups,
        default_budget=candidate.manifest.default_budget,
        tail_tolerance_db=workload.publish.tail_tolerance_db,
    )
    return decision, {"prompts": len(chosen), "samples": len(prompts), "first_seed": offset}


def fresh_offset(workload: Workload, candidate: Bundle, champion: Bundle | None) -> int:
    """First noise seed of this judgement: new for every pair of bundles, and repeatable for one.

    It lies far above the seeds of recording and evaluation; were it the same every time, a long line of
    candidates would be chosen for the luck they have with it.
    """
    pair = f"{candidate.digest}/{champion.digest if champion else ''}"
    block = int.from_bytes(hashlib.sha256(pair.encode()).digest()[:3], "big")
    start = workload.publish.gate_seed_offset + (1 << 32) + block * (1 << 16)
    used = max(workload.record.seed_offset, workload.evaluate.seed_offset) + (1 << 24)
    if start < used:
        raise ValueError("record.seed_offset and evaluate.seed_offset: must be below 4,000,000,000")
    return start
