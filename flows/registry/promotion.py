"""What the gate measures for a promotion: candidate, champion and every peer on the same fresh samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.ray_jobs import run_jobs
from flows.registry.registry import Version
from flows.tracking.run import Reporter
from lesa.bundle import Bundle, load_bundle
from lesa.evaluation.compare import refuse_trained
from lesa.evaluation.measure import samples
from lesa.params import Workload
from lesa.peers.tuning import TUNING_SAMPLES
from lesa.publishing.gate import Decision, decide
from lesa.publishing.jobs import GateJob, NamedBundle, fresh_offset, measure_budgets, shared_out
from lesa.pull import pull
from lesa.recording.prompts import read_splits

CANDIDATE, CHAMPION = "lesa", "champion"  # names of the two among the methods; all others are peers


def measure_and_decide(
    workload: Workload, candidate: Bundle, champion: Bundle | None
) -> tuple[Decision, dict[str, Any]]:
    """Samples with every method, compares, decides; the budgets are shared out to as many jobs as there are workers.

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
    bundles = {CANDIDATE: candidate} | ({} if champion is None else {CHAMPION: champion})
    for bundle in bundles.values():
        refuse_trained(chosen, bundle.manifest.data["training"])
    offset = fresh_offset(workload, candidate, champion)
    prompts, seeds = samples(chosen, workload.evaluate.seeds_per_prompt, offset)
    tuning_prompts, tuning_seeds = samples(splits["train"][:TUNING_SAMPLES], 1, workload.record.seed_offset)
    full_steps = {name: float(budget.schedule.num_full) for name, budget in candidate.manifest.budgets.items()}
    jobs = {
        " ".join(part): GateJob(
            budgets=part,
            bundles=tuple(NamedBundle(name=n, folder=b.path.resolve(), digest=b.digest) for n, b in bundles.items()),
            prompts=prompts,
            seeds=seeds,
            tuning_prompts=tuning_prompts,
            tuning_seeds=tuning_seeds,
        )
        for part in shared_out(full_steps, workload.resources.publish.workers)
    }
    measured = run_jobs(
        measure_budgets,
        workload,
        jobs,
        share=workload.resources.publish,
        reporter=Reporter(path=Path(os.devnull), name=f"publish {workload.name}"),
    )
    by_budget = {budget: methods for part in measured.values() for budget, methods in part.items()}
    psnr: dict[str, dict[str, Sequence[float]]] = {}
    for budget in candidate.manifest.budgets:
        for method, decibels in by_budget[budget].items():
            psnr.setdefault(method, {})[budget] = decibels
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


class Judgement:
    """Judges a candidate against whatever champion it meets; remembers the last decision."""

    def __init__(self, workload: Workload, candidate: Bundle, registry: str, log: Any) -> None:
        self.workload, self.candidate = workload, candidate
        self.registry, self.log = registry, log
        self.decision = Decision(
            promote=False, reasons=("nothing to judge: it is the champion already",), numbers={}
        )
        self.measured_on: dict[str, Any] = {}

    def __call__(self, champion: Version | None) -> bool:
        try:
            bundle = self._champion_bundle(champion)
            self.decision, self.measured_on = measure_and_decide(
                self.workload, self.candidate, bundle
            )
        except ValueError as error:
            # A champion that is broken or cannot be compared is no reason to replace it unseen.
            self.decision = Decision(promote=False, reasons=(f"not measured: {error}",), numbers={})
        return self.decision.promote

    def _champion_bundle(self, champion: Version | None) -> Bundle | None:
        if champion is None:
            return None
        if champion.fingerprint != self.candidate.manifest.fingerprint:
            self.log.info("champion %s was made for another transformer: the peers decide", champion.number)
            return None
        if champion.is_of_an_older_schema:
            self.log.info("champion %s is of a format not read any more: the peers decide", champion.number)
            return None
        folder = pull(f"models:/{champion.name}/{champion.number}", tracking_uri=self.registry)
        return load_bundle(folder, expected_digest=champion.digest)

    def outcome(self, candidate: Version, before: Version | None, moved: bool) -> dict[str, Any]:
        """What is recorded: decision.json and the files of the registered version's run."""
        after = candidate if moved else before
        return {
            **self.decision.to_dict(),
            "promote": moved and (before is None or before.number != candidate.number),
            "candidate": candidate.number,
            "manifest_sha256": candidate.digest,
            "champion_before": before.number if before else None,
            "champion": after.number if after else None,
            "measured_on": self.measured_on,
        }
