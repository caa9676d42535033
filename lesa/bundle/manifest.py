"""What a bundle says of itself: which model, scheduler and call its predictor fits, and how good it measured.

Names in a manifest are compared with what is there and never imported, opened or joined to a path.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lesa.errors import LesaError
from lesa.models.families import FAMILIES
from lesa.params import CallParams
from lesa.predictor.spec import PredictorSpec
from lesa.schedule import Schedule

SCHEMA = 4  # 2: variants name their full steps; weights of each step. 3: a range of steps. 4: error bounds
READ = (3, SCHEMA)  # a bundle of schema 3 serves as before, and cannot be adaptive
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")  # workloads and budgets
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]{64}")
WEIGHTS = "weights.safetensors"
MAX_WEIGHTS = 8 << 30  # bytes

_KEYS = (
    "schema",
    "workload",
    "created_from",
    "model",
    "scheduler",
    "tap",
    "channels",
    "branches",
    "call",
    "num_inference_steps",
    "step_range",
    "sigmas",
    "budgets",
    "default_budget",
    "predictor",
    "training",
    "evaluation",
    "files",
    "license",
    "base_license",
)
_MODEL = (
    "family",
    "pipeline_class",
    "transformer_class",
    "fingerprint",
    "source",
    "revision",
    "dtype",
)


class BundleError(LesaError):
    """Why a bundle was refused: every problem, one a line."""

    def __init__(self, where: object, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{where}: not a usable bundle\n" + "\n".join(f"  - {p}" for p in problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One schedule of a bundle and what was measured with it."""

    schedule: Schedule
    interval: int | None  # None for an explicit list of full steps
    quality: Mapping[str, Any]  # psnr_mean, psnr_p5, ... in dB
    error_bounds: tuple[float | None, ...]  # relative L1, of each full step; None where none was calibrated

    @property
    def bounds(self) -> dict[int, float]:
        """Full step -> its error bound."""
        pairs = zip(self.schedule.full_steps, self.error_bounds, strict=True)
        return {step: bound for step, bound in pairs if bound is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checked manifest; `data` is the document itself."""

    workload: str
    family: str
    pipeline_class: str
    transformer_class: str
    fingerprint: str
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    channels: int
    branches: tuple[str, ...]
    call: CallParams
    step_range: tuple[int, int]  # lowest and highest number of steps that the predictor was trained on
    sigmas: tuple[float, ...]  # [S + 1]
    budgets: Mapping[str, Budget]
    default_budget: str
    predictor: PredictorSpec
    weights_bytes: int
    weights_sha256: str
    data: Mapping[str, Any]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: object = "manifest") -> Manifest:
        """A checked manifest.

        Raises:
            BundleError: every problem.
        """
        schema = data.get("schema")
        if schema not in READ or not _is_int(schema):
            newer = isinstance(schema, int) and schema > SCHEMA
            remedy = "update lesa to read it" if newer else "make the bundle again"
            known = " and ".join(map(str, READ))
            raise BundleError(where, [f"schema: got {schema!r}, this version reads {known}: {remedy}"])
        reader = _Reader(data)
        reader.keys("", data, _KEYS)
        fields = _read(reader)
        if reader.problems:
            raise BundleError(where, reader.problems)
        return cls(data=data, **fields)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)


class _Reader:
    """Takes values out of a document and collects what is wrong with them."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.problems: list[str] = []

    def keys(self, where: str, data: Mapping[str, Any], expected: tuple[str, ...]) -> None:
        prefix = f"{where}." if where else ""
        self.problems += [f"{prefix}{key}: missing" for key in expected if key not in data]
        self.problems += [f"{prefix}{key}: unknown key" for key in data if key not in expected]

    def value(self, path: str, accept: Callable[[Any], bool], what: str) -> Any:
        """The value at a dotted path, or None and a problem where it is not acceptable."""
        value: Any = self.data
        for part in path.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None  # reported as missing where the keys are checked
            value = value[part]
        if not accept(value):
            self.problems.append(f"{path}: must be {what}, got {str(value)[:60]!r}")
            return None
        return value

    def mapping(self, path: str) -> Mapping[str, Any]:
        return self.value(path, lambda value: isinstance(value, Mapping), "an object") or {}

    def matching(self, path: str, pattern: re.Pattern[str], what: str) -> str:
        found = self.value(path, lambda v: isinstance(v, str) and bool(pattern.fullmatch(v)), what)
        return found or ""

    def integer(self, path: str, low: int, high: int) -> int:
        def accept(value: Any) -> bool:
            return _is_int(value) and low <= value <= high

        return self.value(path, accept, f"an integer from {low} to {high}") or 0


def _read(reader: _Reader) -> dict[str, Any]:
    """Constructor arguments of a manifest; what is wrong ends up in `reader.problems`."""
    model = reader.mapping("model")
    reader.keys("model", model, _MODEL)
    scheduler = reader.mapping("scheduler")
    reader.keys("scheduler", scheduler, ("class", "config"))
    for section in ("created_from", "training", "evaluation"):
        reader.mapping(section)
    for text in ("tap", "license", "base_license"):
        reader.value(text, lambda value: value is None or isinstance(value, str), "text or null")
    for text in ("source", "revision", "dtype"):
        reader.value(f"model.{text}", lambda value: value is None or isinstance(value, str), "text or null")
    steps = reader.integer("num_inference_steps", 1, 10_000)
    result = {
        "workload": reader.matching("workload", NAME, "a name of a-z, 0-9, '.', '_' and '-'"),
        "family": reader.value("model.family", lambda value: value in FAMILIES, f"one of {sorted(FAMILIES)}"),
        "pipeline_class": reader.matching("model.pipeline_class", _CLASS, "a class name"),
        "transformer_class": reader.matching("model.transformer_class", _CLASS, "a class name"),
        "fingerprint": reader.matching("model.fingerprint", _SHA256, "sha256: and 64 hexadecimal digits"),
        "scheduler_class": reader.matching("scheduler.class", _CLASS, "a class name"),
        "scheduler_config": reader.mapping("scheduler.config"),
        "channels": reader.integer("channels", 1, 1 << 16),
        "branches": tuple(reader.value("branches", _are_branches, "a list of one to four names") or ()),
        "call": _call(reader, steps),
        "step_range": tuple(reader.value("step_range", _is_range, "two numbers of steps, the lowest first") or ()),
        "sigmas": _sigmas(reader, steps),
        "budgets": _budgets(reader, steps),
        "default_budget": reader.matching("default_budget", NAME, "the name of a budget"),
        "predictor": _predictor(reader),
    }
    if result["default_budget"] and result["default_budget"] not in result["budgets"]:
        known = ", ".join(result["budgets"]) or "none"
        reader.problems.append(f"default_budget: {result['default_budget']!r} is not one of {known}")
    spec = result["predictor"]
    if spec is not None and spec.channels != result["channels"]:
        reader.problems.append(f"predictor.channels: got {spec.channels}, channels says {result['channels']}")
    if spec is not None and spec.num_steps != steps:
        reader.problems.append(f"predictor.num_steps: got {spec.num_steps}, num_inference_steps says {steps}")
    if spec is not None and result["step_range"] and spec.step_range != result["step_range"]:
        reader.problems.append(
            f"step_range: got {list(result['step_range'])}, the predictor was trained on {list(spec.step_range)}"
        )
    files = reader.mapping("files")
    reader.keys("files", files, (WEIGHTS,))
    entry = files.get(WEIGHTS)
    if entry is not None:
        entry = entry if isinstance(entry, Mapping) else {}
        reader.keys(f"files.{WEIGHTS}", entry, ("bytes", "sha256"))
        if not (_is_int(entry.get("bytes")) and 0 < entry["bytes"] <= MAX_WEIGHTS):
            reader.problems.append(f"files.{WEIGHTS}.bytes: must be an integer from 1 to {MAX_WEIGHTS}")
        if not (isinstance(entry.get("sha256"), str) and _HEX.fullmatch(entry["sha256"])):
            reader.problems.append(f"files.{WEIGHTS}.sha256: must be 64 hexadecimal digits")
        result |= {"weights_bytes": entry.get("bytes"), "weights_sha256": entry.get("sha256")}
    return result


def _call(reader: _Reader, steps: int) -> CallParams | None:
    call = reader.mapping("call")
    fields = dataclasses.fields(CallParams)
    reader.keys("call", call, tuple(field.name for field in fields))
    good: dict[str, Any] = {}
    for field in fields:
        value: Any = call.get(field.name)
        is_count = field.name not in ("guidance_scale", "true_cfg_scale")
        if value is None and "None" in str(field.type):
            good[field.name] = None
        elif _is_int(value) and value >= 1 if is_count else _is_number(value) and value >= 0:
            good[field.name] = value if is_count else float(value)
        elif field.name in call:
            reader.problems.append(f"call.{field.name}: out of range, got {str(value)[:60]!r}")
    if len(good) != len(fields):
        return None
    if good["num_inference_steps"] != steps:
        reader.problems.append(
            f"call.num_inference_steps: got {good['num_inference_steps']}, num_inference_steps says {steps}"
        )
    return CallParams(**good)


def _sigmas(reader: _Reader, steps: int) -> tuple[float, ...]:
    def accept(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == steps + 1
            and all(_is_number(sigma) for sigma in value)
            and all(later < earlier for earlier, later in pairwise(value))
            and value[-1] >= 0
        )

    found = reader.value("sigmas", accept, f"{steps + 1} decreasing noise levels, none below zero")
    return tuple(float(sigma) for sigma in found or ())


def _budgets(reader: _Reader, steps: int) -> dict[str, Budget]:
    result = {}
    budgets = reader.mapping("budgets")
    if not 1 <= len(budgets) <= 64:
        reader.problems.append(f"budgets: must be from 1 to 64, got {len(budgets)}")
    for name, entry in budgets.items():
        where = f"budgets.{name[:70]}"
        if not NAME.fullmatch(name):
            reader.problems.append(f"{where}: not a name of a-z, 0-9, '.', '_' and '-'")
            continue
        if not isinstance(entry, Mapping):
            reader.problems.append(f"{where}: must be an object")
            continue
        has_bounds = ("error_bounds",) if reader.data["schema"] > 3 else ()
        reader.keys(where, entry, ("full_steps", "interval", "quality", *has_bounds))
        full_steps, interval = entry.get("full_steps"), entry.get("interval")
        bounds = entry.get("error_bounds", [])
        if not (interval is None or (_is_int(interval) and interval >= 1)):
            reader.problems.append(f"{where}.interval: must be an integer of at least 1 or null")
        if not isinstance(entry.get("quality"), Mapping):
            reader.problems.append(f"{where}.quality: must be an object")
        if not isinstance(full_steps, list):
            reader.problems.append(f"{where}.full_steps: must be a list")
            continue
        try:
            schedule = Schedule.explicit(steps, full_steps)
        except ValueError as error:
            reader.problems.append(f"{where}.full_steps: {error}")
            continue
        if has_bounds and not _are_bounds(bounds, schedule):
            reader.problems.append(
                f"{where}.error_bounds: must be a list of a number above zero or null for each of the full steps"
            )
            continue
        result[name] = Budget(
            schedule=schedule,
            interval=interval,
            quality=entry.get("quality") or {},
            error_bounds=tuple(bounds if has_bounds else [None] * schedule.num_full),
        )
    return result


def _predictor(reader: _Reader) -> PredictorSpec | None:
    try:
        return PredictorSpec.from_dict(reader.mapping("predictor"))
    except (ValueError, TypeError) as error:
        reader.problems.append(str(error))
        return None


def _are_bounds(value: Any, schedule: Schedule) -> bool:
    return (
        isinstance(value, list)
        and len(value) == schedule.num_full
        and all(bound is None or (_is_number(bound) and bound > 0) for bound in value)
    )


def _are_branches(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 4
        and all(isinstance(name, str) and NAME.fullmatch(name) for name in value)
        and len(set(value)) == len(value)
    )


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_int, value)) and 1 <= value[0] <= value[1]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
