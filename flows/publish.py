"""Stage `publish`: makes the bundle, registers it, lets the gate decide, moves the alias if it says so.

python -m flows.publish [--workload NAME]
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from flows.environment import ROOT, state_folder
from flows.prefect_flow import flow, task
from flows.ray_jobs import kept_workers, run_jobs
from flows.registry.promotion import Judgement
from flows.registry.registry import CANDIDATE, Registry, RolledBack, Version
from flows.registry.tags import budget_quality, evaluation_facts, read_metrics, registry_tags
from flows.stage import experiment_name, metrics_folder, read_workload, stage_main
from flows.tracking.client import named_failures, tracking_uri
from flows.tracking.revisions import revisions
from flows.tracking.run import Reporter
from lesa.atomic import make_dirs, new_dir, sweep_partials, write_json
from lesa.bundle import Bundle
from lesa.errors import LesaError, redacted
from lesa.locks import file_lock
from lesa.models.bill import counted
from lesa.models.pipelines import load_pipeline, release_memory
from lesa.params import Workload
from lesa.publishing.bounds import measure_bounds, shared_out
from lesa.publishing.build import make_bundle
from lesa.publishing.gate import Decision
from lesa.pull import pull
from lesa.recording.dataset import recorded_elsewhere, recorded_splits
from lesa.training.jobs import load_predictor


@flow(name="publish")
def publish(workload: str | None = None) -> dict[str, Any]:
    """Register the new bundle; promote it if the gate finds it better. A refusal is a recorded decision."""
    return judge_and_register(read_workload(workload, searched=True))


@task(name="judge and register")
def judge_and_register(workload: Workload) -> dict[str, Any]:
    """A task so that Prefect shows it; the work is `publish_bundle`."""
    with kept_workers(workload.resources.publish):
        return publish_bundle(workload, get_run_logger())


def publish_bundle(workload: Workload, log: Any, root: Path = ROOT) -> dict[str, Any]:
    """Everything that can be refused is refused before the registry is touched.

    Args:
        workload: its closed-loop predictor and evaluation are there.
        log: a logger.
        root: repository whose registry is used where MLFLOW_TRACKING_URI names none.

    Raises:
        LesaError: something to publish is missing, the registry does not answer, or the champion cannot be had:
            what was registered stays, and the next run goes on from there.
        Locked: another publisher of this workload is at work in this repository.
    """
    with file_lock(state_folder(root) / f"{experiment_name(workload)}.publish.lock"), named_failures(root):
        if tracking_uri(root).startswith(("http:", "https:")):  # before hours of work; a database would be made here
            Registry(experiment_name(workload), root).history.entries()
        make_dirs(workload.paths.bundle.parent)
        sweep_partials(workload.paths.bundle.parent)  # of publishers that died while they wrote a bundle
        with counted() as bill:
            bundle = build_bundle(workload, log, root)
            release_memory()  # gigabytes of a real model; the gate's jobs load what they need
            outcome, obstacle = register_and_judge(workload, bundle, log, root)
        outcome["bill"] = bill.to_dict()
        write_json(metrics_folder(workload) / "decision.json", outcome)
    reasons = "; ".join(outcome["reasons"])
    log.info("gate: version %s %s: %s", outcome["candidate"], registry_word(outcome), reasons)
    if obstacle:
        raise LesaError(
            f"version {outcome['candidate']} is registered and could not be compared with champion "
            f"{outcome['champion']}: {obstacle}; restore the champion's files, or make another version champion "
            "(python -m flows.champion --help), then publish again"
        )
    return {key: outcome[key] for key in ("candidate", "champion", "champion_before", "promote", "reasons")}


def build_bundle(workload: Workload, log: Any, root: Path) -> Bundle:
    """The bundle of the second training step's predictor, with its error bounds and what was measured of it."""
    predictor = load_predictor(workload.paths.closed_loop)
    quality = budget_quality(workload, read_metrics(workload))
    log.info("error bounds: accelerated runs of validation and training prompts")
    error_bounds = measured_bounds(workload)  # before a pipeline is loaded here: two at once may be too many
    pipe = load_pipeline(workload.model, workload.resources.device)
    train, validation = recorded_splits(workload.recording)
    return make_bundle(
        workload.paths.bundle,
        workload,
        pipe,
        predictor,
        train,
        validation,
        quality=quality,
        error_bounds=error_bounds,
        evaluation=evaluation_facts(workload),
        created_from=revisions(root, workload.name),
        others=recorded_elsewhere(workload.recording),
    )


def register_and_judge(workload: Workload, bundle: Bundle, log: Any, root: Path) -> tuple[dict[str, Any], str]:
    """Registers the bundle as candidate and promotes it if the gate says so.

    Returns:
        what was decided, as it is recorded, and what kept the gate from measuring, if anything.
    """
    tracking = tracking_uri(root)
    log.info("registry: %s", redacted(tracking))
    registry = Registry(experiment_name(workload), root)
    candidate = registry.register(
        bundle.path, tags=registry_tags(bundle.manifest.data), run_tags={"stage": "publish"}
    )
    judgement = Judgement(workload, bundle, candidate, registry, tracking, log)
    registry.set_alias(CANDIDATE, candidate)
    try:
        made, before = registry.promote(candidate, judgement)
    except RolledBack as error:  # a person's decision, which stands
        made, before = None, registry.champion(registry.history.entries())
        judgement.decision = Decision(promote=False, reasons=(str(error),))
    finally:
        registry.drop_alias(CANDIDATE, candidate)
    outcome = judgement.outcome(made, before)
    if made is not None and made.number != candidate.number:
        place_published(made, workload.paths.bundle, tracking)
    gate = {"gate": "promoted" if made is not None else "kept out", "gate.reasons": "; ".join(outcome["reasons"])}
    for version in {candidate.number: candidate, **({made.number: made} if made is not None else {})}.values():
        registry.tag(version, gate)
        registry.attach(version, outcome)
    return outcome, judgement.obstacle


def place_published(version: Version, folder: Path, tracking: str) -> None:
    """Puts the version that was published, which has fewer budgets than what was built, in the place of that."""
    pulled = pull(f"models:/{version.name}/{version.number}", tracking_uri=tracking)
    with new_dir(folder, replace=True) as partial:
        shutil.copytree(pulled, partial, dirs_exist_ok=True)


def measured_bounds(workload: Workload) -> dict[str, list[float | None]]:
    """Error bounds of every budget, which are shared out to as many jobs as there are workers."""
    share = workload.resources.publish
    full_steps = {name: float(schedule.num_full) for name, schedule in workload.budgets().items()}
    parts = run_jobs(
        measure_bounds,
        workload,
        {" ".join(part): part for part in shared_out(full_steps, share.workers)},
        share=share,
        reporter=Reporter(path=Path(os.devnull), name=f"error bounds {workload.name}"),
    )
    return {name: bounds for part in parts.values() for name, bounds in part.items()}


def registry_word(outcome: dict[str, Any]) -> str:
    """The decision in a word, for people."""
    if outcome["promote"]:
        return "is the new champion"
    return "stays champion" if outcome["champion"] == outcome["candidate"] else "is kept out"


if __name__ == "__main__":
    raise SystemExit(stage_main(publish))
