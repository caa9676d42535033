"""Stage `base`: trains the model of a workload that has none yet.

python -m flows.base [--workload NAME]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.prefect_flow import flow
from flows.stage import final_values, metrics_folder, read_workload, stage_main, stage_run
from lesa.atomic import write_json
from lesa.errors import LesaError
from lesa.models.pipelines import pick_device
from lesa.recording.prompts import BASE_SPLIT, PromptError, read_splits


@flow(name="base")
def base(workload: str | None = None) -> dict[str, Any]:
    """Train the workload's own model and, where its data set has one, its scorer; or distil it from its teacher."""
    settings = read_workload(workload)
    if settings.base is None:
        raise LesaError(f"workloads.{settings.name}.base: absent, so there is no model to train; start with record")
    if settings.base.teacher is not None and settings.scorer is None:
        raise LesaError(
            f"workloads.{settings.name}.scorer: absent; a model that learns from another is judged by that one's scorer"
        )
    splits = read_splits(settings.paths.prompts)
    if BASE_SPLIT not in splits:
        path = settings.paths.prompts / f"{BASE_SPLIT}.txt"
        raise PromptError(
            f"prompts: {path} does not exist; a model that is trained here needs prompts of its own, "
            "which no predictor is trained on"
        )
    from lesa.base_models.data_sets import DATA_SETS
    from lesa.base_models.distillation import distil
    from lesa.base_models.students import STUDENTS
    from lesa.base_models.train import train_base

    given = settings.base
    with stage_run("base", settings, ("base", "seed")) as run:
        training: dict[str, Any] = {
            "base_dir": settings.paths.base,
            "prompts": splits[BASE_SPLIT],
            "steps": given.steps,
            "batch_size": given.batch_size,
            "learning_rate": given.learning_rate,
            "seed": given.seed,
            "device": str(pick_device(settings.resources.device)),
            "report": run.report,
        }
        if given.trainer in STUDENTS:
            assert given.teacher is not None, "parameters are checked when they are read"
            metrics = distil(
                STUDENTS[given.trainer],
                teacher_dir=Path(given.teacher),
                scorer_dir=Path(settings.scorer or ""),
                **training,
            )
        else:
            metrics = train_base(DATA_SETS[given.trainer], scorer_dir=settings.paths.scorer, **training)
        run.note(settings.base.steps, final_values(metrics))
    write_json(metrics_folder(settings) / "base.json", metrics)
    return metrics


if __name__ == "__main__":
    raise SystemExit(stage_main(base))
