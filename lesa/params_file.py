"""params.yaml -> a `Workload`: how the file is read, and every rule between settings, all problems at once."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lesa.errors import LesaError
from lesa.models.families import FAMILIES
from lesa.params import (
    BaseParams,
    CallParams,
    ClosedLoopParams,
    EvaluateParams,
    ModelParams,
    PredictorParams,
    PublishParams,
    RecordParams,
    ScheduleParams,
    SearchParams,
    Workload,
    budget_schedules,
    searched_budgets,
)
from lesa.predictor.spec import MAX_HISTORY, MAX_STAGES, MAX_STEPS, MAX_VARIANTS, MIXED, leading_steps
from lesa.schedule import MIN_CARRIED, Schedule, boundary_problems, history_problems, longest_run
from lesa.validation import NAME, build

MERGE = "<<"  # takes a preset's section: `search: {<<: *small-search, samples: 16}`
_TEXT_TAG, _MERGE_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_SIDE_BY_SIDE = ("search", "ground_truth", "closed_loop", "evaluate", "publish")
MOVED = {  # keys of a workload that stood elsewhere before 0.2
    "device": "resources.device",
    **{f"record.{key}": f"resources.record.{key}" for key in ("actors", "threads_per_actor", "timeout_s")},
    **{f"{stage}.workers": f"resources.{stage}.workers" for stage in _SIDE_BY_SIDE},
    **{f"{stage}.threads_per_worker": f"resources.{stage}.threads_per_worker" for stage in _SIDE_BY_SIDE},
}
COMMIT = re.compile(r"[0-9a-f]{40}")  # of a hub repository
STUDENTS = ("schnell-digits", "lightning-digits")  # trainers that need a teacher


class ParamsError(LesaError):
    """Every problem of a parameter file in one message."""

    def __init__(self, path: object, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{path}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


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
    for key in sorted(set(data) - {"workloads", "default_workload", "presets"}):
        problems.append(f"{key}: unknown section; known are default_workload, presets and workloads")
    problems += _preset_problems(data.get("presets", {}))
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
        if moved := [name for name in MOVED if isinstance(section, dict) and _has(section, name)]:
            problems += [f"{where}.{name}: stands in {where}.{MOVED[name]} now" for name in moved]
            problems.append(f"{where}: `lesa migrate {path}` moves {'it' if len(moved) == 1 else 'them'}")
            continue
        built = build(Workload, {"name": key, **section} if isinstance(section, dict) else section, where, problems)
        if isinstance(section, dict):
            problems += [f"{where}.{problem}" for problem in _cross_field(built or _sound_sections(section))]
        if key == name:
            parsed = built
    if problems:
        raise ParamsError(path, problems)
    return typing.cast(Workload, parsed)


def _has(section: Any, path: str) -> bool:
    """Whether a dotted key stands in a section."""
    head, _, rest = path.partition(".")
    return isinstance(section, dict) and head in section and (not rest or _has(section[head], rest))


def _preset_problems(presets: Any) -> list[str]:
    """What is wrong in presets, used or not; they may leave out what every workload sets itself."""
    if not isinstance(presets, dict):
        return ["presets: must be a mapping of presets"]
    hints = typing.get_type_hints(Workload)
    problems: list[str] = []
    for name, sections in presets.items():
        for section, values in sections.items() if isinstance(sections, dict) else ():
            where = f"presets.{name}.{section}"
            if dataclasses.is_dataclass(hints.get(section)):
                build(hints[section], values, where, problems)
            else:
                problems.append(f"{where}: not a section of a workload")
        if not isinstance(sections, dict):
            problems.append(f"presets.{name}: must be a mapping of sections")
    return [problem for problem in problems if not problem.endswith(": missing")]


def _sound_sections(section: dict[str, Any]) -> Any:
    """The parts of a faulty workload that are right in themselves; None stands for the others."""
    hints = typing.get_type_hints(Workload)
    parts: dict[str, Any] = {}
    for spec in dataclasses.fields(Workload):
        unused: list[str] = []
        if spec.name in section:
            built = build(hints[spec.name], section[spec.name], spec.name, unused)
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
        if longest_run(count, search.max_gap, leading_steps(predictor.kind)) < call.num_inference_steps:
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
    """A YAML mapping, safely: no tags, no duplicate keys, no alias but one under `<<` in a section.

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
    """SafeLoader that refuses tags, duplicate keys and aliases, one under `<<` excepted: that cannot grow a file.

    A whole workload is not taken by `<<`: what `dvc exp run -S` sets in a section of it would be lost without a word.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            if getattr(index, "value", None) != MERGE:
                raise yaml.YAMLError(f"aliases are refused, line {line}: only a preset's under `<<` in a section")
        elif getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags are refused ({event.tag}), line {line}")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (_TEXT_TAG, _MERGE_TAG):
                raise yaml.YAMLError(f"keys must be text, got {key.value!r}, line {line}")
            if key.value in seen:
                raise yaml.YAMLError(f"duplicate key {key.value!r}, line {line}")
            seen.add(key.value)
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        for name, workloads in _entries(node):
            for workload, section in _entries(workloads) if name.value == "workloads" else ():
                for key, _ in _entries(section):
                    if key.tag == _MERGE_TAG:
                        raise yaml.YAMLError(
                            f"workloads.{workload.value} takes a whole workload by `<<`, line "
                            f"{key.start_mark.line + 1}: give every section a `<<` of its own"
                        )
        return node


def _entries(node: Any) -> list[tuple[Any, Any]]:
    """Key and value of each entry of a mapping; nothing of any other node."""
    return node.value if isinstance(node, yaml.MappingNode) else []
