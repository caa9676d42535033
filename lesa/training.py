"""The first training step, ground-truth guided: true histories in, true features as targets (LESA, arXiv 2602.20497).

Every expert of every budget is a job of its own, so jobs can run side by side. What a prediction is off by is
measured where it counts: after norm_out and proj_out, weighted by how far its step moves the latents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lesa import gate as gates
from lesa import losses
from lesa.coordinates import learn_in_coordinates
from lesa.ends import Ends
from lesa.expert import Expert
from lesa.fit_steps import fit_step_weights
from lesa.loop import LoopSettings, Report, optimise
from lesa.params import Workload
from lesa.pipelines import pick_device
from lesa.predictor import MIXED, MIXED_HISTORY, STEPS, Predictor, PredictorSpec, Variant
from lesa.schedule import history_problems
from lesa.stages import stage_of_steps
from lesa.step_counts import Case, Splits, noise_levels, served_offsets, training_cases
from lesa.step_weights import StepWeights, step_weight_shapes
from lesa.trajectories import Trajectories, draw, trajectories_digest
from lesa.windows import Windows


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
        raise ValueError("predictor: " + "; ".join(problems))
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
            raise ValueError(f"experts for other numbers of steps need the noise levels of {missing} steps too")
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
        step: gates.history_steps(schedule, step, size, workload.predictor.history)
        for step in range(schedule.num_steps)
        if stages[step] == job.stage
    }
    # Full steps count too: there the error meter asks what the expert would have said.
    steps = [step for step, entries in past.items() if len(entries) == size]
    if not steps:  # all of the stage's steps are warm-up: nothing to predict, a start is still well defined
        steps = [0]
        offsets = torch.arange(1, size + 1, dtype=torch.float32)[None] / schedule.num_steps
    else:
        offsets = torch.stack([gates.offsets(sigmas, step, past[step]) for step in steps])
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


def train_expert(
    workload: Workload,
    job: Job,
    train: Trajectories,
    validation: Trajectories,
    ends: Ends,
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
        (case, Windows.on(case.schedule, case.train.sigmas, stages, job.stage, size, params.history))
        for case in training_cases(workload, job.budget, train, validation, others)
        for stages in [stage_of_steps(case.train.sigmas, params.boundaries)]
    ]
    cases = [(case, windows) for case, windows in known if windows.steps]

    def finished(figures: dict[str, float]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        exported = expert.export()
        if params.kind == "per_step" and job.budget != MIXED:
            found = step_weights_of_stage(workload, job, expert, train).export()
            exported |= {f"{STEPS}.{name}": tensor for name, tensor in found.items()}
        return exported, figures

    if not cases:
        return finished({})
    loss = losses.GROUND_TRUTH[settings.loss]
    device = pick_device(workload.device)
    expert.to(device)
    of_cases = [(case.train, windows) for case, windows in cases]
    learn_in_coordinates(expert, of_cases, ridge=params.ridge, batch_size=settings.batch_size)
    ends = ends.to(device)

    def loss_on(windows: Windows, data: Trajectories, indices: Sequence[int]) -> torch.Tensor:
        features = data.feature_batch(indices, windows.needed).to(device)
        target = features[:, [windows.needed.index(step) for step in windows.steps]]
        temb = data.temb[list(indices)][:, list(windows.steps)].to(device)
        return loss(windows.predict(expert, features), target, temb, windows.weights.to(device), ends)

    @torch.no_grad()
    def loss_of_case(case: Case, windows: Windows) -> float:
        chunks = torch.arange(case.judged).split(settings.batch_size)
        total = sum(float(loss_on(windows, case.validation, chunk.tolist())) * len(chunk) for chunk in chunks)
        return total / case.judged

    before = [loss_of_case(*case) for case in cases]
    units = before if len(cases) > 1 else [1.0]

    def batch_loss(batch: torch.Generator) -> torch.Tensor:
        place = draw_case(batch, len(cases))
        case, windows = cases[place]
        indices = draw(batch, len(case.train), settings.batch_size)
        return loss_on(windows, case.train, indices) / units[place]

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
            step: expert.alpha(gates.offsets(train.sigmas, step, past)[None].to(device), [step])
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


def _no_step_weights(workload: Workload, channels: int) -> dict[str, torch.Tensor]:
    if workload.predictor.kind != "per_step":
        return {}
    shapes = step_weight_shapes(workload.call.num_inference_steps, workload.predictor.step_history, channels)
    return {f"{STEPS}.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def data_digest(budget: str, train: Trajectories, validation: Trajectories, others: Mapping[int, Splits]) -> str:
    """Identity of the trajectories that the experts of `budget` are trained on."""
    further = [data for count in sorted(others) for data in others[count]] if budget == MIXED else []
    return trajectories_digest(train, validation, *further)


def draw_case(batch: torch.Generator, count: int) -> int:
    """Which of `count` cases an optimiser step is about; nothing is drawn where there is no choice."""
    return int(torch.randint(count, (), generator=batch)) if count > 1 else 0


def training_key(workload: Workload, step: str, job: str, data: str) -> str:
    """Identity of a training run: everything that its result depends on."""
    sections = {
        name: dataclasses.asdict(getattr(workload, name))
        for name in ("predictor", "schedule", "call", "model", step)
    }
    for name in ("workers", "threads_per_worker"):  # checkpoint_every stays: it says when the best is looked for
        sections[step].pop(name, None)  # how it runs, not what comes out
    text = json.dumps([sections, workload.seed, step, job, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
