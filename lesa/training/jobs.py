"""The two training steps cut into jobs that load what they need and can run anywhere, here or on a cluster.

Ray pickles the functions of this module by name: a job's work stays importable from here. This is also where a workload
is taken apart: the rest of the package takes the sections it reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors

from lesa import atomic
from lesa.errors import LesaError
from lesa.models.output_head import load_output_head
from lesa.models.pipelines import load_pipeline, pick_device, pipeline_folder
from lesa.params import Report, Workload
from lesa.predictor.predictor import Predictor
from lesa.predictor.spec import MIXED, PredictorSpec
from lesa.recording.dataset import kept_elsewhere, kept_splits, recorded_splits
from lesa.strict_json import StrictJsonError, parse
from lesa.training.design import ExpertDesign
from lesa.training.experts import Job, Trained, assemble, ground_truth_jobs
from lesa.training.ground_truth import train_expert

_MAX_RECORD = 16 << 20  # bytes of predictor.json, most of them figures


def expert_design(workload: Workload) -> ExpertDesign:
    """What the workload's experts depend on before they are trained."""
    return ExpertDesign(
        predictor=workload.predictor,
        schedule=workload.schedule,
        call=workload.call,
        model=workload.model,
        step_counts=workload.record.step_counts,
        seed=workload.seed,
    )


def closed_loop_budgets(workload: Workload) -> list[str]:
    """The jobs of the second training step: the experts for other numbers of steps, which take longest, and every
    budget."""
    return [*((MIXED,) if workload.record.step_counts else ()), *workload.schedule.budgets]


def list_ground_truth_jobs(workload: Workload) -> list[Job]:
    """The jobs of the first training step; impossible histories are refused here, before anything is trained."""
    return ground_truth_jobs(expert_design(workload), recorded_splits(workload.recording)[1].sigmas)


def run_ground_truth_job(workload: Workload, job: Job, report: Report) -> Trained:
    """Train one expert; resumes from checkpoints under `work_dir(workload)`."""
    train, validation = kept_splits(workload.recording)
    head = load_output_head(transformer_folder(workload))
    return train_expert(
        expert_design(workload),
        workload.ground_truth,
        job,
        train,
        validation,
        head,
        device=pick_device(workload.resources.device),
        others=kept_elsewhere(workload.recording) if job.budget == MIXED else None,
        work_dir=work_dir(workload) / "ground_truth",
        report=report,
    )


def run_closed_loop_job(workload: Workload, budget: str, report: Report) -> Trained:
    """Train the experts of one of `closed_loop_budgets`, from the predictor of the first step; resumes likewise."""
    # The hooks of diffusers take seconds to import, and the first step needs none.
    from lesa.training.closed_loop import train_budget

    train, validation = kept_splits(workload.recording)
    return train_budget(
        expert_design(workload),
        workload.closed_loop,
        budget,
        load_predictor(workload.paths.ground_truth),
        load_pipeline(workload.model, workload.resources.device),
        train,
        validation,
        feature_loss=workload.ground_truth.loss,
        others=kept_elsewhere(workload.recording) if budget == MIXED else None,
        work_dir=work_dir(workload) / "closed_loop",
        report=report,
    )


def finish(workload: Workload, step: str, trained: Mapping[str, Trained]) -> Predictor:
    """Join what all jobs returned, save it as the step's result and drop the step's checkpoints.

    Args:
        step: `ground_truth` or `closed_loop`.
        trained: by the jobs' names.
    """
    some = next(iter(next(iter(trained.values())).experts.values()))
    predictor = assemble(expert_design(workload), some["projection.bias"].shape[0], trained.values())
    figures = {name: part.figures for name, part in trained.items()}
    save_predictor(getattr(workload.paths, step), predictor, figures)
    shutil.rmtree(work_dir(workload) / step, ignore_errors=True)
    return predictor


def work_dir(workload: Workload) -> Path:
    """Where checkpoints of unfinished training lie; not an output of any stage."""
    return Path("data/checkpoints") / workload.name / "work"


def save_predictor(folder: Path, predictor: Predictor, figures: Mapping[str, Any]) -> None:
    """Write `predictor.json` and `weights.safetensors` as one act."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = serialise_tensors({name: tensor.contiguous() for name, tensor in predictor.tensors.items()})
    record = {"spec": predictor.spec.to_dict(), "sha256": atomic.sha256_bytes(weights), "figures": dict(figures)}
    with atomic.new_dir(folder, replace=True) as partial:
        atomic.write_bytes(partial / "weights.safetensors", weights)
        atomic.write_json(partial / "predictor.json", record)


def load_predictor(folder: Path) -> Predictor:
    """The predictor that a training step saved; `ValueError` where it is missing, torn or altered."""
    record, weights = _read_saved(folder, "predictor.json"), _read_saved(folder, "weights.safetensors")
    described = _described(folder, record)
    if described["sha256"] != atomic.sha256_bytes(weights):
        raise LesaError(f"{folder}: weights.safetensors is not what predictor.json describes; train again")
    return Predictor(PredictorSpec.from_dict(described["spec"]), parse_tensors(weights))


def load_figures(folder: Path) -> dict[str, Any]:
    """What the training step noted of itself: validation losses before and after, a job each.

    Raises:
        LesaError: as `load_predictor`.
    """
    figures: dict[str, Any] = _described(folder, _read_saved(folder, "predictor.json"))["figures"]
    return figures


def _read_saved(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise LesaError(f"{error.filename} does not exist; run the training stages first") from None


def _described(folder: Path, record: bytes) -> dict[str, Any]:
    """What `predictor.json` says: the spec as a mapping, the weights' SHA-256 and the figures."""
    try:
        described = parse(record, max_bytes=_MAX_RECORD)
    except StrictJsonError as error:
        raise LesaError(f"{folder}: predictor.json is torn ({error}); train again") from None
    if set(described) != {"spec", "sha256", "figures"} or not isinstance(described["spec"], dict):
        raise LesaError(f"{folder}: predictor.json must have spec, sha256 and figures; train again")
    return described


def transformer_folder(workload: Workload) -> Path:
    """Where the transformer alone lies, for what needs only its output head."""
    return pipeline_folder(workload.model) / "transformer"
