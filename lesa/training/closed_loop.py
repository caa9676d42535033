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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesa.errors import LesaError
from lesa.models.output_head import OutputHead, freeze, output_head_of
from lesa.params import CallParams, ClosedLoopParams, Report
from lesa.predictor.predictor import Predictor
from lesa.predictor.spec import MIXED, STEPS, Variant
from lesa.recording.dataset import Splits, Trajectories, noise_levels
from lesa.training.cases import Case, data_digest, training_cases
from lesa.training.design import ExpertDesign, training_key
from lesa.training.encoded_prompts import prompts_encoded_once
from lesa.training.expert import Expert
from lesa.training.experts import Job, Tensors, Trained, expert_seed, new_expert, predictor_spec
from lesa.training.ground_truth import step_weights_of_stage
from lesa.training.loop import LoopSettings, Objective, fit
from lesa.training.losses import CLOSED_LOOP, GROUND_TRUTH
from lesa.training.recompute import constant_steps
from lesa.training.rollout import ExpertRule, accelerated_latents, freeze_pipeline
from lesa.training.step_weights import StepWeights
from lesa.training.targets import whiten


@dataclass(frozen=True, kw_only=True)
class RolloutCase(Case):
    """A case with the experts in training as a rule on its schedule."""

    rule: ExpertRule


def train_budget(
    design: ExpertDesign,
    settings: ClosedLoopParams,
    budget: str,
    start: Predictor,
    pipe: Any,
    train: Trajectories,
    validation: Trajectories,
    *,
    feature_loss: str,
    others: Mapping[int, Splits] | None = None,
    work_dir: Path,
    report: Report,
) -> Trained:
    """Train all experts of one budget in the loop; resumes from its checkpoints in `work_dir`.

    With `MIXED` for a budget, each optimiser step is one schedule at one number of steps, drawn with the batch.

    Args:
        start: the predictor of the first training step.
        pipe: the workload's pipeline; its parameters are frozen and its hooks are left as they were.
        feature_loss: one of `losses.GROUND_TRUTH`, for `drifted_states`.
        others: trajectories of further numbers of steps, for `MIXED`.

    Returns:
        Every expert, the budget's step weights, and the validation loss of the final latents before and after.
    """
    others = others or {}
    if start.spec != predictor_spec(design, train.channels):
        raise LesaError("the first training step's predictor has other settings; run train_stage1 first")
    freeze_pipeline(pipe)
    variant = next(v for v in start.spec.all_variants if v.name == budget)
    experts = _restored(design, start, variant, train, others)
    known = training_cases(design, budget, train, validation, others)
    known = [case for case in known if case.schedule.predicted_steps]
    if not known:
        return Trained(budget=budget, experts=_exported(experts), step_weights=start.step_tensors(variant))
    modules = nn.ModuleDict({str(stage): expert for stage, expert in experts.items()}).to(pipe.device)
    step_weights = start_step_weights(design, budget, start, experts, train)
    cases = _rollout_cases(design, known, experts, start.spec.sizes_of(variant), step_weights)
    for stage, expert in experts.items():
        predicted = [(case.train, case.rule.targets(stage)) for case in cases]
        whiten(expert, predicted, ridge=design.predictor.ridge, batch_size=settings.batch_size)
    if step_weights is not None:
        modules[STEPS] = step_weights
    judge = _through_sampler(pipe, design.call, settings)
    data = data_digest(budget, train, validation, others) + predictor_digest(start)
    with prompts_encoded_once(pipe) if settings.gradient_checkpointing else nullcontext():
        figures = fit(
            modules,
            cases,
            judge if settings.gradient == "through_sampler" else _drifted_states(pipe, design.call, feature_loss),
            LoopSettings.of(settings, expert_seed(design.seed, Job(budget, 0))),
            training_key(design, "closed_loop", settings, budget, data),
            judge=judge,
            batch_size=settings.batch_size,
            folder=work_dir / budget,
            report=report,
        )
    shared = step_weights.export() if step_weights is not None else {}
    return Trained(budget=budget, experts=_exported(experts), step_weights=shared, figures=figures)


