"""The second training step, closed loop: the experts see the states their own predictions lead to.

LESA (arXiv 2602.20497) mixes predicted and computed features in the history. Here the accelerated sampler itself is
the loop, run through the real pipeline with the experts in the hook, in one of two ways:
    through_sampler   the error of the final latents, differentiated through the whole run, full steps included
    drifted_states    no gradient through the run: histories come from the accelerated run (the model's own drifted
                      states), targets from the unaccelerated one
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lesa import gate as gates
from lesa import losses
from lesa.coordinates import learn_in_coordinates
from lesa.ends import Ends, ends_of, freeze
from lesa.expert import Expert
from lesa.families import blocks, family_of
from lesa.forecast import Rule
from lesa.history import History
from lesa.hook import LesaCacheConfig, apply_lesa_cache, is_lesa_cache_enabled, remove_lesa_cache
from lesa.loop import LoopSettings, Report, optimise
from lesa.params import Workload
from lesa.pipelines import call_arguments
from lesa.predictor import MIXED, STEPS, Predictor, Variant
from lesa.schedule import Schedule
from lesa.stages import stage_of_steps
from lesa.step_counts import Case, Splits, noise_levels, training_cases
from lesa.step_weights import StepWeights, differences
from lesa.training import (
    Job,
    data_digest,
    draw_case,
    expert_seed,
    new_expert,
    predictor_spec,
    step_weights_of_stage,
    training_key,
)
from lesa.trajectories import Trajectories, draw
from lesa.windows import Windows


@dataclass(kw_only=True)
class ExpertRule:
    """Experts in training as a `lesa.forecast.Rule`: predictions carry gradients."""

    experts: dict[int, Expert]
    schedule: Schedule
    sigmas: torch.Tensor
    boundaries: tuple[float, ...]
    sizes: tuple[int, ...]
    history: str
    step_weights: StepWeights | None = None  # kind per_step
    step_history: int = 0
    name: str = "experts in training"
    captured: dict[tuple[int, int], torch.Tensor] | None = None  # (branch, step) -> history entry, where asked for
    place: tuple[int, int] = (-1, 0)  # step and branch of the newest call, while capturing
    stages: tuple[int, ...] = field(init=False)
    history_size: int = field(init=False)
    keeps_predictions: bool = field(init=False)

    def __post_init__(self) -> None:
        self.stages = tuple(stage_of_steps(self.sigmas, self.boundaries))
        self.history_size = max(*self.sizes, self.step_history)
        self.keeps_predictions = self.history == "steps"

    def windows(self, stage: int) -> Windows:
        """What the expert of one noise stage predicts."""
        return Windows.on(self.schedule, self.sigmas, self.stages, stage, self.sizes[stage], self.history)

    def __call__(self, history: History, step: int) -> torch.Tensor:
        stage = self.stages[step]
        expert, size = self.experts[stage], self.sizes[stage]
        past = history.steps[:size]
        if self.captured is not None:
            # Guidance branches are called one after the other, in the family's order.
            self.place = (step, self.place[1] + 1 if self.place[0] == step else 0)
            branch = self.place[1]
            self.captured |= {(branch, s): f for s, f in zip(past, history.features[:size], strict=True)}
        newest = history.features[0]
        # Experts train in float32 whatever the pipeline's dtype.
        change = torch.zeros((), device=newest.device)
        if len(past) == size or self.step_weights is None:
            if stage not in history.memo:
                history.memo[stage] = expert.project([feature.float() for feature in history.features[:size]])
            offsets = gates.offsets(self.sigmas, step, past)[None]
            change = expert.alpha(offsets.to(newest.device), [step]) * history.memo[stage]
        if self.step_weights is not None:
            held = [feature.float() for feature in history.features]
            change = change + self.step_weights(held[0], differences(held, self.step_history), step)
        return (newest.float() + change).to(newest.dtype)


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
        raise ValueError("the first training step's predictor has other settings; run train_stage1 first")
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
        of_cases = [(case.train, rule.windows(stage)) for case, rule in zip(cases, rules, strict=True)]
        learn_in_coordinates(expert, of_cases, ridge=workload.predictor.ridge, batch_size=settings.batch_size)
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

    ends = ends_of(pipe.transformer)
    if pipe.transformer.dtype != torch.float32:
        ends = freeze(copy.deepcopy(ends).float())

    def drifted_states(batch: torch.Generator) -> torch.Tensor:
        place = draw_case(batch, len(cases))
        data = cases[place].train
        return drifted_loss(pipe, workload, rules[place], data, draw(batch, len(data), settings.batch_size), ends)

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


def freeze_pipeline(pipe: Any) -> None:
    """Turn off gradients of all the pipeline's parameters: what is trained through it is not it."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            freeze(part)


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


