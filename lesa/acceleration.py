"""enable, disable, summary: a bundle on somebody's pipeline, and off again without a trace."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from lesa.adaptive import adaptive_problems, fallback_of
from lesa.bundle import Bundle, load_bundle
from lesa.call_check import call_problems
from lesa.families import family_of
from lesa.fingerprint import adapters, fingerprint, is_quantized
from lesa.hook import LesaCacheConfig, apply_lesa_cache, cache_state, is_lesa_cache_enabled, remove_lesa_cache
from lesa.manifest import Manifest
from lesa.moving_rule import MovingRule
from lesa.other_steps import OtherSteps
from lesa.run_check import FirstCall, MismatchError
from lesa.run_statistics import RunStatistics
from lesa.schedule import Schedule, least_full

ALLOWANCES = ("lora", "quantized", "pipeline")
REGISTRY_PREFIX = "models:/"
_CHOICES = ("interval", "full_steps", "budget", "min_psnr", "max_loss_db")


@dataclass(frozen=True, slots=True)
class _Enabled:
    bundle: Bundle
    schedule: Schedule


_ENABLED: weakref.WeakKeyDictionary[torch.nn.Module, _Enabled] = weakref.WeakKeyDictionary()


def enable(
    pipe: Any,
    bundle: Bundle | str | Path,  # a bundle, its folder, or "models:/name@alias" of a registry
    *,
    interval: int | None = None,  # steps from one full step to the next; 1 is plain sampling
    full_steps: Sequence[int] | None = None,  # the full steps themselves
    budget: str | None = None,  # a schedule of the bundle by name; nothing asked for: its default budget
    min_psnr: float | None = None,  # dB to the plain run: the fastest budget that measured at least so much
    max_loss_db: float | None = None,  # the fastest budget that measured at most so much below the bundle's best
    allow: Collection[str] = (),  # "lora", "quantized", "pipeline": accept what the bundle was not measured with
    measure: bool = True,  # at full steps, measure what the predictor would have been off by
    adaptive: bool = False,  # go on with a slower budget where that error exceeds the bound it was calibrated to
) -> None:
    """Accelerate a diffusers pipeline with a bundle made for its model.

    A bundle made with text-to-image serves the pipelines that run the same weights on the same tokens from
    pictures (`Family.related_pipelines`) where `allow` has "pipeline". A run that begins in the middle of the
    schedule keeps the schedule's full steps and is full until the predictor has the history it was made for.
    With `adaptive`, a run whose errors stay within their bounds is the same as without. One that leaves them, as with
    an adapter that changes much, goes on with the bundle's next slower budget. The worst sample of a batch decides for
    all. Features of that budget's history are kept beside the own ones: up to twice the memory.
    It is the transformer that is accelerated: another pipeline that shares it and the scheduler is too, where its
    calls cannot be told from those of `pipe` (image to image or inpainting at strength 1).

    The scheduler and the call are checked again at the first transformer call of every run, before anything
    is computed. A run may have any number of steps in the bundle's `step_range`: a budget is carried to it,
    with as many full steps as the bundle's fastest budget at least.

    Raises:
        MismatchError: the pipeline is not what the bundle was made for; every difference is listed, and the
            pipeline is as it was.
        BundleError: the bundle is broken.
        ValueError: a schedule that the predictor cannot serve, an argument out of range, or `adaptive` with what has
            no bounds (a schedule that is no budget, an older bundle) or no slower budget.
    """
    unknown = sorted(set(allow) - set(ALLOWANCES))
    if unknown or isinstance(allow, str):
        got = allow if isinstance(allow, str) else ", ".join(unknown)
        raise ValueError(f"allow: a collection of {', '.join(ALLOWANCES)}; got {got!r}")
    transformer = _transformer(pipe)
    if is_lesa_cache_enabled(transformer):
        raise ValueError("LESA is enabled on this pipeline already: call lesa.disable(pipe) first")
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("another cache is enabled: call pipe.transformer.disable_cache() first")
    family = family_of(transformer)
    loaded = bundle if isinstance(bundle, Bundle) else _load(bundle)
    manifest = loaded.manifest
    problems = _pipeline_problems(pipe, transformer, manifest, allow)
    if problems:
        raise MismatchError(f"bundle {manifest.workload} does not fit this pipeline", problems)
    choose = partial(
        choose_schedule,
        manifest,
        interval=interval,
        full_steps=full_steps,
        budget=budget,
        min_psnr=min_psnr,
        max_loss_db=max_loss_db,
    )
    schedule, chosen = choose()
    fallback = None
    if adaptive:
        if not measure:
            raise ValueError("adaptive: needs measure=True, since the measured errors decide")
        fallback = fallback_of(loaded, chosen)
    rule = MovingRule(loaded.predictor, schedule, torch.tensor(manifest.sigmas))
    owner = weakref.ref(pipe)  # the hook must not keep the pipeline alive
    adaptive_note = {} if fallback is None else {"adaptive": fallback.promise}
    notes = _notes(loaded, chosen, pipe, transformer) | adaptive_note

    def check(call: FirstCall) -> list[str]:
        notes.clear()  # adapters come and go between the runs
        notes.update(_notes(loaded, chosen, owner(), call.transformer) | adaptive_note)
        return [
            *(adaptive_problems(call.scheduler, schedule) if fallback is not None else ()),
            *_scheduler_problems(call.scheduler, manifest),
            *_weights_problems(call.transformer, allow),
            *call_problems(owner(), manifest.call, call),
        ]

    apply_lesa_cache(
        transformer,
        LesaCacheConfig(
            schedule=schedule,
            rule=rule,
            scheduler=lambda: getattr(owner(), "scheduler", None),
            sigmas=manifest.sigmas,
            other_steps=OtherSteps(loaded.predictor, manifest.sigmas, lambda n: choose(num_steps=n)[0], MovingRule)
            if loaded.predictor.spec.step_counts and not adaptive
            else None,
            fallback=fallback,
            check=check,
            num_branches=len(manifest.branches),
            late_start=type(pipe).__name__ not in family.pipeline_classes,
            measure=measure,
            notes=notes,
            bounds=manifest.budgets[chosen].bounds if chosen in manifest.budgets else {},
        ),
    )
    _ENABLED[transformer] = _Enabled(loaded, schedule)


def disable(pipe: Any) -> None:
    """Take LESA off a pipeline: it samples as before, bit for bit. Harmless where LESA is not enabled."""
    transformer = _transformer(pipe)
    remove_lesa_cache(transformer)
    _ENABLED.pop(transformer, None)


def summary(pipe: Any) -> RunStatistics:
    """The newest run: `print` it for a table a step, `.to_dict()` for plain values.

    Raises:
        ValueError: LESA is not enabled on the pipeline.
    """
    transformer = _transformer(pipe)
    if not is_lesa_cache_enabled(transformer):
        raise ValueError("LESA is not enabled on this pipeline: call lesa.enable(pipe, bundle) first")
    return cache_state(transformer)


def call_kwargs(pipe: Any) -> dict[str, Any]:
    """The call the enabled bundle was made for: size, steps, guidance, text length, for the pipeline."""
    enabled = _ENABLED.get(_transformer(pipe))
    if enabled is None:
        raise ValueError("LESA is not enabled on this pipeline: call lesa.enable(pipe, bundle) first")
    accepted = inspect.signature(type(pipe).__call__).parameters
    call = dataclasses.asdict(enabled.bundle.manifest.call)
    given = {name: value for name, value in call.items() if value is not None and name in accepted}
    if given.get("true_cfg_scale", 0.0) > 1.0:
        given["negative_prompt"] = " "  # without one the pipelines leave out the unconditional branch
    return given


def choose_schedule(
    manifest: Manifest,
    *,
    interval: int | None = None,
    full_steps: Sequence[int] | None = None,
    budget: str | None = None,
    min_psnr: float | None = None,
    max_loss_db: float | None = None,
    num_steps: int | None = None,  # of the run; None: the bundle's own, which budgets and qualities are stated at
) -> tuple[Schedule, str]:
    """The schedule asked for, and words for it.

    Raises:
        ValueError: more than one was asked for, an unknown budget, a quality that no budget measured, or a list of
            full steps for a run of another number of steps.
    """
    asked = {
        "interval": interval,
        "full_steps": full_steps,
        "budget": budget,
        "min_psnr": min_psnr,
        "max_loss_db": max_loss_db,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) > 1:
        raise ValueError(f"give one of {', '.join(_CHOICES)}; got {' and '.join(asked)}")
    own = len(manifest.sigmas) - 1
    steps = own if num_steps is None else num_steps
    if full_steps is not None:
        if steps != own:
            raise ValueError(f"full_steps: they are for {own} steps, the run has {steps}: choose by budget or interval")
        return Schedule.explicit(steps, full_steps), "full_steps"
    if interval is not None:
        for name, known in manifest.budgets.items():
            if known.interval == interval and interval > 1 and steps == own:  # with the warm-up it was made for
                return known.schedule, name
        return Schedule.uniform(steps, interval), f"interval {interval}"
    if min_psnr is not None or max_loss_db is not None:
        name = _cheapest_budget(manifest, min_psnr, max_loss_db)
    else:
        name = manifest.default_budget if budget is None else budget
    if name not in manifest.budgets:
        raise ValueError(f"budget: {name!r} is not one of {', '.join(manifest.budgets)}")
    schedule = manifest.budgets[name].schedule
    least = least_full(known.schedule for known in manifest.budgets.values())
    return (schedule if steps == own else schedule.carried(steps, least)), name


def _cheapest_budget(manifest: Manifest, min_psnr: float | None, max_loss_db: float | None) -> str:
    """The budget with the fewest full steps whose measured mean PSNR is good enough."""
    measured = {
        name: float(known.quality["psnr_mean"])
        for name, known in manifest.budgets.items()
        if isinstance(known.quality.get("psnr_mean"), int | float)
    }
    if not measured:
        raise ValueError("the bundle's budgets were not measured: choose by budget, interval or full_steps")
    if max_loss_db is not None and not max_loss_db >= 0:
        raise ValueError(f"max_loss_db: must be at least 0 dB, got {max_loss_db}")
    best = max(measured.values())
    wanted = min_psnr if min_psnr is not None else best - float(max_loss_db or 0.0)
    good = [name for name, psnr in measured.items() if psnr >= wanted]
    if not good:
        known = ", ".join(f"{name}: {psnr:.2f} dB" for name, psnr in measured.items())
        raise ValueError(f"min_psnr: no budget measured {wanted:.2f} dB ({known})")
    return min(good, key=lambda name: (manifest.budgets[name].schedule.num_full, -measured[name]))


def _load(bundle: str | Path) -> Bundle:
    if str(bundle).startswith(REGISTRY_PREFIX):
        from lesa.pull import pull

        folder = pull(str(bundle))
        return load_bundle(folder, expected_digest=folder.name)
    return load_bundle(bundle)


def _transformer(pipe: Any) -> torch.nn.Module:
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, torch.nn.Module):
        raise ValueError(f"{type(pipe).__name__} has no transformer: LESA accelerates diffusion transformers")
    return unwrap_module(transformer)


def _pipeline_problems(
    pipe: Any, transformer: torch.nn.Module, manifest: Manifest, allow: Collection[str]
) -> list[str]:
    problems = _class_problems(type(pipe).__name__, transformer, manifest, allow)
    if type(transformer).__name__ != manifest.transformer_class:
        got = type(transformer).__name__
        problems.append(f"transformer class: got {got}, expected {manifest.transformer_class}")
    problems += _scheduler_problems(getattr(pipe, "scheduler", None), manifest)
    problems += _weights_problems(transformer, allow)
    if not is_quantized(transformer):  # rounded weights have another fingerprint whatever they were
        got = fingerprint(transformer)
        if got != manifest.fingerprint:
            problems.append(f"fingerprint of the transformer: got {got}, expected {manifest.fingerprint}")
    return problems


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


def _weights_problems(transformer: torch.nn.Module, allow: Collection[str]) -> list[str]:
    problems = []
    names = adapters(transformer)
    if names and "lora" not in allow:
        problems.append(
            f"adapters: got {', '.join(names)}, expected none; unload them or pass allow=('lora',) to "
            "accept a predictor that was not measured with them"
        )
    if getattr(transformer, "encoder_hid_proj", None) is not None:  # its weights are parameters of the transformer
        problems.append("IP-Adapter: got one, expected none; unload it with pipe.unload_ip_adapter()")
    if is_quantized(transformer) and "quantized" not in allow:
        problems.append(
            "weights: got quantised ones, expected plain ones; pass allow=('quantized',) to accept a "
            "predictor that was not measured with them (the fingerprint is not compared then)"
        )
    return problems


def _scheduler_problems(scheduler: Any, manifest: Manifest) -> list[str]:
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


def _notes(bundle: Bundle, chosen: str, pipe: Any, transformer: torch.nn.Module) -> dict[str, str]:
    notes = {"bundle": f"{bundle.manifest.workload} ({bundle.digest[:12]})", "budget": chosen}
    strange = []
    if type(pipe).__name__ != bundle.manifest.pipeline_class:
        strange.append(type(pipe).__name__)
    if names := adapters(transformer):
        strange.append(f"adapters {', '.join(names)}")
    if strange:
        notes["not measured with"] = ", ".join(strange)
    if is_quantized(transformer):
        notes["weights"] = "quantised; the fingerprint was not compared"
    return notes
