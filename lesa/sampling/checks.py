"""Whether a pipeline, a run and a call fit the predictor: every difference named before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lesa.bundle.manifest import Manifest
from lesa.errors import LesaError
from lesa.models.families import Family, Grid, family_of
from lesa.models.fingerprint import adapters, fingerprint
from lesa.params import CallParams

SIGMA_TOLERANCE = 1e-5  # float32 schedules of one configuration differ by less between machines


class MismatchError(LesaError):
    """A run or a pipeline does not fit; `problems` names every difference."""

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(f"{what}:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstCall:
    """The first transformer call of a run, as `LesaCacheConfig.check` sees it."""

    transformer: torch.nn.Module
    scheduler: Any | None  # None where the cache was given timesteps instead
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What `LesaCacheConfig.check` finds in the first call of a run."""

    problems: Sequence[str] = ()  # any of them refuses the run
    notes: Mapping[str, str] | None = None  # the run's facts for the summary; None: those of the configuration


def run_problems(
    call: FirstCall,
    *,
    first_step: int,
    late_start: bool,  # whether a run may begin after step 0, where the scheduler says so
    num_steps: int,  # of the run
    expected_steps: int,
    expected_sigmas: Sequence[float] | None,
) -> list[str]:
    """What every cache needs of a run, whatever predicts."""
    problems = []
    if first_step and not (late_start and first_step == getattr(call.scheduler, "begin_index", None)):
        problems.append(
            f"first step: got {first_step}, expected 0 (a run from the middle of the schedule, as from another "
            "picture, needs LESA to be enabled on the pipeline that does so; another pipeline must share its scheduler)"
        )
    problems += cache_problems(call.transformer)
    if num_steps != expected_steps:
        problems.append(f"num_inference_steps: got {num_steps}, expected {expected_steps}")
    if call.scheduler is not None and expected_sigmas is not None:
        problems += _sigma_problems(getattr(call.scheduler, "sigmas", None), expected_sigmas)
    return problems


def cache_problems(transformer: torch.nn.Module) -> list[str]:
    """One of diffusers' own caches beside ours."""
    if not getattr(transformer, "is_cache_enabled", False):
        return []
    return ["another cache is enabled on the transformer: call transformer.disable_cache()"]


def _sigma_problems(sigmas: torch.Tensor | None, expected: Sequence[float]) -> list[str]:
    if sigmas is None:
        return ["sigmas: the scheduler has none"]
    if len(sigmas) != len(expected):
        return [f"sigmas: got {len(sigmas)} noise levels, expected {len(expected)}"]
    off = (sigmas.detach().cpu().double() - torch.tensor(list(expected), dtype=torch.float64)).abs()
    step = int(off.argmax())
    if float(off[step]) <= SIGMA_TOLERANCE:
        return []
    return [f"sigmas: got {float(sigmas[step]):.6g} at step {step}, expected {float(expected[step]):.6g}"]


_CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")  # diffusers' names
_TOLERANCE = 2.0**-7  # relative: guidance and timesteps may come in bfloat16


def call_problems(pipe: Any, expected: CallParams, call: FirstCall) -> list[str]:
    """Every difference between the call under way and `expected`, by the names of the pipeline's arguments.

    The strength of classifier-free guidance does not reach the transformer and is not seen here; whether
    there is an unconditional branch is.
    """
    given, family = call.kwargs, family_of(call.transformer)
    problems = _timestep_problems(family, call) + _controlnet_problems(pipe, given)
    grid = None if family.grid is None else family.grid(given)
    if grid is not None:
        for name, got in _size(pipe, grid).items():
            want = getattr(expected, name)
            if want is not None and _rounded(pipe, grid, name, want) != got:
                problems.append(f"{name}: got {got}, expected {want}")
    guidance = given.get("guidance")
    if isinstance(guidance, torch.Tensor) and expected.guidance_scale is not None:
        value = float(guidance.reshape(-1)[0]) / family.guidance_factor
        if not _close(value, expected.guidance_scale):
            problems.append(f"guidance_scale: got {value:g}, expected {expected.guidance_scale:g}")
    text = given.get("txt_ids")  # pipelines that have it pad the text to a fixed length
    if isinstance(text, torch.Tensor) and expected.max_sequence_length is not None:
        length = text.shape[-2]
        if length != expected.max_sequence_length:
            problems.append(f"max_sequence_length: got {length}, expected {expected.max_sequence_length}")
    return problems


def _timestep_problems(family: Family, call: FirstCall) -> list[str]:
    """A timestep that the scheduler does not have at this step: the pipeline steps with another one."""
    scheduler, timestep = call.scheduler, call.kwargs.get("timestep")
    if scheduler is None or not isinstance(timestep, torch.Tensor):
        return []
    step = scheduler.step_index
    step = (getattr(scheduler, "begin_index", None) or 0) if step is None else step
    want = float(scheduler.timesteps[step]) * family.timestep_factor
    got = float(timestep.reshape(-1)[0])
    return [] if _close(got, want) else [f"timestep: got {got:g}, the scheduler says {want:g} at step {step}"]


