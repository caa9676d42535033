"""What the gate's questions are asked of: candidate, champion and every peer, on the same fresh samples.

The candidate and the champion each run at their own full steps, with the experts that `lesa.enable` would choose:
a budget of the candidate against the champion's budget of as many full steps. A budget that the champion has not is
compared with the peers alone. Threshold caches get our number of operations, so that a judgement made again on a busy
machine is the same one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.bundle import Bundle, load_bundle
from lesa.errors import LesaError
from lesa.evaluation.compare import Runner, one_by_one, refuse_trained
from lesa.evaluation.measure import Part, measure_part, share_out
from lesa.models.pipelines import load_pipeline
from lesa.params import Report, Workload
from lesa.peers.caches import tuned_caches
from lesa.peers.lineup import peer_methods
from lesa.peers.method import Method, lesa_method
from lesa.peers.tuning import TUNING_SAMPLES
from lesa.publishing.gate import CANDIDATE, CHAMPION, Decision, Measured, judge, look_sizes
from lesa.recording.prompts import PromptError, prompt_digests, read_splits

_SEED_BLOCK = 1 << 16  # noise seeds of one judgement: the most samples it may take


@dataclass(frozen=True, kw_only=True)
class NamedBundle:
    """A bundle on disk: what was judged is what is promoted."""

    folder: Path
    digest: str  # SHA-256 of its manifest

    @classmethod
    def of(cls, bundle: Bundle) -> NamedBundle:
        return cls(folder=bundle.path.resolve(), digest=bundle.digest)

    def load(self) -> Bundle:
        return load_bundle(self.folder, expected_digest=self.digest)


@dataclass(frozen=True, kw_only=True)
class GateSamples:
    """The samples of a judgement, in the order in which looks take them."""

    prompts: tuple[str, ...]  # one a sample
    seeds: tuple[int, ...]
    groups: tuple[int, ...]  # which prompt
    looks: tuple[int, ...]  # numbers of samples
    excluded: int = 0  # test prompts that the champion was trained on


@dataclass(frozen=True, kw_only=True)
class TuneCachesJob:
    """Settings of threshold caches for the candidate's budgets."""

    candidate: NamedBundle
    prompts: Sequence[str]  # training prompts, one a sample
    seeds: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class GateJob:
    """Some batches of one look's samples."""

    wanted: Mapping[str, Sequence[str]]  # budget of the candidate -> opponents
    candidate: NamedBundle
    champion: NamedBundle | None
    paired: Mapping[str, str]  # budget of the candidate -> the champion's of as many full steps
    caches: Sequence[Method]
    prompts: Sequence[str]  # of the look, one a sample
    seeds: Sequence[int]
    part: Part


def judge_candidate(
    workload: Workload,
    candidate: Bundle,
    champion: Bundle | None,
    run: Runner = one_by_one,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Decision, dict[str, Any]]:
    """Measures and decides; each look's samples are shared out to `resources.publish.workers` jobs.

    Args:
        candidate: the bundle as it lies on disk, not what its makers say of it.
        champion: the champion's bundle if it was made for the same transformer and call (`same_call`).
        run: runs jobs.
        log: told what is still open.

    Returns:
        The decision, and what it was measured on: prompts, seeds, samples, budgets paired.

    Raises:
        PromptError: test prompts that the candidate was trained on, or too few that the champion was not.
        BundleError: a bundle is not what it was when it was registered.
    """
    drawn = gate_samples(workload, candidate, champion)
    paired = paired_budgets(candidate, champion)
    tuning = read_splits(workload.paths.prompts)["train"][:TUNING_SAMPLES]
    seeds = [workload.record.seed_offset + index for index in range(len(tuning))]
    job = TuneCachesJob(candidate=NamedBundle.of(candidate), prompts=tuning, seeds=seeds)
    caches: list[Method] = run(tune_gate_caches, workload, {"caches": job})["caches"]
    opponents: dict[str, list[str]] = {
        name: [CHAMPION] if name in paired else [] for name in candidate.manifest.budgets
    }
    for peer in _peers(candidate, caches):
        opponents[peer.budget].append(peer.name)

    def measure(wanted: Mapping[str, Sequence[str]], first: int, end: int) -> Measured:
        settings, workers = workload.evaluate, workload.resources.publish.workers
        jobs = {
            f"samples {first}-{end} {index}": GateJob(
                wanted=wanted,
                candidate=NamedBundle.of(candidate),
                champion=None if champion is None else NamedBundle.of(champion),
                paired=paired,
                caches=caches,
                prompts=drawn.prompts[first:end],
                seeds=drawn.seeds[first:end],
                part=part,
            )
            for index, part in enumerate(share_out(end - first, settings, workers, timing=False))
        }
        return _joined(list(run(measure_for_gate, workload, jobs).values()))

    decision = judge(
        opponents,
        measure,
        default_budget=candidate.manifest.default_budget,
        groups=drawn.groups,
        looks=drawn.looks,
        tolerance_db=workload.publish.tail_tolerance_db,
        log=log,
    )
    return decision, {
        "prompts": len(set(drawn.prompts[: decision.samples])),
        "samples": decision.samples,
        "most_samples": drawn.looks[-1],
        "first_seed": drawn.seeds[0],
        "excluded_prompts": drawn.excluded,
        "paired_budgets": paired,
    }


def same_call(candidate: Bundle, champion: Bundle) -> bool:
    """Whether a run of one can be compared with a run of the other, sample by sample."""
    ours, theirs = candidate.manifest, champion.manifest
    return ours.call == theirs.call and ours.sigmas == theirs.sigmas


