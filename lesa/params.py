"""params.yaml -> frozen, validated settings: the only place that knows ranges and cross-field rules."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lesa.families import FAMILIES
from lesa.predictor import MAX_CHANNELS, MAX_HIDDEN, MAX_HISTORY, MAX_STAGES, MAX_STEPS, MAX_VARIANTS, MIXED
from lesa.schedule import MIN_CARRIED, Schedule, history_problems
from lesa.stages import boundary_problems

MAX_SEED = 2**32  # far below what a generator takes, so that offsets and counts can be added
COMMIT = re.compile(r"[0-9a-f]{40}")  # of a hub repository
STUDENTS = ("schnell-digits", "lightning-digits")  # trainers that need a teacher
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")  # workloads, prompt sets, budgets


class ParamsError(ValueError):
    """Every problem of a parameter file in one message."""

    def __init__(self, path: object, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{path}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


def setting(default: Any = dataclasses.MISSING, *, low: Any = None, high: Any = None) -> Any:
    """A dataclass field with an inclusive range."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParams:
    """Which pipeline."""

    family: str  # row of lesa.families
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
    ]  # row of lesa.reference.DATA_SETS, or of its STUDENTS
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
    """What is recorded and with how much of the machine."""

    train_prompts: int = setting(low=1)  # first lines of train.txt
    validation_prompts: int = setting(low=1)  # first lines of validation.txt
    seeds_per_prompt: int = setting(1, low=1)
    seed_offset: int = setting(10_000, low=0, high=MAX_SEED)  # noise seeds start here; judging uses others
    step_counts: tuple[int, ...] = ()  # further numbers of steps, so that the bundle serves any between them
    step_count_prompts: int = setting(32, low=1)  # training prompts at each of these, a quarter for validation
    token_fraction: float = setting(1.0, low=0.001, high=1.0)  # random subset of tokens kept
    # Samples of a pipeline call. Worth it where one of them leaves the device idle, as a tiny model does.
    batch_size: int = setting(1, low=1)
    actors: int = setting(2, low=1)  # Ray actors where there is no GPU; one a GPU where there are
    threads_per_actor: int = setting(1, low=1)
    timeout_s: int = setting(600, low=1)  # per pipeline call; then the actor is replaced

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
    workers: int = setting(2, low=1)  # budgets searched side by side
    threads_per_worker: int = setting(1, low=1)


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
    workers: int = setting(2, low=1)  # experts trained side by side
    threads_per_worker: int = setting(1, low=1)


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
    checkpoint_every: int = setting(10, low=1)
    workers: int = setting(2, low=1)  # budgets trained side by side
    threads_per_worker: int = setting(1, low=1)


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
    workers: int = setting(1, low=1)  # processes that share the samples; times are then taken side by side
    threads_per_worker: int = setting(1, low=1)  # of torch, in each of them; with one process too


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishParams:
    """The gate and the registry."""

    gate_prompts: int = setting(64, low=2)  # test prompts the gate measures
    gate_seed_offset: int = setting(30_000, low=0, high=MAX_SEED)  # never the evaluation's seeds
    bound_samples: int = setting(256, low=0)  # training runs that error bounds rest on, beside all validation runs
    tail_tolerance_db: float = setting(0.5, low=0.0)  # how much lower the 5th percentile may be at any budget
    workers: int = setting(1, low=1)  # budgets calibrated and judged side by side, each process with a pipeline
    threads_per_worker: int = setting(1, low=1)


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
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def paths(self) -> Paths:
        return Paths(self)

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

    def budgets(self) -> dict[str, Schedule]:
        """The schedule of every budget.

        Raises:
            ValueError: naming the budgets that are still to be searched.
        """
        return budget_schedules(self.schedule, self.call.num_inference_steps)


