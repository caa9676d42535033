"""Peers that are trained or tuned here: L2P, LinCa, TeaCache, and rules at their best settings.

Trained on the recorded training trajectories, tuned on training prompts; neither sees what is judged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.peers.l2p import gram_matrix, l2p_methods
from benchmarks.peers.linca import linca_method, train_linca
from benchmarks.peers.teacache import tuned_teacache
from lesa.params import Workload
from lesa.peers.method import Method
from lesa.peers.tuning import Bench
from lesa.recording.dataset import recorded_splits
from lesa.recording.prompts import PromptError, refuse_overlap
from lesa.schedule import Schedule

L2P_HISTORY = (2, 3, 4)  # sizes of which the best on the tuning prompts is taken

Report = Callable[[int, dict[str, float]], None]


def learned_peers(
    workload: Workload,
    pipe: Any,
    budgets: Mapping[str, Schedule],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    judged: Sequence[str],
    with_linca: bool = True,
    linca_iterations: int = 300,
    report: Report | None = None,
) -> list[Method]:
    """Every learned peer at every budget.

    Args:
        workload: whose recorded training trajectories they are trained on.
        pipe: its pipeline, with nothing enabled.
        budgets: full steps of each budget.
        prompts: training prompts that settings are chosen on.
        seeds: their noise.
        judged: prompts of the evaluation.
        with_linca: whether to train it, which takes longest.
        linca_iterations: of each of its stages.
        report: progress.

    Raises:
        PromptError: prompts that are judged and trained or tuned on.
        ValueError: no recorded trajectories.
    """
    train, _ = recorded_splits(workload.recording)
    refuse_overlap({"judged": judged, "trained on": train.prompts}, where="the learned peers")
    refuse_overlap({"judged": judged, "tuned on": prompts}, where="the learned peers")
    bench = Bench.of(pipe, prompts, seeds, workload.call, workload.evaluate.batch_size)
    gram = gram_matrix(train)
    methods: list[Method] = []
    for budget, schedule in budgets.items():
        published, *candidates = l2p_methods(budget, schedule, gram, L2P_HISTORY)
        trials = [bench.trial(candidate) for candidate in candidates]
        best = max(trials, key=lambda trial: trial.psnr)
        methods += [published, best.method]
        if report is not None:
            report(len(methods), {"l2p_full_steps_psnr": best.psnr})
        if with_linca and schedule.predicted_steps:
            rule = train_linca(train, schedule, iterations=linca_iterations, report=report)
            methods.append(linca_method(budget, schedule, rule))
    try:
        methods += tuned_teacache(bench, budgets)
    except PromptError:
        raise
    except ValueError as error:
        print(f"left out: {error}", file=sys.stderr)
    return methods
