"""The paper's five kinds of model as tiny pipelines, each with a workload that records and trains in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.bundle import Bundle
from lesa.models.pipelines import load_pipeline
from lesa.params import (
    BudgetParams,
    CallParams,
    ClosedLoopParams,
    GroundTruthParams,
    ModelParams,
    PredictorParams,
    RecordParams,
    ResourcesParams,
    ScheduleParams,
    Workload,
)
from lesa.publishing.bounds import bounds_by_budget
from lesa.publishing.build import make_bundle
from lesa.recording.dataset import Trajectories, recorded_splits
from lesa.training.jobs import finish, list_ground_truth_jobs, run_closed_loop_job, run_ground_truth_job
from tests.helpers import tiny, tiny_hunyuan, tiny_qwen
from tests.helpers.recording import record

SPLITS = {"train": list(tiny.PROMPTS[:3]), "validation": ["a dog on the left"], "test": ["the white dog"]}
FEW = PredictorParams(boundaries=(), history_sizes=(2,), gate="table", projection="per_channel")  # of few steps
MANY = PredictorParams(boundaries=(0.6,), history_sizes=(2, 2), gate="table", projection="low_rank", rank=2)


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """One published model's shape: what its pipeline is called with, and which of its steps are full."""

    build: Callable[[Path], Any]  # a pipeline that is written to a folder and loaded from it
    family: str
    call: dict[str, Any]
    full_steps: tuple[int, ...]
    predictor: PredictorParams = MANY
    branches: tuple[str, ...] = ("denoise",)
    gradient: str = "through_sampler"  # of the closed loop


_FLUX = {key: value for key, value in tiny.CALL.items() if key != "guidance_scale"}
KINDS: dict[str, ModelKind] = {
    "flux-dev": ModelKind(
        build=lambda folder: tiny.tiny_flux(folder, num_layers=1, num_single_layers=1),
        family="flux",
        call=tiny.CALL | {"num_inference_steps": 8},
        full_steps=(0, 1, 2, 5),
    ),
    "flux-schnell": ModelKind(
        build=lambda folder: tiny.tiny_flux(
            folder, num_layers=1, num_single_layers=1, guidance_embeds=False, dynamic_shifting=False
        ),
        family="flux",
        call=_FLUX | {"num_inference_steps": 4},
        full_steps=(0, 1),
        predictor=FEW,
        gradient="drifted_states",
    ),
    "qwen-image": ModelKind(
        build=tiny_qwen.tiny_qwen,
        family="qwen-image",
        call=tiny_qwen.CALL | {"num_inference_steps": 8, "true_cfg_scale": 4.0},
        full_steps=(0, 1, 2, 5),
        predictor=dataclasses.replace(MANY, kind="per_step", step_history=2),
        branches=("cond", "uncond"),
    ),
    "qwen-image-lightning": ModelKind(
        build=lambda folder: tiny_qwen.tiny_qwen(folder, lightning=True),
        family="qwen-image",
        call=tiny_qwen.CALL | {"num_inference_steps": 8, "true_cfg_scale": 1.0},
        full_steps=(0, 1, 4),
        predictor=FEW,
    ),
    "hunyuan-video": ModelKind(
        build=tiny_hunyuan.tiny_hunyuan,
        family="hunyuan-video",
        call=tiny_hunyuan.CALL | {"num_inference_steps": 8},
        full_steps=(0, 1, 2, 5),
    ),
}


def tiny_workload(name: str) -> Workload:
    """The workload of one kind; its pipeline and prompts are looked for under the working folder."""
    kind = KINDS[name]
    return Workload(
        name=name,
        model=ModelParams(family=kind.family, source=f"data/base/{name}"),
        call=CallParams(**kind.call),
        prompts="tiny",
        resources=ResourcesParams(device="cpu"),
        schedule=ScheduleParams(
            budgets={"fast": BudgetParams(full_steps=kind.full_steps)}, default_budget="fast"
        ),
        record=RecordParams(train_prompts=3, validation_prompts=1),
        predictor=kind.predictor,
        ground_truth=GroundTruthParams(iterations=4, batch_size=2, checkpoint_every=2),
        closed_loop=ClosedLoopParams(iterations=2, batch_size=2, checkpoint_every=1, gradient=kind.gradient),
    )


def prepare(root: Path, name: str) -> tuple[Workload, Any]:
    """Write a kind's pipeline and prompts under `root`, the working folder, and load the pipeline as a workload's."""
    workload = tiny_workload(name)
    KINDS[name].build(root / workload.model.source)
    tiny.write_prompts(root, SPLITS)
    return workload, load_pipeline(workload.model, workload.resources.device)


def train_to_bundle(workload: Workload, pipe: Any) -> tuple[Bundle, Trajectories, dict[str, dict[str, float]]]:
    """Record, both training steps, bundle.

    Returns:
        The bundle, the training trajectories, and both steps' figures by their name.
    """

    def report(step: int, values: dict[str, float]) -> None:
        pass

    record(workload, pipe)
    experts = {str(job): run_ground_truth_job(workload, job, report) for job in list_ground_truth_jobs(workload)}
    finish(workload, "ground_truth", experts)
    tuned = run_closed_loop_job(workload, "fast", report)
    predictor = finish(workload, "closed_loop", {"fast": tuned})
    train, validation = recorded_splits(workload.recording)
    bundle = make_bundle(
        workload.paths.bundle,
        workload,
        pipe,
        predictor,
        train,
        validation,
        quality={},
        error_bounds=bounds_by_budget(pipe, workload, predictor, train, validation),
        evaluation={},
        created_from={},
    )
    figures = {name: part.figures for name, part in experts.items()}
    return bundle, train, {**figures, "closed_loop": tuned.figures}
