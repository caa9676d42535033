"""A workload's settings as frozen dataclasses, and where it keeps what it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lesa.errors import LesaError
from lesa.predictor.spec import MAX_CHANNELS, MAX_HIDDEN, MAX_HISTORY, MAX_STEPS
from lesa.schedule import Schedule
from lesa.validation import setting

Report = Callable[[int, dict[str, float]], None]

MAX_SEED = 2**32  # far below what a generator takes, so that offsets and counts can be added


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParams:
    """Which pipeline."""

    family: str  # row of lesa.models.families
    source: str  # folder of a diffusers pipeline, or a hub id
    revision: str | None = None  # commit of a hub id; required there
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the pipeline while recording, training and judging


@dataclass(frozen=True, kw_only=True, slots=True)
class CallParams:
    """How the pipeline is called, everywhere."""

    height: int = setting(low=8)  # pixels
    width: int = setting(low=8)  # pixels
    num_frames: int | None = setting(None, low=1)  # video only
    num_inference_steps: int = setting(low=1, high=MAX_STEPS)
    guidance_scale: float | None = setting(None, low=0.0)  # distilled guidance; None where the model has none
    true_cfg_scale: float | None = setting(None, low=0.0)  # classifier-free guidance with two branches
    max_sequence_length: int | None = setting(None, low=1)  # text tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseParams:
    """Training of the workload's own model; absent where the model is given."""

    trainer: Literal[
        "flux-digits",
        "flux-photos",
        "qwen-digits",
        "hunyuan-moving-digits",
        "schnell-digits",
        "lightning-digits",
    ]  # row of lesa.base_models.DATA_SETS, or of its STUDENTS
    teacher: str | None = None  # folder of the pipeline that a student learns from
    steps: int = setting(low=1)  # optimiser steps of the transformer
    batch_size: int = setting(64, low=1)
    learning_rate: float = setting(1e-3, low=0.0)
    seed: int = setting(0, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetParams:
    """One schedule of the bundle: an interval, a list, or a number of full steps whose places are searched."""

    interval: int | None = setting(None, low=1)  # steps from one full step to the next
    full_steps: tuple[int, ...] | None = None  # explicit full steps
    num_full: int | None = setting(None, low=2)  # the search stage finds where they stand


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleParams:
    """Which steps are full."""

    budgets: dict[str, BudgetParams]
    default_budget: str
    warmup_steps: int = setting(3, low=0)  # W
    cooldown_steps: int = setting(0, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordParams:
    """What is recorded."""

    train_prompts: int = setting(low=1)  # first lines of train.txt
    validation_prompts: int = setting(low=1)  # first lines of validation.txt
    seeds_per_prompt: int = setting(1, low=1)
    seed_offset: int = setting(10_000, low=0, high=MAX_SEED)  # noise seeds start here; judging uses others
    step_counts: tuple[int, ...] = ()  # further numbers of steps, so that the bundle serves any between them
    step_count_prompts: int = setting(32, low=1)  # training prompts at each of these, a quarter for validation
    token_fraction: float = setting(1.0, low=0.001, high=1.0)  # random subset of tokens kept
    # Samples of a pipeline call. Worth it where one of them leaves the device idle, as a tiny model does.
    batch_size: int = setting(1, low=1)

    @property
    def step_count_validation_prompts(self) -> int:
        return max(2, self.step_count_prompts // 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchParams:
    """Where the full steps stand, for budgets that give only their number."""

    descents: int = setting(2, low=1)  # a budget: from the cheapest path and even steps in turn, best first
    evaluations: int = setting(30, low=1)  # true closed-loop runs a descent; what one leaves the next ones have
    samples: int = setting(32, low=1)  # training trajectories a run; those of other prompts are fitted
    max_gap: int = setting(16, low=2)  # steps between neighbouring full steps that are considered
    screened: int = setting(1, low=1)  # leading schedules trained to find the finalists; fewer than those: none
    screen_iterations: int = setting(5, low=1)  # optimiser steps of each through the sampler
    finalists: int = setting(1, low=1)  # schedules trained before one is taken; 1: the closed form decides
    finalist_iterations: int = setting(20, low=1)  # optimiser steps of each through the sampler


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorParams:
    """The experts: noise stages, projection of the history, KAN over time (LESA, arXiv 2602.20497)."""

    kind: Literal["lesa", "per_step"] = "lesa"  # experts alone, or with per-channel weights of each step's own
    step_history: int = setting(3, low=1, high=MAX_HISTORY)  # K of the step weights
    ridge: float = setting(1e-3, low=0.0)  # of least squares: pull of step weights to zero; bound of coordinates
    history: Literal["full_steps", "steps"] = "full_steps"  # the last K full steps, or steps with own predictions
    boundaries: tuple[float, ...] = (0.8, 0.4)  # noise levels between the stages, decreasing
    history_sizes: tuple[int, ...] = (3, 3, 3)  # K of each stage's expert
    projection: Literal["dense", "low_rank", "per_channel"] = "dense"
    rank: int = setting(32, low=1, high=MAX_CHANNELS)  # of the low-rank part
    gate: Literal["kan", "mlp", "table"] = "kan"  # what gives alpha from the time offsets
    hidden: int = setting(8, low=1, high=MAX_HIDDEN)  # width of the gate
    grid: int = setting(5, low=1, high=64)  # spline intervals of the KAN
    start: Literal["extrapolation", "random"] = "extrapolation"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundTruthParams:
    """Training on true histories."""

    loss: Literal["output", "feature", "normalised_feature"] = "output"
    iterations: int = setting(400, low=0)  # optimiser steps per expert
    batch_size: int = setting(16, low=1)  # trajectories a step
    learning_rate: float = setting(0.03, low=0.0)  # of the projection, in units of what its predictions lack
    gate_learning_rate: float = setting(1e-3, low=0.0)
    weight_decay: float = setting(1e-4, low=0.0)
    gradient_clip: float = setting(1.0, low=0.0)
    checkpoint_every: int = setting(100, low=1)  # optimiser steps


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedLoopParams:
    """Training on the accelerated sampler's own states."""

    gradient: Literal["through_sampler", "drifted_states"] = "through_sampler"
    loss: Literal["latents", "log_latents"] = "log_latents"  # squared error of the final latents, or its logarithm
    iterations: int = setting(100, low=0)
    batch_size: int = setting(16, low=1)
    learning_rate: float = setting(0.03, low=0.0)  # of the projection, in units of what its predictions lack
    gate_learning_rate: float = setting(1e-3, low=0.0)
    step_learning_rate: float = setting(1e-2, low=0.0)  # of step weights, in units of what they correct
    weight_decay: float = setting(0.0, low=0.0)
    gradient_clip: float = setting(1.0, low=0.0)
    gradient_checkpointing: bool = False  # recompute full steps in the backward pass: memory for time
    # Share of the full steps, drawn for each optimiser step, whose call of the transformer the gradient goes through;
    # the others' outputs are taken as constants, which saves their backward passes.
    model_gradient: float = setting(1.0, low=0.0, high=1.0)
    checkpoint_every: int = setting(10, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateParams:
    """Judging on held-out prompts and seeds."""

    prompts: int = setting(64, low=2)  # first lines of test.txt
    seeds_per_prompt: int = setting(2, low=1)
    seed_offset: int = setting(20_000, low=0, high=MAX_SEED)
    converged_fraction: float = setting(0.1, low=0.0, high=1.0)  # of the samples also compared to a converged run
    converged_steps: int = setting(1000, low=1)
    batch_size: int = setting(32, low=1)
    bootstrap: int = setting(2000, low=100)  # resamples
    wall_clock_repeats: int = setting(3, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishParams:
    """The gate and the registry."""

    gate_prompts: int = setting(64, low=2)  # test prompts of the gate's first look
    gate_max_samples: int = setting(2048, low=2, high=1 << 16)  # the most it draws while questions are open
    gate_seed_offset: int = setting(30_000, low=0, high=MAX_SEED)  # never the evaluation's seeds
    bound_samples: int = setting(256, low=0)  # training runs that error bounds rest on, beside all validation runs
    tail_tolerance_db: float = setting(0.5, low=0.0)  # how much lower the worst fifth may be, or another budget's mean


@dataclass(frozen=True, kw_only=True, slots=True)
class RecorderResources:
    """The machine's share of recording."""

    actors: int = setting(2, low=1)  # Ray actors where there is no GPU; one a GPU where there are
    threads_per_actor: int = setting(1, low=1)
    timeout_s: int = setting(600, low=1)  # per pipeline call; then the actor is replaced


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerResources:
    """The machine's share of a stage whose jobs run side by side."""

    workers: int = setting(1, low=1)  # jobs at once, each with a process and a pipeline of its own
    threads_per_worker: int = setting(1, low=1)  # of torch, in each of them; with one process too
    timeout_s: int = setting(21600, low=1)  # without a report of a job; then its process is replaced


_TWO_WORKERS = WorkerResources(workers=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesParams:
    """How much of the machine each stage takes: no dependency of any stage, since none of it is asked for a result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    record: RecorderResources = RecorderResources()
    search: WorkerResources = _TWO_WORKERS  # budgets side by side
    ground_truth: WorkerResources = _TWO_WORKERS  # experts side by side
    closed_loop: WorkerResources = _TWO_WORKERS  # budgets side by side
    evaluate: WorkerResources = WorkerResources()  # shares of the samples; times are then taken side by side
    publish: WorkerResources = WorkerResources()  # budgets calibrated and judged side by side


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One workload: a pipeline, its prompts, and all settings of its predictor."""

    name: str
    model: ModelParams
    call: CallParams
    prompts: str  # prompt set: folder under data/prompts
    schedule: ScheduleParams
    record: RecordParams
    search: SearchParams = SearchParams()
    predictor: PredictorParams = PredictorParams()
    ground_truth: GroundTruthParams = GroundTruthParams()
    closed_loop: ClosedLoopParams = ClosedLoopParams()
    evaluate: EvaluateParams = EvaluateParams()
    publish: PublishParams = PublishParams()
    base: BaseParams | None = None
    scorer: str | None = None  # folder of the scorer; without one the column is absent
    seed: int = setting(0, low=0)  # of training
    resources: ResourcesParams = ResourcesParams()

    @property
    def paths(self) -> Paths:
        return Paths(self)

    @property
    def recording(self) -> Recording:
        paths = self.paths
        return Recording(self.model, self.call, self.record, prompts=paths.prompts, trajectories=paths.trajectories)

    def budgets(self) -> dict[str, Schedule]:
        """The schedule of every budget.

        Raises:
            ValueError: naming the budgets that are still to be searched.
        """
        return budget_schedules(self.schedule, self.call.num_inference_steps)


@dataclass(frozen=True, slots=True)
class Recording:
    """What of a workload decides its trajectories, and where its prompts and its store lie."""

    model: ModelParams
    call: CallParams
    record: RecordParams
    prompts: Path
    trajectories: Path

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Every number of steps that is recorded, the call's own first."""
        return (self.call.num_inference_steps, *self.record.step_counts)

    def num_recorded(self, num_steps: int) -> dict[str, int]:
        """How many prompts of each split are recorded at a number of steps."""
        record = self.record
        if num_steps == self.call.num_inference_steps:
            return {"train": record.train_prompts, "validation": record.validation_prompts}
        return {"train": record.step_count_prompts, "validation": record.step_count_validation_prompts}


def budget_schedules(rule: ScheduleParams, num_steps: int) -> dict[str, Schedule]:
    """The schedule of every budget for runs of `num_steps`; `ValueError` where one is still to be searched."""
    if open_ones := searched_budgets(rule):
        raise LesaError(f"schedule.budgets: {', '.join(open_ones)} are still to be searched: run the search stage")
    return {
        name: Schedule.explicit(num_steps, budget.full_steps)
        if budget.full_steps is not None
        else Schedule.uniform(num_steps, budget.interval or 1, rule.warmup_steps, rule.cooldown_steps)
        for name, budget in rule.budgets.items()
    }


def searched_budgets(rule: ScheduleParams) -> dict[str, int]:
    """Budgets whose full steps are still to be found, and how many each has."""
    return {name: budget.num_full for name, budget in rule.budgets.items() if budget.num_full is not None}


@dataclass(frozen=True)
class Paths:
    """Where a workload keeps what it makes, relative to the repository root."""

    workload: Workload

    @property
    def prompts(self) -> Path:
        return Path("data/prompts") / self.workload.prompts

    @property
    def base(self) -> Path:
        return Path("data/base") / self.workload.name

    @property
    def scorer(self) -> Path:
        return Path("data/scorers") / self.workload.name

    @property
    def trajectories(self) -> Path:
        return Path("data/trajectories") / f"{self.workload.name}.zarr"

    @property
    def schedules(self) -> Path:
        return Path("data/schedules") / f"{self.workload.name}.json"

    @property
    def ground_truth(self) -> Path:
        return Path("data/checkpoints") / self.workload.name / "ground_truth"

    @property
    def closed_loop(self) -> Path:
        return Path("data/checkpoints") / self.workload.name / "closed_loop"

    @property
    def bundle(self) -> Path:
        return Path("data/bundles") / self.workload.name

    @property
    def report(self) -> Path:
        return Path("data/reports") / self.workload.name
