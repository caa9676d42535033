"""Stage `base`: trains the model of a workload that has none yet.

python -m flows.base [--workload NAME]
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.runtime import stage_main
from flows.stage import final_values, metrics_folder, read_workload, stage_run
from lesa.atomic import write_json
from lesa.pipelines import pick_device
from lesa.prompts import read_splits


@flow(name="base")
def base(workload: str | None = None) -> dict[str, Any]:
    """Train the workload's own model and, where its data set has one, its scorer."""
    settings = read_workload(workload)
    if settings.base is None:
        raise ValueError(
            f"workloads.{settings.name}.base: absent, so there is no model to train; start with record"
        )
    prompts = read_splits(settings.paths.prompts)["train"]
    from lesa.reference import DATA_SETS, train_base

    with stage_run("base", settings, ("base", "seed", "device")) as run:
        metrics = train_base(
            DATA_SETS[settings.base.trainer],
            base_dir=settings.paths.base,
            scorer_dir=settings.paths.scorer,
            prompts=prompts,
            steps=settings.base.steps,
            batch_size=settings.base.batch_size,
            learning_rate=settings.base.learning_rate,
            seed=settings.base.seed,
            device=str(pick_device(settings.device)),
            report=run.report,
        )
        run.note(settings.base.steps, final_values(metrics))
    write_json(metrics_folder(settings) / "base.json", metrics)
    return metrics


if __name__ == "__main__":
    raise SystemExit(stage_main(base))
