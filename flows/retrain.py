"""The scheduled retraining: what changed decides what runs, then the gate decides what is published.

python -m flows.retrain [--workload NAME]       or the deployment in prefect.yaml
"""

from __future__ import annotations

import json
from typing import Any

from prefect import get_run_logger

from flows.prefect_flow import flow
from flows.registry.registry import CHAMPION, Registry
from flows.repro import dvc_repro, dvc_target
from flows.stage import experiment_name, metrics_folder, read_workload, stage_main
from lesa.locks import Locked
from lesa.params_file import load_params


@flow(name="retrain")
def retrain(workload: str | None = None) -> dict[str, Any]:
    """Bring a workload up to date: record what is new, train, judge, publish; report the gate's decision."""
    logger = get_run_logger()
    settings = read_workload(workload)
    target = dvc_target(settings.name, load_params("params.yaml").name)
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
    decision = json.loads((metrics_folder(settings) / "decision.json").read_text())
    champion = Registry(experiment_name(settings)).alias(CHAMPION)
    logger.info("gate: %s: %s", "promoted" if decision["promote"] else "kept", "; ".join(decision["reasons"]))
    return {
        "status": "done",
        "candidate": decision["candidate"],
        "promoted": decision["promote"],
        "reasons": decision["reasons"],
        "champion": champion.number if champion else None,
    }


if __name__ == "__main__":
    raise SystemExit(stage_main(retrain))
