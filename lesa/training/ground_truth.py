"""The first training step, ground-truth guided: true histories in, true features as targets (LESA, arXiv 2602.20497).

Every expert of every budget is a job of its own, so jobs can run side by side. What a prediction is off by is
measured where it counts: after norm_out and proj_out, weighted by how far its step moves the latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lesa.models.output_head import OutputHead
from lesa.params import GroundTruthParams, Report
from lesa.predictor.alpha import time_offsets
from lesa.predictor.spec import MIXED
from lesa.recording.dataset import Splits, Trajectories, noise_levels
from lesa.schedule import stage_of_steps
from lesa.training.cases import Case, data_digest, training_cases
from lesa.training.design import ExpertDesign, training_key
from lesa.training.expert import Expert
from lesa.training.experts import Figures, Job, Trained, expert_seed, new_expert
from lesa.training.loop import LoopSettings, Objective, fit
from lesa.training.losses import GROUND_TRUTH
from lesa.training.step_weights import StepWeights, fit_step_weights
from lesa.training.targets import Targets, whiten


@dataclass(frozen=True, kw_only=True)
class TargetCase(Case):
    """A case with what one expert predicts on it."""

    targets: Targets


def train_expert(
    design: ExpertDesign,
    settings: GroundTruthParams,
    job: Job,
    train: Trajectories,
    validation: Trajectories,
    head: OutputHead,
    *,
    device: torch.device,
    others: Mapping[int, Splits] | None = None,
    work_dir: Path,
    report: Report,
) -> Trained:
    """Train one expert on true histories; resumes from its checkpoints in `work_dir`.

    With `MIXED`, each optimiser step is one schedule at one number of steps, drawn with the batch; its loss counts in
    units of what it was before training, so that none outweighs the others.

    Args:
        others: trajectories of further numbers of steps, for `MIXED`.

    Returns:
        The expert, its stage's share of the budget's step weights, and its validation loss before and after.
    """
    others = others or {}
    expert = new_expert(design, job, train.sigmas, train.channels, noise_levels(others))
    known = training_cases(design, job.budget, train, validation, others)
    cases = _with_targets(design, job, len(expert.low), known)
    figures: Figures = {}
    if cases:
        expert.to(device)
        measured = [(case.train, case.targets) for case in cases]
        whiten(expert, measured, ridge=design.predictor.ridge, batch_size=settings.batch_size)
        head = head.to(device)

        def loss(case: TargetCase, data: Trajectories, rows: list[int], _: torch.Generator | None) -> torch.Tensor:
            return true_history_loss(expert, case.targets, data, rows, head, settings.loss)

        figures = fit(
            nn.ModuleDict({"expert": expert}),
            cases,
            Objective(loss, rows=lambda data: range(len(data))),
            LoopSettings.of(settings, expert_seed(design.seed, job)),
            training_key(
                design, "ground_truth", settings, str(job), data_digest(job.budget, train, validation, others)
            ),
            relative=True,
            batch_size=settings.batch_size,
            folder=work_dir / str(job),
            report=report,
        )
    step_weights = {}
    if design.predictor.kind == "per_step" and job.budget != MIXED:
        step_weights = step_weights_of_stage(design, job, expert, train).export()
    return Trained(
        budget=job.budget, experts={job.stage: expert.export()}, step_weights=step_weights, figures=figures
    )


def _with_targets(design: ExpertDesign, job: Job, size: int, cases: Sequence[Case]) -> list[TargetCase]:
    """The cases in which the job's expert, of history size `size`, has something to predict."""
    predicted = []
    for case in cases:
        sigmas = case.train.sigmas
        stages = stage_of_steps(sigmas, design.predictor.boundaries)
        targets = Targets.on(case.schedule, sigmas, stages, job.stage, size, design.predictor.history)
        if targets.steps:
            predicted.append(TargetCase(**vars(case), targets=targets))
    return predicted


def true_history_loss(
    expert: Expert, targets: Targets, data: Trajectories, rows: Sequence[int], head: OutputHead, loss: str
) -> torch.Tensor:
    """What predictions from recorded features are off by on some rows; `loss` names one of `losses.GROUND_TRUTH`."""
    device = expert.low.device
    features = data.feature_batch(rows, targets.needed).to(device)
    target = features[:, [targets.needed.index(step) for step in targets.steps]]
    temb = data.temb[list(rows)][:, list(targets.steps)].to(device)
    return GROUND_TRUTH[loss](targets.predict(expert, features), target, temb, targets.weights.to(device), head)


def step_weights_of_stage(design: ExpertDesign, job: Job, expert: Expert, train: Trajectories) -> StepWeights:
    """Least-squares step weights beside an expert, for every step of its noise stage that has a history.

    Full steps too: there the error meter asks what would have been predicted.
    """
    schedule, params = design.schedules[job.budget], design.predictor
    stages = stage_of_steps(train.sigmas, params.boundaries)
    size = params.history_sizes[job.stage]
    steps = [step for step in range(1, schedule.num_steps) if stages[step] == job.stage]
    device = expert.low.device
    anchors = {step: schedule.anchors(step, size) for step in steps}
    with torch.no_grad():
        alphas = {
            step: expert.alpha(time_offsets(train.sigmas, step, past)[None].to(device), [step])
            for step, past in anchors.items()
            if len(past) == size
        }

    def predict(history: Sequence[torch.Tensor], steps: Sequence[int]) -> torch.Tensor:
        if len(history) < size:
            return history[0].expand(len(steps), *history[0].shape)
        reach = torch.cat([alphas[step] for step in steps])
        return history[0] + reach[:, None, None, None] * expert.project(history[:size])

    return fit_step_weights(
        train, schedule, steps, predict, history_size=params.step_history, ridge=params.ridge, device=device
    )