def _controlnet_problems(pipe: Any, given: Mapping[str, Any]) -> list[str]:
    """Residuals without a ControlNet of `pipe`: another pipeline that shares the transformer is being called."""
    if getattr(pipe, "controlnet", None) is not None or all(given.get(name) is None for name in _CONTROLNET):
        return []
    return [
        f"ControlNet: got its residuals, expected none from {type(pipe).__name__}; enable LESA on the pipeline "
        "that is called"
    ]


def _close(value: float, expected: float) -> bool:
    return abs(value - expected) <= _TOLERANCE * abs(expected)


def _size(pipe: Any, grid: Grid) -> dict[str, int]:
    """Height, width and frames in pixels."""
    pixels = _pixels(pipe, grid)
    size = {"height": grid.rows * pixels, "width": grid.columns * pixels}
    if grid.latents_per_side == 1:
        size["num_frames"] = (grid.frames - 1) * getattr(pipe, "vae_scale_factor_temporal", 1) + 1
    return size


def _pixels(pipe: Any, grid: Grid) -> int:
    """Pixels along a side of one cell of the grid."""
    factor: int = getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_scale_factor", 8)
    return grid.latents_per_side * factor


def _rounded(pipe: Any, grid: Grid, name: str, want: int) -> int:
    """Pipelines round a size down to whole tokens."""
    if name == "num_frames":
        step = int(getattr(pipe, "vae_scale_factor_temporal", 1))
        return (want - 1) // step * step + 1
    pixels = _pixels(pipe, grid)
    return want // pixels * pixels


def pipeline_problems(
    pipe: Any, transformer: torch.nn.Module, manifest: Manifest, allow: Collection[str], *, quantized: bool
) -> list[str]:
    """What of the pipeline is not what the bundle was made for, its weights' fingerprint aside."""
    problems = _class_problems(type(pipe).__name__, transformer, manifest, allow)
    if type(transformer).__name__ != manifest.transformer_class:
        got = type(transformer).__name__
        problems.append(f"transformer class: got {got}, expected {manifest.transformer_class}")
    problems += scheduler_problems(getattr(pipe, "scheduler", None), manifest)
    return problems + weights_problems(transformer, allow, quantized=quantized)


def fingerprint_problems(transformer: torch.nn.Module, manifest: Manifest, *, quantized: bool) -> list[str]:
    """Other weights than the bundle's; rounded ones have another fingerprint whatever they were."""
    got = manifest.fingerprint if quantized else fingerprint(transformer)
    if got == manifest.fingerprint:
        return []
    return [
        f"fingerprint of the transformer: got {got}, expected {manifest.fingerprint}; either this is another "
        "fine-tune, or a LoRA was fused into the weights (taking it out again leaves them rounded): load the model "
        "anew, or pass allow=('lora',) to accept a fused LoRA"
    ]


def _class_problems(
    got: str, transformer: torch.nn.Module, manifest: Manifest, allow: Collection[str]
) -> list[str]:
    expected = manifest.pipeline_class
    if got == expected:
        return []
    problem = f"pipeline class: got {got}, expected {expected}"
    if not family_of(transformer).are_related(got, expected):
        return [problem]
    if "pipeline" in allow:
        return []
    return [f"{problem}; pass allow=('pipeline',) to accept a predictor that was not measured with it"]


def weights_problems(transformer: torch.nn.Module, allow: Collection[str], *, quantized: bool) -> list[str]:
    """Adapters and quantised weights that were not allowed."""
    problems = []
    names = adapters(transformer)
    if names and "lora" not in allow:
        problems.append(
            f"adapters: got {', '.join(names)}, expected none; unload them or pass allow=('lora',) to "
            "accept a predictor that was not measured with them"
        )
    if getattr(transformer, "encoder_hid_proj", None) is not None:  # its weights are parameters of the transformer
        problems.append("IP-Adapter: got one, expected none; unload it with pipe.unload_ip_adapter()")
    if quantized and "quantized" not in allow:
        problems.append(
            "weights: got quantised ones, expected plain ones; pass allow=('quantized',) to accept a "
            "predictor that was not measured with them (the fingerprint is not compared then)"
        )
    return problems


def altered_problems(altered: Sequence[str], transformer: torch.nn.Module, allow: Collection[str]) -> list[str]:
    """Parameters, by name, that are not those LESA was enabled on, where no LoRA was allowed to change them."""
    if not altered or "lora" in allow or getattr(transformer, "encoder_hid_proj", None) is not None:
        return []
    return [
        f"weights: {len(altered)} parameter(s) changed since LESA was enabled, {altered[0]} first, as fusing a LoRA "
        "does (taking it out again leaves them rounded): load the model anew, or disable LESA and enable it with "
        "allow=('lora',)"
    ]


def scheduler_problems(scheduler: Any, manifest: Manifest) -> list[str]:
    name = type(scheduler).__name__
    if name != manifest.scheduler_class:
        return [f"scheduler class: got {name}, expected {manifest.scheduler_class}"]
    got = _settings(scheduler, dict(scheduler.config))
    expected = _settings(scheduler, dict(manifest.scheduler_config))
    return [
        f"scheduler {key}: got {got.get(key)!r}, expected {expected.get(key)!r}"
        for key in sorted(got.keys() | expected.keys())
        if got.get(key) != expected.get(key)
    ]


def _settings(scheduler: Any, config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration with its defaults spelt out: what an older version did not write counts."""
    parameters = inspect.signature(type(scheduler).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in (defaults | public).items()}