def _exported(experts: Mapping[int, Expert]) -> dict[int, Tensors]:
    return {stage: expert.export() for stage, expert in experts.items()}


def _restored(
    design: ExpertDesign, start: Predictor, variant: Variant, train: Trajectories, others: Mapping[int, Splits]
) -> dict[int, Expert]:
    """The experts of a variant by noise stage, as the first training step left them."""
    experts = {}
    for stage in range(len(design.predictor.history_sizes)):
        job = Job(variant.name, stage)
        experts[stage] = new_expert(design, job, train.sigmas, train.channels, noise_levels(others))
        restore(experts[stage], start, variant, stage)
    return experts


def _rollout_cases(
    design: ExpertDesign,
    cases: Sequence[Case],
    experts: dict[int, Expert],
    sizes: tuple[int, ...],  # history of each noise stage's expert
    step_weights: StepWeights | None,
) -> list[RolloutCase]:
    params = design.predictor
    return [
        RolloutCase(
            **vars(case),
            rule=ExpertRule(
                experts=experts,
                schedule=case.schedule,
                sigmas=case.train.sigmas,
                boundaries=params.boundaries,
                sizes=sizes,
                history=params.history,
                step_weights=step_weights,
                step_history=params.step_history if step_weights is not None else 0,
            ),
        )
        for case in cases
    ]


def _through_sampler(pipe: Any, call: CallParams, settings: ClosedLoopParams) -> Objective[RolloutCase]:
    """The error of the final latents of accelerated runs, one for each recorded run."""
    compare = CLOSED_LOOP[settings.loss]

    def loss(
        case: RolloutCase, data: Trajectories, rows: list[int], batch: torch.Generator | None
    ) -> torch.Tensor:
        recomputed = settings.gradient_checkpointing and torch.is_grad_enabled()
        constants = frozenset[int]() if batch is None else constant_steps(case.schedule, settings.model_gradient, batch)
        latents = accelerated_latents(pipe, call, case.schedule, case.rule, data, rows, recomputed, constants)
        return compare(latents, data.latents[rows].to(latents.device))

    return Objective(loss, rows=Trajectories.first_branch_rows)


def _drifted_states(pipe: Any, call: CallParams, feature_loss: str) -> Objective[RolloutCase]:
    """`drifted_loss` of each recorded run and guidance branch."""
    head = output_head_of(pipe.transformer)
    if pipe.transformer.dtype != torch.float32:
        head = freeze(copy.deepcopy(head).float())

    def loss(
        case: RolloutCase, data: Trajectories, rows: list[int], batch: torch.Generator | None
    ) -> torch.Tensor:
        return drifted_loss(pipe, call, case.rule, data, rows, head, feature_loss)

    return Objective(loss, rows=lambda data: range(len(data)))


def start_step_weights(
    design: ExpertDesign, budget: str, start: Predictor, experts: dict[int, Expert], train: Trajectories
) -> StepWeights | None:
    """The first training step's step weights, with a whitening fitted anew; None for experts that have none."""
    if design.predictor.kind != "per_step" or budget == MIXED:
        return None
    parts = [step_weights_of_stage(design, Job(budget, stage), expert, train) for stage, expert in experts.items()]
    # A step belongs to one noise stage; at the others' steps a part is zero.
    weights = StepWeights(sum(part.start for part in parts), sum(part.basis for part in parts))
    variant = next(v for v in start.spec.variants if v.name == budget)
    weights.load_export(start.step_tensors(variant))
    return weights


def drifted_loss(
    pipe: Any,
    call: CallParams,
    rule: ExpertRule,
    data: Trajectories,
    indices: Sequence[int],
    head: OutputHead,
    feature_loss: str,
) -> torch.Tensor:
    """The ground-truth loss with histories from the accelerated run and targets from the unaccelerated one."""
    rule.captured = {}
    try:
        with torch.no_grad():
            accelerated_latents(pipe, call, rule.schedule, rule, data, indices)
        captured = rule.captured
    finally:
        rule.captured = None
    loss = GROUND_TRUTH[feature_loss]
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