def budget_schedules(rule: ScheduleParams, num_steps: int) -> dict[str, Schedule]:
    """The schedule of every budget for runs of `num_steps`; `ValueError` where one is still to be searched."""
    if open_ones := searched_budgets(rule):
        raise ValueError(f"schedule.budgets: {', '.join(open_ones)} are still to be searched: run the search stage")
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


def load_params(path: str | Path = "params.yaml", workload: str | None = None) -> Workload:
    """Read and check one workload of a parameter file.

    Args:
        path: the file.
        workload: section under `workloads`; None takes the file's `default_workload`.

    Raises:
        ParamsError: listing every unknown key, wrong type, range and impossible combination by its dotted path.
    """
    data = read_yaml(path)
    problems: list[str] = []
    for key in sorted(set(data) - {"workloads", "default_workload"}):
        problems.append(f"{key}: unknown section; known are default_workload and workloads")
    workloads = data.get("workloads")
    if not isinstance(workloads, dict) or not workloads:
        raise ParamsError(path, [*problems, "workloads: must be a mapping with at least one workload"])
    name = data.get("default_workload") if workload is None else workload
    if not isinstance(name, str) or name not in workloads:
        known = sorted(map(str, workloads))
        raise ParamsError(path, [*problems, f"workload {name!r} is not in the file; known: {known}"])
    parsed = None
    for key, section in workloads.items():
        where = f"workloads.{key}"
        if not isinstance(key, str) or not NAME.fullmatch(key):
            problems.append(f"{where}: a name is lower-case letters, digits, '.', '_' and '-', at most 64")
            continue
        if isinstance(section, dict) and "name" in section:
            problems.append(f"{where}.name: unknown key; the name is the section's")
            continue
        built = _build(Workload, {"name": key, **section} if isinstance(section, dict) else section, where, problems)
        if isinstance(section, dict):
            problems += [f"{where}.{problem}" for problem in _cross_field(built or _sound_sections(section))]
        if key == name:
            parsed = built
    if problems:
        raise ParamsError(path, problems)
    return typing.cast(Workload, parsed)


def _sound_sections(section: dict[str, Any]) -> Any:
    """The parts of a faulty workload that are right in themselves; None stands for the others."""
    hints = typing.get_type_hints(Workload)
    parts: dict[str, Any] = {}
    for spec in dataclasses.fields(Workload):
        unused: list[str] = []
        if spec.name in section:
            built = _build(hints[spec.name], section[spec.name], spec.name, unused)
            parts[spec.name] = None if unused else built
        else:
            parts[spec.name] = None if spec.default is dataclasses.MISSING else spec.default
    return types.SimpleNamespace(**parts)


def _cross_field(workload: Any) -> list[str]:
    """Combinations that no single field shows, of a workload or of what is sound in one."""
    problems: list[str] = []
    for sections, rule in _RULES:
        if all(getattr(workload, name) is not None for name in sections):
            problems += rule(*(getattr(workload, name) for name in sections))
    return problems


def _model_problems(model: ModelParams) -> list[str]:
    problems = []
    if model.family not in FAMILIES:
        problems.append(f"model.family: {model.family!r} is not one of {sorted(FAMILIES)}")
    is_hub = not model.source.startswith(("data/", "/", "./", "../"))
    if is_hub and model.revision is None:
        problems.append("model.revision: required for a hub id, so that the weights cannot change underneath")
    elif is_hub and not COMMIT.fullmatch(model.revision or ""):
        problems.append(
            f"model.revision: {model.revision!r} is not a commit (40 hexadecimal digits): branches and tags move; take "
            f"one from the history of https://huggingface.co/{model.source}, whose licence you have read"
        )
    return problems


def _base_problems(base: BaseParams) -> list[str]:
    if base.trainer in STUDENTS and base.teacher is None:
        return [f"base.teacher: required, the folder of the pipeline that {base.trainer} learns from"]
    if base.trainer not in STUDENTS and base.teacher is not None:
        return [f"base.teacher: {base.trainer} is trained without one; leave it out"]
    return []


