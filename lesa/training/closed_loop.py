"""The second training step, closed loop: the experts see the states their own predictions lead to.

LESA (arXiv 2602.20497) mixes predicted and computed features in the history. Here the accelerated sampler itself is
the loop, run through the real pipeline with the experts in the hook, in one of two ways:
    through_sampler   the error of the final latents, differentiated through the whole run, full steps included
    drifted_states    no gradient through the run: histories come from the accelerated run (the model's own drifted
                      states), targets from the unaccelerated one
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesa.errors import LesaError
from lesa.models.output_head import OutputHead, freeze, output_head_of
from lesa.params import Report, Workload
from lesa.predictor.predictor import Predictor
from lesa.predictor.spec import MIXED, STEPS, Variant
from lesa.recording.dataset import Splits, Trajectories, draw, noise_levels
from lesa.training import losses
from lesa.training.cases import Case, data_digest, draw_case, training_cases, training_key
from lesa.training.expert import Expert
from lesa.training.experts import Job, expert_seed, new_expert, predictor_spec
from lesa.training.ground_truth import step_weights_of_stage
from lesa.training.loop import LoopSettings, optimise
from lesa.training.rollout import ExpertRule, accelerated_latents, freeze_pipeline
from lesa.training.step_weights import StepWeights
from lesa.training.targets import whiten


def train_budget(
    workload: Workload,
    budget: str,
    start: Predictor,
    pipe: Any,
    train: Trajectories,
    validation: Trajectories,
    *,
    others: Mapping[int, Splits] | None = None,
    work_dir: Path,
    report: Report,
) -> tuple[dict[Job, dict[str, torch.Tensor]], dict[str, float]]:
    """Train all experts of one budget in the loop; resumes from its checkpoints in `work_dir`.

    With `MIXED` for a budget, each optimiser step is one schedule at one number of steps, drawn with the batch.

    Args:
        start: the predictor of the first training step.
        pipe: the workload's pipeline; its parameters are frozen and its hooks are left as they were.
        others: trajectories of further numbers of steps, for `MIXED`.

    Returns:
        Every expert's tensors, and the validation error of the final latents in decibels before and after.
    """
    settings, others = workload.closed_loop, others or {}
    if start.spec != predictor_spec(workload, train.channels):
        raise LesaError("the first training step's predictor has other settings; run train_stage1 first")
    freeze_pipeline(pipe)
    jobs = [Job(budget, stage) for stage in range(len(workload.predictor.history_sizes))]
    levels = noise_levels(others)
    experts = {job.stage: new_expert(workload, job, train.sigmas, train.channels, levels) for job in jobs}
    variant = next(v for v in start.spec.all_variants if v.name == budget)
    for stage, expert in experts.items():
        restore(expert, start, variant, stage)
    known = training_cases(workload, budget, train, validation, others)
    cases = [case for case in known if case.schedule.predicted_steps]
    if not cases:
        untouched = {job: experts[job.stage].export() for job in jobs}
        own = start.step_tensors(variant)
        untouched[jobs[0]] |= {f"{STEPS}.{name}": tensor for name, tensor in own.items()}
        return untouched, {}
    for expert in experts.values():
        expert.to(pipe.device)
    step_weights = start_step_weights(workload, budget, start, experts, train)
    rules = [
        ExpertRule(
            experts=experts,
            schedule=case.schedule,
            sigmas=case.train.sigmas,
            boundaries=workload.predictor.boundaries,
            sizes=start.spec.sizes_of(variant),
            history=workload.predictor.history,
            step_weights=step_weights,
            step_history=workload.predictor.step_history if step_weights is not None else 0,
        )
        for case in cases
    ]
    for stage, expert in experts.items():
        of_cases = [(case.train, rule.targets(stage)) for case, rule in zip(cases, rules, strict=True)]
        whiten(expert, of_cases, ridge=workload.predictor.ridge, batch_size=settings.batch_size)
    compare = losses.CLOSED_LOOP[settings.loss]

    def through_sampler(batch: torch.Generator) -> torch.Tensor:
        place = draw_case(batch, len(cases))
        data = cases[place].train
        runs = _runs(data)
        indices = [runs[i] for i in draw(batch, len(runs), settings.batch_size)]
        latents = accelerated_latents(
            pipe, workload, cases[place].schedule, rules[place], data, indices, settings.gradient_checkpointing
        )
        return compare(latents, data.latents[indices].to(latents.device))

    head = output_head_of(pipe.transformer)
    if pipe.transformer.dtype != torch.float32:
        head = freeze(copy.deepcopy(head).float())

    def drifted_states(batch: torch.Generator) -> torch.Tensor:
        place = draw_case(batch, len(cases))
        data = cases[place].train
        return drifted_loss(pipe, workload, rules[place], data, draw(batch, len(data), settings.batch_size), head)

    def loss_of_case(case: Case, rule: ExpertRule) -> float:
        total, runs = 0.0, torch.tensor([row for row in _runs(case.validation) if row < case.judged])
        for chunk in runs.split(settings.batch_size):
            latents = accelerated_latents(pipe, workload, case.schedule, rule, case.validation, chunk.tolist())
            total += float(compare(latents, case.validation.latents[chunk].to(latents.device))) * len(chunk)
        return total / len(runs)

    @torch.no_grad()
    def validation_loss() -> float:
        return sum(loss_of_case(case, rule) for case, rule in zip(cases, rules, strict=True)) / len(cases)

    before = validation_loss()
    modules = nn.ModuleDict({str(stage): expert for stage, expert in experts.items()})
    if step_weights is not None:
        modules[STEPS] = step_weights
    best = optimise(
        modules,
        through_sampler if settings.gradient == "through_sampler" else drifted_states,
        validation_loss,
        settings=LoopSettings.of(settings, expert_seed(workload, jobs[0])),
        folder=work_dir / budget,
        key=training_key(
            workload,
            "closed_loop",
            budget,
            data_digest(budget, train, validation, others) + predictor_digest(start),
        ),
        report=report,
    )
    tensors = {job: experts[job.stage].export() for job in jobs}
    if step_weights is not None:
        found = {f"{STEPS}.{name}": tensor for name, tensor in step_weights.export().items()}
        tensors[jobs[0]] |= found  # a budget's step weights are one table, whichever stage hands it on
    return tensors, {"validation_loss_start": before, "validation_loss": best}


def _runs(data: Trajectories) -> list[int]:
    """One row of each recorded run: all guidance branches of a run lead to the same latents."""
    return [row for row, branch in enumerate(data.branch) if branch == 0]


def start_step_weights(
    workload: Workload, budget: str, start: Predictor, experts: dict[int, Expert], train: Trajectories
) -> StepWeights | None:
    """The step weights of the first training step, in coordinates fitted anew; None for experts that have none."""
    if workload.predictor.kind != "per_step" or budget == MIXED:
        return None
    parts = [step_weights_of_stage(workload, Job(budget, stage), expert, train) for stage, expert in experts.items()]
    # A step belongs to one noise stage; at the others' steps a part is zero.
    weights = StepWeights(sum(part.start for part in parts), sum(part.basis for part in parts))
    variant = next(v for v in start.spec.variants if v.name == budget)
    weights.load_export(start.step_tensors(variant))
    return weights


def drifted_loss(
    pipe: Any,
    workload: Workload,
    rule: ExpertRule,
    data: Trajectories,
    indices: Sequence[int],
    head: OutputHead,
) -> torch.Tensor:
    """The ground-truth loss with histories from the accelerated run and targets from the unaccelerated one."""
    rule.captured = {}
    try:
        with torch.no_grad():
            accelerated_latents(pipe, workload, rule.schedule, rule, data, indices)
        captured = rule.captured
    finally:
        rule.captured = None
    loss = losses.GROUND_TRUTH[workload.ground_truth.loss]
    parts = []
    for stage, expert in rule.experts.items():
        targets = rule.targets(stage)
        if not targets.steps:
            continue
        target = data.feature_batch(indices, targets.steps).to(expert.low.device)
        history_steps = {step for past in targets.past for step in past}
        features = torch.stack(
            [
                torch.stack([captured[data.branch[i], step][row].float() for row, i in enumerate(indices)])
                if step in history_steps
                else target[:, targets.steps.index(step)]
                for step in targets.needed
            ],
            dim=1,
        )
        temb = data.temb[list(indices)][:, list(targets.steps)].to(target.device)
        parts.append(loss(targets.predict(expert, features), target, temb, targets.weights.to(target.device), head))
    return torch.stack(parts).mean()


def restore(expert: Expert, predictor: Predictor, variant: Variant, stage: int) -> None:
    """Put a predictor's tensors into a fresh expert; exact, so that training goes on from what was judged."""
    expert.load_export(predictor.expert(variant, stage, "projection"), predictor.expert(variant, stage, "gate"))


def predictor_digest(predictor: Predictor) -> str:
    """SHA-256 over names and values."""
    from lesa.atomic import sha256_bytes

    parts = [
        name.encode() + predictor.tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        for name in sorted(predictor.tensors)
    ]
    return sha256_bytes(b"".join(parts))
