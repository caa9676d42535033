"""The experts of a workload as jobs: a fresh one each, and one predictor of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lesa.errors import LesaError
from lesa.params import Workload
from lesa.predictor.alpha import history_steps, time_offsets
from lesa.predictor.predictor import Predictor
from lesa.predictor.spec import MIXED, MIXED_HISTORY, STEPS, PredictorSpec, Variant
from lesa.predictor.step_weights import step_weight_shapes
from lesa.schedule import history_problems, stage_of_steps
from lesa.training.cases import served_offsets
from lesa.training.expert import Expert


@dataclass(frozen=True)
class Job:
    """One expert to train: a noise stage's, for one budget or for other numbers of steps (`MIXED`)."""

    budget: str
    stage: int

    def __str__(self) -> str:
        return f"{self.budget}.stage{self.stage}"


def ground_truth_jobs(workload: Workload, sigmas: torch.Tensor) -> list[Job]:
    """Every expert that has steps to predict.

    Raises:
        ValueError: naming every window that is impossible.
    """
    problems, jobs = [], []
    stages = stage_of_steps(sigmas, workload.predictor.boundaries)
    for budget, schedule in workload.budgets().items():
        found = []
        if workload.predictor.kind == "lesa":  # weights of each step use what history there is
            found = history_problems(schedule, workload.predictor.history_sizes, stages, workload.predictor.history)
        problems += [f"budget {budget}: {problem}" for problem in found]
        jobs += [Job(budget, stage) for stage in range(len(workload.predictor.history_sizes))]
    if workload.record.step_counts:
        jobs += [Job(MIXED, stage) for stage in range(len(workload.predictor.history_sizes))]
    empty = [stage for stage in range(len(workload.predictor.history_sizes)) if stage not in stages]
    problems += [f"noise stage {stage} has no step: move predictor.boundaries" for stage in empty]
    if problems:
        raise LesaError("predictor: " + "; ".join(problems))
    return jobs


def new_expert(
    workload: Workload,
    job: Job,
    sigmas: torch.Tensor,  # [S + 1]
    channels: int,
    further: Mapping[int, torch.Tensor] | None = None,  # noise levels at other numbers of steps, for `MIXED`
) -> Expert:
    """A fresh expert, started as the parameters say."""
    if job.budget == MIXED:
        levels = {workload.call.num_inference_steps: sigmas, **(further or {})}
        if missing := sorted(set(workload.record.step_counts) - levels.keys()):
            raise LesaError(f"experts for other numbers of steps need the noise levels of {missing} steps too")
        offsets = served_offsets(workload, job.stage, levels)
        return Expert(
            workload.predictor,
            channels=channels,
            history_size=MIXED_HISTORY,
            offsets=offsets,
            steps=[0] * len(offsets),
            num_steps=max(levels),
            relative=True,
            seed=expert_seed(workload, job),
        )
    schedule, size = workload.budgets()[job.budget], workload.predictor.history_sizes[job.stage]
    stages = stage_of_steps(sigmas, workload.predictor.boundaries)
    past = {
        step: history_steps(schedule, step, size, workload.predictor.history)
        for step in range(schedule.num_steps)
        if stages[step] == job.stage
    }
    # Full steps count too: there the error meter asks what the expert would have said.
    steps = [step for step, entries in past.items() if len(entries) == size]
    if not steps:  # all of the stage's steps are warm-up: nothing to predict, a start is still well defined
        steps = [0]
        offsets = torch.arange(1, size + 1, dtype=torch.float32)[None] / schedule.num_steps
    else:
        offsets = torch.stack([time_offsets(sigmas, step, past[step]) for step in steps])
    return Expert(
        workload.predictor,
        channels=channels,
        history_size=size,
        offsets=offsets,
        steps=steps,
        num_steps=schedule.num_steps,
        seed=expert_seed(workload, job),
    )


def expert_seed(workload: Workload, job: Job) -> int:
    digest = hashlib.sha256(f"{workload.seed}/{job}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _no_step_weights(workload: Workload, channels: int) -> dict[str, torch.Tensor]:
    if workload.predictor.kind != "per_step":
        return {}
    shapes = step_weight_shapes(workload.call.num_inference_steps, workload.predictor.step_history, channels)
    return {f"{STEPS}.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def predictor_spec(workload: Workload, channels: int) -> PredictorSpec:
    """The spec that the workload's parameters call for."""
    params = workload.predictor
    counts = workload.step_counts
    return PredictorSpec(
        channels=channels,
        num_steps=workload.call.num_inference_steps,
        boundaries=params.boundaries,
        history_sizes=params.history_sizes,
        variants=tuple(
            Variant(name=name, full_steps=schedule.full_steps) for name, schedule in workload.budgets().items()
        ),
        kind=params.kind,
        step_history=params.step_history,
        history=params.history,
        projection=params.projection,
        rank=params.rank,
        gate=params.gate,
        hidden=params.hidden,
        grid=params.grid,
        step_counts=tuple(sorted(counts)) if len(counts) > 1 else (),
    )


def assemble(workload: Workload, channels: int, experts: dict[Job, dict[str, torch.Tensor]]) -> Predictor:
    """One predictor of all jobs' tensors; a budget's step weights are the sum of what its stages fitted."""
    tensors: dict[str, torch.Tensor] = {}
    for job, part in experts.items():
        for name, tensor in part.items():
            if name.startswith(f"{STEPS}."):
                name = f"{job.budget}/{STEPS}/{name.removeprefix(f'{STEPS}.')}"
                tensors[name] = tensors[name] + tensor if name in tensors else tensor
            else:
                tensors[f"{job.budget}/{job.stage}/{name}"] = tensor
    return Predictor(predictor_spec(workload, channels), tensors)


def untrained_predictor(
    workload: Workload, sigmas: torch.Tensor, channels: int, further: Mapping[int, torch.Tensor] | None = None
) -> Predictor:
    """The predictor before any training: first-order extrapolation in sigma where the parameters start so.

    Args:
        sigmas, further: noise levels as `new_expert` takes them.
    """
    experts = {}
    for job in ground_truth_jobs(workload, sigmas):
        experts[job] = new_expert(workload, job, sigmas, channels, further).export()
        if job.budget != MIXED:
            experts[job] |= _no_step_weights(workload, channels)
    return assemble(workload, channels, experts)