def _prompts_problems(prompts: str) -> list[str]:
    if NAME.fullmatch(prompts):
        return []
    return [f"prompts: {prompts!r} is not a name of a folder under data/prompts"]


def _budget_problems(rule: ScheduleParams) -> list[str]:
    problems = []
    if rule.default_budget not in rule.budgets:
        problems.append(f"schedule.default_budget: {rule.default_budget!r} is not one of {sorted(rule.budgets)}")
    if len(rule.budgets) > MAX_VARIANTS:
        problems.append(f"schedule.budgets: {len(rule.budgets)}, at most {MAX_VARIANTS}")
    for name, budget in rule.budgets.items():
        where = f"schedule.budgets.{name}"
        if not NAME.fullmatch(name):
            problems.append(f"{where}: not a name")
        if sum(value is not None for value in (budget.interval, budget.full_steps, budget.num_full)) != 1:
            problems.append(f"{where}: give one of interval, full_steps and num_full")
    return problems


def _step_problems(rule: ScheduleParams, call: CallParams) -> list[str]:
    problems, steps = [], call.num_inference_steps
    for name, budget in rule.budgets.items():
        where = f"schedule.budgets.{name}"
        if budget.interval is not None and steps > 1 and budget.interval >= steps:
            problems.append(f"{where}.interval: {budget.interval} must be below call.num_inference_steps {steps}")
        if budget.num_full is not None and budget.num_full > steps:
            problems.append(f"{where}.num_full: {budget.num_full} must be at most call.num_inference_steps {steps}")
        if budget.full_steps is not None:
            try:
                Schedule.explicit(steps, budget.full_steps)
            except ValueError as error:
                problems.append(f"{where}.full_steps: {error}")
    return problems


def _search_problems(
    rule: ScheduleParams, call: CallParams, record: RecordParams, predictor: PredictorParams, search: SearchParams
) -> list[str]:
    problems = []
    searched = searched_budgets(rule)
    for name, count in searched.items():
        if 1 + count * search.max_gap <= call.num_inference_steps:
            problems.append(
                f"search.max_gap: {search.max_gap} leaves steps out of reach of budget {name} ({count} full steps of "
                f"{call.num_inference_steps})"
            )
        if predictor.kind == "lesa" and any(size > count for size in predictor.history_sizes):
            problems.append(f"schedule.budgets.{name}.num_full: {count} is less history than predictor.history_sizes")
    most = (record.train_prompts - 1) * record.seeds_per_prompt
    if searched and search.samples > most:
        problems.append(
            f"search.samples: {search.samples} must be at most {most}: it is run on other training prompts than are "
            f"fitted, and record has {record.train_prompts} of them with {record.seeds_per_prompt} noise seeds each"
        )
    return problems


def _finalist_problems(search: SearchParams, loop: ClosedLoopParams) -> list[str]:
    if search.finalists == 1 < search.screened:
        return [f"search.screened: {search.screened} would be screened for 1 finalist: use 1, or more search.finalists"]
    if search.finalists == 1 or (loop.iterations and loop.gradient == "through_sampler"):
        return []
    return [
        f"search.finalists: {search.finalists} would be trained through the sampler, but closed_loop "
        f"({'no iterations' if not loop.iterations else loop.gradient}) does not train so: use 1"
    ]


def _predictor_problems(predictor: PredictorParams) -> list[str]:
    problems = []
    problems += [f"predictor.{problem}" for problem in boundary_problems(predictor.boundaries)]
    if len(predictor.history_sizes) != len(predictor.boundaries) + 1:
        problems.append(
            f"predictor.history_sizes: {len(predictor.boundaries)} boundaries make "
            f"{len(predictor.boundaries) + 1} stages, got {len(predictor.history_sizes)} sizes"
        )
    if len(predictor.history_sizes) > MAX_STAGES:
        problems.append(f"predictor.history_sizes: {len(predictor.history_sizes)} stages, at most {MAX_STAGES}")
    if any(not 1 <= size <= MAX_HISTORY for size in predictor.history_sizes):
        problems.append(
            f"predictor.history_sizes: each must be from 1 to {MAX_HISTORY}, got {list(predictor.history_sizes)}"
        )
    if predictor.start == "extrapolation" and any(size < 2 for size in predictor.history_sizes):
        problems.append("predictor.start: extrapolation needs history_sizes of at least 2; use random or more history")
    return problems


