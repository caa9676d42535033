"""The scheduled retraining: what changed decides what runs, then the gate decides what is published.

python -m flows.retrain [--workload NAME]       or the deployment in prefect.yaml
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows.environment import state_folder
from flows.prefect_flow import flow
from flows.registry.registry import CHAMPION, Registry
from flows.repro import dvc_repro, dvc_target
from flows.stage import experiment_name, metrics_folder, read_workload, stage_main
from flows.tracking.client import named_failures
from lesa.atomic import write_json
from lesa.locks import Locked
from lesa.params_file import load_params


@flow(name="retrain")
def retrain(workload: str | None = None) -> dict[str, Any]:
    """Bring a workload up to date: record what is new, train, judge, publish; report the gate's decision."""
    logger = get_run_logger()
    settings = read_workload(workload)
    target = dvc_target(settings.name, load_params("params.yaml").name)
    noted, began = state_folder() / f"retrained-{settings.name}.json", time.time()
    if is_superseded(noted, flow_run.scheduled_start_time.timestamp()):
        # Several that came late, behind a server or a worker that was down, are one.
        reason = "a retraining that began after this one was due has done its work"
        logger.info("skipped: %s", reason)
        return {"status": "skipped", "reason": reason}
    try:
        code = dvc_repro(target, show=logger.info)
    except Locked as error:
        # Whoever is at work brings things up to date; doing it twice at once would only mix two runs.
        logger.warning("skipped: %s", error)
        return {"status": "skipped", "reason": str(error)}
    if code != 0:
        raise RuntimeError(
            f"dvc repro {target} failed with exit code {code}; its last lines are in this run's log"
        )
    write_json(noted, {"began": began})
    decision = json.loads((metrics_folder(settings) / "decision.json").read_text())
    with named_failures():
        champion = Registry(experiment_name(settings)).alias(CHAMPION)
    logger.info("gate: %s: %s", "promoted" if decision["promote"] else "kept", "; ".join(decision["reasons"]))
    return {
        "status": "done",
        "candidate": decision["candidate"],
        "promoted": decision["promote"],
        "reasons": decision["reasons"],
        "champion": champion.number if champion else None,
    }


def is_superseded(noted: Path, due: float) -> bool:
    """Whether the last retraining that got to its end began after `due` (seconds of the epoch)."""
    try:
        return float(json.loads(noted.read_text())["began"]) > due
    except (OSError, ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    raise SystemExit(stage_main(retrain))