def paired_budgets(candidate: Bundle, champion: Bundle | None) -> dict[str, str]:
    """Budgets of the candidate with the champion's of as many full steps: of its name, else the first there is."""
    paired: dict[str, str] = {}
    for name, budget in candidate.manifest.budgets.items() if champion is not None else ():
        assert champion is not None
        alike = [
            other
            for other, theirs in champion.manifest.budgets.items()
            if theirs.schedule.num_full == budget.schedule.num_full
        ]
        if alike:
            paired[name] = name if name in alike else alike[0]
    return paired


def gate_samples(workload: Workload, candidate: Bundle, champion: Bundle | None) -> GateSamples:
    """Test prompts and fresh noise: at first `publish.gate_prompts` prompts, then the others, then further noise.

    Samples of one prompt resemble each other: new prompts tell more than new noise.
    """
    test = read_splits(workload.paths.prompts)["test"]
    refuse_trained(test, candidate.manifest.data["training"])
    trained = set(champion.manifest.data["training"].get("prompt_digests", ())) if champion is not None else set()
    chosen = [prompt for prompt in test if prompt_digests([prompt])[0] not in trained]
    if len(chosen) < 2:
        raise PromptError(
            f"the champion was trained on {len(test) - len(chosen)} of {len(test)} test prompts: two at least must be "
            f"new to it; add prompts to {workload.paths.prompts}/test.txt"
        )
    each, settings = workload.evaluate.seeds_per_prompt, workload.publish
    first = min(settings.gate_prompts, len(chosen)) * each
    looks = look_sizes(first, max(first, settings.gate_max_samples))
    places = [index // each % len(chosen) for index in range(looks[-1])]
    offset = fresh_offset(workload, candidate, champion)
    return GateSamples(
        prompts=tuple(chosen[place] for place in places),
        seeds=tuple(range(offset, offset + looks[-1])),
        groups=tuple(places),
        looks=looks,
        excluded=len(test) - len(chosen),
    )


def fresh_offset(workload: Workload, candidate: Bundle, champion: Bundle | None) -> int:
    """First noise seed of this judgement: new for every pair of bundles, and repeatable for one.

    It lies far above the seeds of recording and evaluation; were it the same every time, a long line of
    candidates would be chosen for the luck they have with it.
    """
    pair = f"{candidate.digest}/{champion.digest if champion else ''}"
    block = int.from_bytes(hashlib.sha256(pair.encode()).digest()[:3], "big")
    start = workload.publish.gate_seed_offset + (1 << 32) + block * _SEED_BLOCK
    used = max(workload.record.seed_offset, workload.evaluate.seed_offset) + (1 << 24)
    if start < used:
        raise LesaError("record.seed_offset and evaluate.seed_offset: must be below 4,000,000,000")
    return start


def tune_gate_caches(workload: Workload, job: TuneCachesJob, report: Report) -> list[Method]:
    """Threshold caches at our number of operations, on training prompts with training noise."""
    candidate = job.candidate.load()
    ours = {
        name: lesa_method(name, candidate.predictor, budget.schedule)
        for name, budget in candidate.manifest.budgets.items()
    }
    return tuned_caches(
        load_pipeline(workload.model, workload.resources.device),
        ours,
        call=candidate.manifest.call,
        prompts=job.prompts,
        seeds=job.seeds,
        batch_size=workload.evaluate.batch_size,
        cost="operations",
        report=report,
    )


def measure_for_gate(workload: Workload, job: GateJob, report: Report) -> Measured:
    """PSNR in dB to the plain run of the job's samples, by budget and method; the candidate's at every budget."""
    candidate = job.candidate.load()
    peers = [m for m in _peers(candidate, job.caches) if m.name in job.wanted.get(m.budget, ())]
    methods = [*_predictors(candidate, None if job.champion is None else job.champion.load(), job), *peers]
    measured = measure_part(
        load_pipeline(workload.model, workload.resources.device),
        methods,
        job.prompts,
        job.seeds,
        job.part,
        call=candidate.manifest.call,
        settings=dataclasses.replace(workload.evaluate, converged_fraction=0.0),
        report=report,
    )
    psnr: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        batches = measured.by_method[method.budget, method.name].psnr
        psnr.setdefault(method.budget, {})[method.name] = [value for batch in batches for value in batch.tolist()]
    return psnr


def _predictors(candidate: Bundle, champion: Bundle | None, job: GateJob) -> list[Method]:
    """The candidate at the budgets wanted, and the champion, where it is, at its own full steps for each."""
    methods = []
    for name, opponents in job.wanted.items():
        schedule = candidate.manifest.budgets[name].schedule
        methods.append(lesa_method(name, candidate.predictor, schedule, name=CANDIDATE))
        if CHAMPION in opponents:
            assert champion is not None
            own = champion.manifest.budgets[job.paired[name]].schedule
            methods.append(lesa_method(name, champion.predictor, own, name=CHAMPION, label="champion"))
    return methods


def _peers(candidate: Bundle, caches: Sequence[Method]) -> list[Method]:
    return [*peer_methods({name: b.schedule for name, b in candidate.manifest.budgets.items()}), *caches]


def _joined(parts: Sequence[Measured]) -> Measured:
    """The parts' samples one after the other."""
    psnr: dict[str, dict[str, list[float]]] = {}
    for part in parts:
        for budget, methods in part.items():
            for name, values in methods.items():
                psnr.setdefault(budget, {}).setdefault(name, []).extend(values)
    return psnr