def _window_problems(rule: ScheduleParams, call: CallParams, predictor: PredictorParams) -> list[str]:
    """Windows that are impossible wherever the noise stages lie; the noise levels, known later, may forbid more."""
    if predictor.kind == "per_step":
        return []  # its early steps use what history there is
    if _budget_problems(rule) or _step_problems(rule, call) or _predictor_problems(predictor):
        return []
    problems, size = [], min(predictor.history_sizes)
    fixed = {name: budget for name, budget in rule.budgets.items() if budget.num_full is None}
    known = dataclasses.replace(rule, budgets=fixed)  # a search takes no schedule that the windows do not allow
    for name, schedule in budget_schedules(known, call.num_inference_steps).items():
        anywhere = [0] * schedule.num_steps
        found = history_problems(schedule, [size], anywhere, predictor.history)
        problems += [f"schedule.budgets.{name}: {p.replace(' of noise stage 0', '')}" for p in found]
    return problems


def _step_count_problems(
    record: RecordParams, call: CallParams, schedule: ScheduleParams, predictor: PredictorParams
) -> list[str]:
    counts, problems = record.step_counts, []
    if not counts:
        return []
    where = "record.step_counts"
    # Three full steps and one to predict.
    if outside := [count for count in counts if not MIN_CARRIED < count <= MAX_STEPS]:
        problems.append(f"{where}: each must be from {MIN_CARRIED + 1} to {MAX_STEPS}, got {outside}")
    if len(set(counts)) != len(counts):
        problems.append(f"{where}: {list(counts)} has a number twice")
    if call.num_inference_steps in counts:
        problems.append(f"{where}: {call.num_inference_steps} is call.num_inference_steps: list the others only")
    for key, count, available in (
        ("train_prompts", record.step_count_prompts, record.train_prompts),
        ("validation_prompts", record.step_count_validation_prompts, record.validation_prompts),
    ):
        if count > available:
            problems.append(
                f"record.step_count_prompts: {record.step_count_prompts} makes {count} of record.{key}, "
                f"which is {available}"
            )
    if predictor.gate == "table":
        problems.append(f"{where}: predictor.gate table knows no other number of steps; use kan or mlp")
    if MIXED in schedule.budgets:
        problems.append(f"schedule.budgets.{MIXED}: the name is that of the experts for {where}")
    return problems


def _batch_problems(model: ModelParams, record: RecordParams) -> list[str]:
    if record.batch_size > 1 and model.family in FAMILIES and FAMILIES[model.family].pads_to_longest:
        return [
            f"record.batch_size: {record.batch_size} would make a trajectory depend on its neighbours, since family "
            f"{model.family} pads a call's prompts to the longest of them: use 1"
        ]
    return []


def _drift_problems(record: RecordParams, closed_loop: ClosedLoopParams) -> list[str]:
    if closed_loop.gradient == "drifted_states" and record.token_fraction < 1.0:
        return ["closed_loop.gradient: drifted_states needs every token, and record.token_fraction is below 1.0"]
    return []


