"""What a bundle says of itself: which model, scheduler and call its predictor fits, and how good it measured.

Names in a manifest are compared with what is there and never imported, opened or joined to a path.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lesa.errors import LesaError
from lesa.models.families import FAMILIES
from lesa.params import CallParams
from lesa.predictor.spec import PredictorSpec
from lesa.schedule import Schedule
from lesa.validation import NAME, build, is_int, matching, setting, sound_parts

SCHEMA = 4  # 2: variants name their full steps; weights of each step. 3: a range of steps. 4: error bounds
READ = (3, SCHEMA)  # a bundle of schema 3 serves as before, and cannot be adaptive
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]{64}")
WEIGHTS = "weights.safetensors"
MAX_WEIGHTS = 8 << 30  # bytes
MAX_BUDGETS = 64
_A_NAME = "a name of a-z, 0-9, '.', '_' and '-'"


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
        if schema not in READ or not is_int(schema):
            newer = isinstance(schema, int) and schema > SCHEMA
            remedy = "update lesa to read it" if newer else "make the bundle again"
            known = " and ".join(map(str, READ))
            raise BundleError(where, [f"schema: got {schema!r}, this version reads {known}: {remedy}"])
        problems: list[str] = []
        build(_Document, data, "", problems, complete=True)
        sound = sound_parts(_Document, data, complete=True)
        budgets = _budgets(sound, problems)
        predictor = _predictor(sound, problems)
        _check_together(sound, predictor, problems)
        if problems or predictor is None:
            raise BundleError(where, problems)
        model: _Model = sound.model
        return cls(
            workload=sound.workload,
            family=model.family,
            pipeline_class=model.pipeline_class,
            transformer_class=model.transformer_class,
            fingerprint=model.fingerprint,
            scheduler_class=sound.scheduler.name,
            scheduler_config=sound.scheduler.config,
            channels=sound.channels,
            branches=sound.branches,
            call=CallParams(**dataclasses.asdict(sound.call)),
            step_range=sound.step_range,
            sigmas=sound.sigmas,
            budgets=budgets,
            default_budget=sound.default_budget,
            predictor=predictor,
            weights_bytes=sound.files[WEIGHTS].bytes,
            weights_sha256=sound.files[WEIGHTS].sha256,
            data=data,
        )

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)


# The document as it is written: one dataclass an object, one field a key.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    family: str = setting(accept=lambda name: name in FAMILIES, what=f"one of {sorted(FAMILIES)}")
    pipeline_class: str = matching(_CLASS, "a class name")
    transformer_class: str = matching(_CLASS, "a class name")
    fingerprint: str = matching(_SHA256, "sha256: and 64 hexadecimal digits")
    source: str | None
    revision: str | None
    dtype: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheduler:
    name: str = matching(_CLASS, "a class name", key="class")
    config: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call(CallParams):
    """A workload's settings allow no smaller pictures; a bundle of them is read."""

    height: int = setting(low=1)
    width: int = setting(low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnboundedBudget:
    """Of schema 3."""

    full_steps: tuple[int, ...]
    interval: int | None = setting(low=1)
    quality: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budget(_UnboundedBudget):
    error_bounds: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    bytes: int = setting(low=1, high=MAX_WEIGHTS)
    sha256: str = matching(_HEX, "64 hexadecimal digits")


def _are_branches(names: tuple[str, ...]) -> bool:
    return 1 <= len(names) <= 4 and all(map(NAME.fullmatch, names)) and len(set(names)) == len(names)


def _is_range(steps: tuple[int, ...]) -> bool:
    return len(steps) == 2 and 1 <= steps[0] <= steps[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    schema: int
    workload: str = matching(NAME, _A_NAME)
    created_from: dict[str, Any]
    model: _Model
    scheduler: _Scheduler
    tap: str | None
    channels: int = setting(low=1, high=1 << 16)
    branches: tuple[str, ...] = setting(accept=_are_branches, what="a list of one to four names")
    call: _Call
    num_inference_steps: int = setting(low=1, high=10_000)
    step_range: tuple[int, ...] = setting(accept=_is_range, what="two numbers of steps, the lowest first")
    sigmas: tuple[float, ...]  # [S + 1]
    budgets: dict[str, Any]  # name -> _Budget, by the schema
    default_budget: str = matching(NAME, "the name of a budget")
    predictor: dict[str, Any]
    training: dict[str, Any]
    evaluation: dict[str, Any]
    files: dict[str, _File]
    license: str | None
    base_license: str | None


def _budgets(document: Any, problems: list[str]) -> dict[str, Budget]:
    """The budgets that are sound; what is wrong with the others is appended to `problems`."""
    if document.budgets is None:
        return {}
    if not 1 <= len(document.budgets) <= MAX_BUDGETS:
        problems.append(f"budgets: must be from 1 to {MAX_BUDGETS}, got {len(document.budgets)}")
    kind = _Budget if document.schema > 3 else _UnboundedBudget
    result = {}
    for name, entry in document.budgets.items():
        where = f"budgets.{name[:70]}"
        if not NAME.fullmatch(name):
            problems.append(f"{where}: not {_A_NAME}")
            continue
        written = build(kind, entry, where, problems, complete=True)
        if written is None or document.num_inference_steps is None:
            continue
        try:
            schedule = Schedule.explicit(document.num_inference_steps, written.full_steps)
        except LesaError as error:
            problems.append(f"{where}.full_steps: {error}")
            continue
        bounds = written.error_bounds if isinstance(written, _Budget) else (None,) * schedule.num_full
        if len(bounds) != schedule.num_full or any(bound is not None and bound <= 0 for bound in bounds):
            problems.append(
                f"{where}.error_bounds: must be a list of a number above zero or null for each of the full steps"
            )
            continue
        result[name] = Budget(
            schedule=schedule, interval=written.interval, quality=written.quality, error_bounds=bounds
        )
    return result


def _predictor(document: Any, problems: list[str]) -> PredictorSpec | None:
    if document.predictor is None:
        return None
    try:
        return PredictorSpec.from_dict(document.predictor)
    except (ValueError, TypeError) as error:
        problems.append(str(error))
        return None


def _check_together(document: Any, spec: PredictorSpec | None, problems: list[str]) -> None:
    """Append what no single field shows, where all of the fields that it takes are sound."""
    steps, sigmas, files = document.num_inference_steps, document.sigmas, document.files
    if steps is not None and sigmas is not None:
        falling = all(later < earlier for earlier, later in pairwise(sigmas))
        if len(sigmas) != steps + 1 or not falling or sigmas[-1] < 0:
            got = f"{len(sigmas)}: {list(sigmas)}"[:70]
            problems.append(f"sigmas: must be {steps + 1} decreasing noise levels, none below zero, got {got}")
    if document.call is not None and steps is not None and document.call.num_inference_steps != steps:
        problems.append(
            f"call.num_inference_steps: got {document.call.num_inference_steps}, num_inference_steps says {steps}"
        )
    default, budgets = document.default_budget, document.budgets
    if default is not None and budgets is not None and default not in budgets:
        known = ", ".join(name[:70] for name in budgets) or "none"
        problems.append(f"default_budget: {default!r} is not one of {known}")
    if files is not None:
        problems += [f"files.{WEIGHTS}: missing"] if WEIGHTS not in files else []
        problems += [f"files.{name[:70]}: unknown key" for name in files if name != WEIGHTS]
    if spec is None:
        return
    if document.channels is not None and spec.channels != document.channels:
        problems.append(f"predictor.channels: got {spec.channels}, channels says {document.channels}")
    if steps is not None and spec.num_steps != steps:
        problems.append(f"predictor.num_steps: got {spec.num_steps}, num_inference_steps says {steps}")
    if document.step_range is not None and spec.step_range != document.step_range:
        problems.append(
            f"step_range: got {list(document.step_range)}, the predictor was trained on {list(spec.step_range)}"
        )