def accelerated_latents(
    pipe: Any,
    workload: Workload,
    schedule: Schedule,
    rule: Rule,
    data: Trajectories,
    indices: Sequence[int],
    gradient_checkpointing: bool = False,
) -> torch.Tensor:
    """Final latents of the accelerated pipeline for the same prompts and noise as the recorded runs.

    The pipeline's own call does the work, under whatever gradient mode is on: its `no_grad` wrapper is left out.
    """
    decorated: Any = type(pipe).__call__
    call = decorated.__wrapped__
    asked = dataclasses.replace(workload.call, num_inference_steps=schedule.num_steps)
    prompts = [data.prompts[i] for i in indices]
    with ExitStack() as stack:
        for expert in rule.experts.values() if isinstance(rule, ExpertRule) else ():
            stack.enter_context(expert.projection.held())
        stack.enter_context(in_loop(pipe, schedule, rule, gradient_checkpointing))
        return call(
            pipe,
            prompt=prompts,
            generator=[torch.Generator("cpu").manual_seed(data.seeds[i]) for i in indices],
            output_type="latent",
            return_dict=False,
            **call_arguments(pipe, asked, len(prompts)),
        )[0]


def drifted_loss(
    pipe: Any,
    workload: Workload,
    rule: ExpertRule,
    data: Trajectories,
    indices: Sequence[int],
    ends: Ends,
) -> torch.Tensor:
    """The ground-truth loss with histories from the accelerated run and targets from the unaccelerated one."""
    rule.captured, rule.place = {}, (-1, 0)
    try:
        with torch.no_grad():
            accelerated_latents(pipe, workload, rule.schedule, rule, data, indices)
        captured = rule.captured
    finally:
        rule.captured = None
    loss = losses.GROUND_TRUTH[workload.ground_truth.loss]
    parts = []
    for stage, expert in rule.experts.items():
        windows = rule.windows(stage)
        if not windows.steps:
            continue
        target = data.feature_batch(indices, windows.steps).to(expert.low.device)
        history_steps = {step for past in windows.past for step in past}
        features = torch.stack(
            [
                torch.stack([captured[data.branch[i], step][row].float() for row, i in enumerate(indices)])
                if step in history_steps
                else target[:, windows.steps.index(step)]
                for step in windows.needed
            ],
            dim=1,
        )
        temb = data.temb[list(indices)][:, list(windows.steps)].to(target.device)
        parts.append(loss(windows.predict(expert, features), target, temb, windows.weights.to(target.device), ends))
    return torch.stack(parts).mean()


@contextmanager
def in_loop(pipe: Any, schedule: Schedule, rule: Rule, gradient_checkpointing: bool) -> Iterator[None]:
    """The hook on the pipeline's transformer, with block activations recomputed in the backward pass if asked."""
    transformer = pipe.transformer
    modules = [block for _, block, _ in blocks(transformer, family_of(transformer))] if gradient_checkpointing else []
    config = LesaCacheConfig(
        schedule=schedule, rule=rule, scheduler=lambda: pipe.scheduler, measure=False, guard=False
    )
    if is_lesa_cache_enabled(transformer):
        raise ValueError("LESA is enabled on this pipeline: call lesa.disable(pipe) before training on it")
    own = [block.__dict__.get("forward") for block in modules]  # of another tool's hook
    try:
        for block in modules:
            block.forward = _recomputed(block.forward)  # beneath the hook: only full steps are recomputed
        apply_lesa_cache(transformer, config)
        yield
    finally:
        remove_lesa_cache(transformer)
        for block, forward in zip(modules, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputing


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