def _seed_problems(record: RecordParams, evaluate: EvaluateParams, publish: PublishParams) -> list[str]:
    problems = []
    seeds = {
        "record.seed_offset": record.seed_offset,
        "evaluate.seed_offset": evaluate.seed_offset,
        "publish.gate_seed_offset": publish.gate_seed_offset,
    }
    spans = {
        # Even numbers for training, odd ones for validation; other numbers of steps start from the same noise.
        "record.seed_offset": 2 * max(record.train_prompts, record.validation_prompts) * record.seeds_per_prompt,
        "evaluate.seed_offset": evaluate.prompts * evaluate.seeds_per_prompt,
        "publish.gate_seed_offset": publish.gate_prompts * 8,
    }
    names = list(seeds)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            if seeds[first] < seeds[second] + spans[second] and seeds[second] < seeds[first] + spans[first]:
                problems.append(f"{first} {seeds[first]} and {second} {seeds[second]}: their noise seeds overlap")
    return problems


_RULES: tuple[tuple[tuple[str, ...], Callable[..., list[str]]], ...] = (
    (("model",), _model_problems),
    (("base",), _base_problems),
    (("prompts",), _prompts_problems),
    (("schedule",), _budget_problems),
    (("schedule", "call"), _step_problems),
    (("predictor",), _predictor_problems),
    (("schedule", "call", "predictor"), _window_problems),
    (("search", "closed_loop"), _finalist_problems),
    (("schedule", "call", "record", "predictor", "search"), _search_problems),
    (("record", "call", "schedule", "predictor"), _step_count_problems),
    (("model", "record"), _batch_problems),
    (("record", "closed_loop"), _drift_problems),
    (("record", "evaluate", "publish"), _seed_problems),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping, safely: no tags, no aliases, no duplicate keys.

    Raises:
        ParamsError: naming the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(path, ["the file does not exist; run from the repository root or name it"]) from None
    except UnicodeDecodeError as error:
        raise ParamsError(path, [f"not UTF-8 (byte {error.start})"]) from None
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader with fewer freedoms
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number of no meaning
        raise ParamsError(path, [" ".join(f"not YAML that can be read: {error}".split())]) from None
    if not isinstance(data, dict):
        raise ParamsError(path, ["must be a mapping"])
    return data


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases, tags and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"aliases are refused, line {event.start_mark.line + 1}")
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags are refused ({event.tag}), line {event.start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"keys must be text, got {key!r}, line {key_node.start_mark.line + 1}")
            if key in seen:
                raise yaml.YAMLError(f"duplicate key {key!r}, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _build(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Convert a plain value to an annotated type, appending what is wrong to `problems`."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, where, problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value, where, problems)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            problems.append(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{where}: must be a list, got {_describe(value)}")
            return ()
        return tuple(_build(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not value:
            problems.append(f"{where}: must be a mapping with at least one entry, got {_describe(value)}")
            return {}
        return {str(key): _build(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        hint = " (write 1.0e-3: YAML reads 1e-3 as text)" if kind is float and isinstance(value, str) else ""
        problems.append(f"{where}: must be {kind.__name__}, got {_describe(value)}{hint}")
    elif kind is float and (value != value or value in (float("inf"), float("-inf"))):
        problems.append(f"{where}: must be finite, got {value}")
    return value


def _build_dataclass(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where}: must be a mapping, got {_describe(value)}")
        return None
    hints, before = typing.get_type_hints(kind), len(problems)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = [name for name in fields if name.startswith(str(key)[:4])]
            hint = f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(fields)}"
            problems.append(f"{where}.{key}: unknown key{hint}")
    arguments = {}
    for name, spec in fields.items():
        if name not in value:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                problems.append(f"{where}.{name}: missing")
            continue
        mark = len(problems)
        arguments[name] = built = _build(hints[name], value[name], f"{where}.{name}", problems)
        low, high = spec.metadata.get("low"), spec.metadata.get("high")
        if len(problems) == mark and built is not None:
            if low is not None and built < low:
                problems.append(f"{where}.{name}: must be at least {low}, got {built}")
            if high is not None and built > high:
                problems.append(f"{where}.{name}: must be at most {high}, got {built}")
    return kind(**arguments) if len(problems) == before else None


def _describe(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
