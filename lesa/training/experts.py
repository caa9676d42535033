"""The experts of a workload as jobs: a fresh one each, what training made of them, and one predictor of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from lesa.errors import LesaError
from lesa.predictor.alpha import history_steps, time_offsets
from lesa.predictor.predictor import Predictor
from lesa.predictor.spec import MIXED, MIXED_HISTORY, STEPS, PredictorSpec, Variant
from lesa.predictor.step_weights import step_weight_shapes
from lesa.schedule import history_problems, stage_of_steps
from lesa.training.cases import served_offsets
from lesa.training.design import ExpertDesign
from lesa.training.expert import Expert

Tensors = dict[str, torch.Tensor]
Figures = dict[str, float]


@dataclass(frozen=True)
class Job:
    """One expert to train: a noise stage's, for one budget or for other numbers of steps (`MIXED`)."""

    budget: str
    stage: int

    def __str__(self) -> str:
        return f"{self.budget}.stage{self.stage}"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a job of a training step returns: some experts of one budget, with the step weights beside them.

    step_weights: as `lesa.predictor.step_weights.step_weight_shapes` names them, zero at the steps of noise stages that
        the job does not train: a budget's are the sum over its jobs. Empty with kind `lesa` and for `MIXED`.
    """

    budget: str
    experts: Mapping[int, Tensors]  # by noise stage, as `Expert.export` gives them
    step_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    figures: Figures = field(default_factory=dict)  # validation loss before and after; empty where nothing is predicted


def ground_truth_jobs(design: ExpertDesign, sigmas: torch.Tensor) -> list[Job]:
    """Every expert that has steps to predict.

    Raises:
        ValueError: naming every history that is impossible.
    """
    predictor = design.predictor
    stages = stage_of_steps(sigmas, predictor.boundaries)
    numbers = range(len(predictor.history_sizes))
    problems, jobs = [], []
    for budget, schedule in design.schedules.items():
        if predictor.kind == "lesa":  # weights of each step use what history there is
            short = history_problems(schedule, predictor.history_sizes, stages, predictor.history)
            problems += [f"budget {budget}: {problem}" for problem in short]
        jobs += [Job(budget, stage) for stage in numbers]
    if design.step_counts:
        jobs += [Job(MIXED, stage) for stage in numbers]
    empty = [stage for stage in numbers if stage not in stages]
    problems += [f"noise stage {stage} has no step: move predictor.boundaries" for stage in empty]
    if problems:
        raise LesaError("predictor: " + "; ".join(problems))
    return jobs


def new_expert(
    design: ExpertDesign,
    job: Job,
    sigmas: torch.Tensor,  # [S + 1]
    channels: int,
    further: Mapping[int, torch.Tensor] | None = None,  # noise levels at other numbers of steps, for `MIXED`
) -> Expert:
    """A fresh expert, started as the parameters say."""
    if job.budget == MIXED:
        levels = {design.call.num_inference_steps: sigmas, **(further or {})}
        if missing := sorted(set(design.step_counts) - levels.keys()):
            raise LesaError(f"experts for other numbers of steps need the noise levels of {missing} steps too")
        offsets = served_offsets(design, job.stage, levels)
        return Expert(
            design.predictor,
            channels=channels,
            history_size=MIXED_HISTORY,
            offsets=offsets,
            steps=[0] * len(offsets),
            num_steps=max(levels),
            relative=True,
            seed=expert_seed(design.seed, job),
        )
    schedule, size = design.schedules[job.budget], design.predictor.history_sizes[job.stage]
    stages = stage_of_steps(sigmas, design.predictor.boundaries)
    past = {
        step: history_steps(schedule, step, size, design.predictor.history)
        for step in range(schedule.num_steps)
        if stages[step] == job.stage
    }
    # Full steps count too: there the error meter asks what the expert would have predicted.
    steps = [step for step, entries in past.items() if len(entries) == size]
    if not steps:  # all of the stage's steps are warm-up: nothing to predict, a start is still well defined
        steps = [0]
        offsets = torch.arange(1, size + 1, dtype=torch.float32)[None] / schedule.num_steps
    else:
        offsets = torch.stack([time_offsets(sigmas, step, past[step]) for step in steps])
    return Expert(
        design.predictor,
        channels=channels,
        history_size=size,
        offsets=offsets,
        steps=steps,
        num_steps=schedule.num_steps,
        seed=expert_seed(design.seed, job),
    )


def expert_seed(seed: int, job: Job) -> int:
    """The seed of one expert's initial values and batches, from the workload's."""
    digest = hashlib.sha256(f"{seed}/{job}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def predictor_spec(design: ExpertDesign, channels: int) -> PredictorSpec:
    """The spec that the settings call for."""
    params = design.predictor
    num_steps = design.call.num_inference_steps
    return PredictorSpec(
        channels=channels,
        num_steps=num_steps,
        boundaries=params.boundaries,
        history_sizes=params.history_sizes,
        variants=tuple(
            Variant(name=name, full_steps=schedule.full_steps) for name, schedule in design.schedules.items()
        ),
        kind=params.kind,
        step_history=params.step_history,
        history=params.history,
        projection=params.projection,
        rank=params.rank,
        gate=params.gate,
        hidden=params.hidden,
        grid=params.grid,
        step_counts=tuple(sorted((num_steps, *design.step_counts))) if design.step_counts else (),
    )


def assemble(design: ExpertDesign, channels: int, trained: Iterable[Trained]) -> Predictor:
    """One predictor of what all jobs returned."""
    tensors: Tensors = {}
    for part in trained:
        for stage, expert in part.experts.items():
            tensors |= {f"{part.budget}/{stage}/{name}": tensor for name, tensor in expert.items()}
        for name, tensor in part.step_weights.items():
            key = f"{part.budget}/{STEPS}/{name}"
            tensors[key] = tensors[key] + tensor if key in tensors else tensor
    return Predictor(predictor_spec(design, channels), tensors)


def untrained(
    design: ExpertDesign,
    job: Job,
    sigmas: torch.Tensor,
    channels: int,
    further: Mapping[int, torch.Tensor] | None = None,
) -> Trained:
    """A fresh expert in the place of a trained one, with step weights of zero; arguments as `new_expert`'s."""
    step_weights = {}
    if design.predictor.kind == "per_step" and job.budget != MIXED:
        shapes = step_weight_shapes(design.call.num_inference_steps, design.predictor.step_history, channels)
        step_weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    expert = new_expert(design, job, sigmas, channels, further)
    return Trained(budget=job.budget, experts={job.stage: expert.export()}, step_weights=step_weights)


def untrained_predictor(
    design: ExpertDesign, sigmas: torch.Tensor, channels: int, further: Mapping[int, torch.Tensor] | None = None
) -> Predictor:
    """The predictor before any training: first-order extrapolation in sigma where the parameters start so.

    Args:
        sigmas, further: noise levels as `new_expert` takes them.
    """
    jobs = ground_truth_jobs(design, sigmas)
    return assemble(design, channels, [untrained(design, job, sigmas, channels, further) for job in jobs])
