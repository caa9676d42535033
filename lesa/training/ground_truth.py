"""The first training step, ground-truth guided: true histories in, true features as targets (LESA, arXiv 2602.20497).

Every expert of every budget is a job of its own, so jobs can run side by side. What a prediction is off by is
measured where it counts: after norm_out and proj_out, weighted by how far its step moves the latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lesa.models.output_head import OutputHead
from lesa.models.pipelines import pick_device
from lesa.params import Report, Workload
from lesa.predictor.alpha import time_offsets
from lesa.predictor.spec import MIXED, STEPS
from lesa.recording.dataset import Splits, Trajectories, draw, noise_levels
from lesa.schedule import stage_of_steps
from lesa.training import losses
from lesa.training.cases import Case, data_digest, draw_case, training_cases, training_key
from lesa.training.expert import Expert
from lesa.training.experts import Job, expert_seed, new_expert
from lesa.training.loop import LoopSettings, optimise
from lesa.training.step_weights import StepWeights, fit_step_weights
from lesa.training.targets import Targets, whiten


def train_expert(
    workload: Workload,
    job: Job,
    train: Trajectories,
    validation: Trajectories,
    head: OutputHead,
    *,
    others: Mapping[int, Splits] | None = None,
    work_dir: Path,
    report: Report,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train one expert on true histories; resumes from its checkpoints in `work_dir`.

    With `MIXED`, each optimiser step is one schedule at one number of steps, drawn with the batch; its loss counts in
    units of what it was before training, so that none outweighs the others.

    Args:
        others: trajectories of further numbers of steps, for `MIXED`.

    Returns:
        The expert's tensors and its figures: validation loss before and after.
    """
    settings, params, others = workload.ground_truth, workload.predictor, others or {}
    further = noise_levels(others)
    expert = new_expert(workload, job, train.sigmas, train.channels, further)
    size = len(expert.low)
    known = [
        (case, Targets.on(case.schedule, case.train.sigmas, stages, job.stage, size, params.history))
        for case in training_cases(workload, job.budget, train, validation, others)
        for stages in [stage_of_steps(case.train.sigmas, params.boundaries)]
    ]
    cases = [(case, targets) for case, targets in known if targets.steps]

    def finished(figures: dict[str, float]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        exported = expert.export()
        if params.kind == "per_step" and job.budget != MIXED:
            found = step_weights_of_stage(workload, job, expert, train).export()
            exported |= {f"{STEPS}.{name}": tensor for name, tensor in found.items()}
        return exported, figures

    if not cases:
        return finished({})
    loss = losses.GROUND_TRUTH[settings.loss]
    device = pick_device(workload.resources.device)
    expert.to(device)
    of_cases = [(case.train, targets) for case, targets in cases]
    whiten(expert, of_cases, ridge=params.ridge, batch_size=settings.batch_size)
    head = head.to(device)

    def loss_on(targets: Targets, data: Trajectories, indices: Sequence[int]) -> torch.Tensor:
        features = data.feature_batch(indices, targets.needed).to(device)
        target = features[:, [targets.needed.index(step) for step in targets.steps]]
        temb = data.temb[list(indices)][:, list(targets.steps)].to(device)
        return loss(targets.predict(expert, features), target, temb, targets.weights.to(device), head)

    @torch.no_grad()
    def loss_of_case(case: Case, targets: Targets) -> float:
        chunks = torch.arange(case.judged).split(settings.batch_size)
        total = sum(float(loss_on(targets, case.validation, chunk.tolist())) * len(chunk) for chunk in chunks)
        return total / case.judged

    before = [loss_of_case(*case) for case in cases]
    units = before if len(cases) > 1 else [1.0]

    def batch_loss(batch: torch.Generator) -> torch.Tensor:
        place = draw_case(batch, len(cases))
        case, targets = cases[place]
        indices = draw(batch, len(case.train), settings.batch_size)
        return loss_on(targets, case.train, indices) / units[place]

    def validation_loss() -> float:
        return sum(loss_of_case(*case) / unit for case, unit in zip(cases, units, strict=True)) / len(cases)

    start = validation_loss()
    best = optimise(
        nn.ModuleDict({"expert": expert}),
        batch_loss,
        validation_loss,
        settings=LoopSettings.of(settings, expert_seed(workload, job)),
        folder=work_dir / str(job),
        key=training_key(workload, "ground_truth", str(job), data_digest(job.budget, train, validation, others)),
        report=report,
    )
    return finished({"validation_loss_start": start, "validation_loss": best})


def step_weights_of_stage(workload: Workload, job: Job, expert: Expert, train: Trajectories) -> StepWeights:
    """Least-squares step weights beside an expert, for every step of its noise stage that has a history.

    Full steps too: there the error meter asks what would have been predicted.
    """
    schedule, params = workload.budgets()[job.budget], workload.predictor
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
