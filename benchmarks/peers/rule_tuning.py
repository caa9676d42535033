"""Training-free rules that have settings, at their best: the setting is chosen on training prompts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lesa.params import CallParams, Report
from lesa.peers.method import Method
from lesa.peers.rules import LABELS, rule_method
from lesa.peers.tuning import Bench
from lesa.schedule import Schedule

RULE_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "hicache": [
        {"order": order, "contraction": contraction}
        for order in (1, 2)
        for contraction in (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7)
    ],
    "spectrum": [
        {"blend": blend, "ridge": ridge}
        for blend in (0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
        for ridge in (0.01, 0.1, 1.0)
    ],
    "dmd": [
        {"rank": rank, "history": history} for history in (4, 6) for rank in (1, 2, 3, 5) if rank < history
    ],
}


def tuned_rules(
    pipe: Any,
    budgets: Mapping[str, Schedule],
    *,
    call: CallParams,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    report: Report | None = None,
) -> list[Method]:
    """Training-free rules that have settings, each at its best setting on the tuning samples, for every budget.

    Args:
        pipe: the pipeline, with nothing enabled.
        budgets: the full steps of each budget.
        call: the plain run.
        prompts: training prompts, one a sample; never those that are judged.
        seeds: noise of each.
        batch_size: samples a pipeline call.
        report: called after each rule and budget.

    Returns:
        rows named `..._tuned`, whose settings say what the tuning saw.
    """
    with torch.no_grad():
        bench = Bench.of(pipe, prompts, seeds, call, batch_size)
        chosen: list[Method] = []
        for budget, schedule in budgets.items():
            for rule, every in RULE_OPTIONS.items():
                trials = [(bench.trial(rule_method(rule, budget, schedule, options=o)), o) for o in every]
                best, options = max(trials, key=lambda trial: trial[0].psnr)
                chosen.append(
                    rule_method(
                        rule,
                        budget,
                        schedule,
                        name=f"{rule}_tuned",
                        label=f"{LABELS[rule].split(',')[0]}, tuned",
                        options=options,
                        notes={"tuning_psnr": round(best.psnr, 3), "tuning_runs": len(every)},
                    )
                )
                if report is not None:
                    report(len(chosen), {f"{rule}_tuned_psnr": best.psnr})
    return chosen
