"""Judging: every method on the same prompts and noise, beside the plain run and beside a converged one.

Paired by construction: a batch is sampled plain, then by each method, before the next batch begins. The
first batch is also looked into (features, bytes, shapes); others are timed, each method against the plain call
of its own batch. Processes may share the batches out (`share_out`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lesa import metrics
from lesa.errors import LesaError
from lesa.models.flops import ModelFlops, count_transformer
from lesa.models.pipelines import sample, timed_sample
from lesa.models.probe import RunTrace, probe
from lesa.params import CallParams, EvaluateParams, Report
from lesa.peers.method import Method

Key = tuple[str, str]  # budget and name of a method
PLAIN: Key = ("", "plain")
BY_BATCH = ("psnr", "ssim", "agreement", "converged", "seconds")  # what a method has of each of its batches


@dataclass(slots=True)
class Measured:
    """What is gathered of one method while batches pass; of the first batch of all it is looked into the run."""

    psnr: list[torch.Tensor] = field(default_factory=list)
    ssim: list[torch.Tensor] = field(default_factory=list)
    agreement: list[torch.Tensor] = field(default_factory=list)
    converged: list[torch.Tensor] = field(default_factory=list)  # PSNR to the converged run, of samples that have one
    seconds: list[float] = field(default_factory=list)  # of timed calls, plain ones in step
    calls: int = 0
    computed: int = 0
    images: torch.Tensor | None = None  # of the first batch
    feature_errors: tuple[float, ...] | None = None  # [S] relative L1, where its steps are the plain run's
    peak_bytes: int = 0

    def extend(self, later: Measured) -> None:
        """Add the batches of a later part."""
        for name in BY_BATCH:
            getattr(self, name).extend(getattr(later, name))
        self.calls += later.calls
        self.computed += later.computed


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one process measures of all samples."""

    starts: tuple[int, ...]  # the first sample of each of its batches
    timed: tuple[int, ...]  # those of them whose calls are timed: whole ones, none of them looked into
    further: int = 0  # timed calls of everything beside them


@dataclass(kw_only=True, slots=True)
class MeasuredPart:
    """What one process measured, or several once joined."""

    by_method: dict[Key, Measured]
    sigmas: torch.Tensor  # [S + 1] of the plain run
    model: ModelFlops | None  # set only in the part that holds the first batch
    threads: int  # of torch


def converged_indices(num_samples: int, fraction: float) -> list[int]:
    """Samples spread evenly over all of them; at least two where any are wanted."""
    count = min(num_samples, max(2, round(fraction * num_samples))) if fraction > 0 else 0
    return [(2 * i + 1) * num_samples // (2 * count) for i in range(count)]


def share_out(num_samples: int, settings: EvaluateParams, processes: int = 1, timing: bool = True) -> list[Part]:
    """Batches in order, about as many to each of at most so many processes.

    The first batch of all is never timed, since it is looked into. Where that leaves fewer timed calls than are
    wanted, the first process makes the others.
    """
    starts = range(0, num_samples, settings.batch_size)
    count = min(processes, len(starts))
    parts = []
    for index in range(count):
        own = starts[index * len(starts) // count : (index + 1) * len(starts) // count]
        timed = [start for start in own if start + settings.batch_size <= num_samples and start > 0]
        parts.append(Part(starts=tuple(own), timed=tuple(timed) if timing else ()))
    missing = settings.wall_clock_repeats - sum(len(part.timed) for part in parts) if timing else 0
    parts[0] = Part(starts=parts[0].starts, timed=parts[0].timed, further=max(0, missing))
    return parts


class Scorer(Protocol):
    """Reads whether images show what was asked for."""

    def agreement(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """[B] of each image [B, 3, H, W] in [0, 1]."""
        ...


def samples(prompts: Sequence[str], seeds_per_prompt: int, seed_offset: int) -> tuple[list[str], list[int]]:
    """A prompt and a noise seed for every sample: prompts in order, each with seeds no other sample has."""
    if seeds_per_prompt < 1:
        raise LesaError(f"seeds_per_prompt must be at least 1, got {seeds_per_prompt}")
    repeated = [prompt for prompt in prompts for _ in range(seeds_per_prompt)]
    return repeated, list(range(seed_offset, seed_offset + len(repeated)))


@torch.no_grad()
def measure_part(
    pipe: Any,
    methods: Sequence[Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    part: Part,
    *,
    call: CallParams,
    settings: EvaluateParams,
    scorer: Scorer | None = None,
    report: Report | None = None,
) -> MeasuredPart:
    """What `evaluate_methods` measures of some of the batches.

    Args:
        prompts, seeds: of all samples.
        part: which of them.
    """
    size, model = settings.batch_size, None
    keys: list[Key] = [(method.budget, method.name) for method in methods]
    by_method = {key: Measured() for key in (PLAIN, *keys)}
    converged = _converged(pipe, prompts, seeds, part, call, settings)
    first = slice(part.starts[0], part.starts[0] + size)
    if part.starts[0] in part.timed:  # the first call of a batch size is a warm-up and is not timed
        sample(pipe, prompts[first], seeds[first], call, batch_size=size)
    sigmas, done = torch.empty(0), 0
    for start in part.starts:
        chunk = slice(start, min(start + size, len(prompts)))
        is_first, is_timed = start == 0, start in part.timed
        texts, noise = list(prompts[chunk]), seeds[chunk]
        slow = {index - start: image for index, image in converged.items() if start <= index < chunk.stop}
        plain, plain_trace = _run(pipe, None, texts, noise, call, by_method[PLAIN], is_first, is_timed)
        sigmas = pipe.scheduler.sigmas.detach().cpu()
        _score(by_method[PLAIN], plain, None, texts, scorer, slow)
        if is_first:
            assert plain_trace.shapes.call is not None, "the plain run calls the transformer"
            model = count_transformer(pipe.transformer, *plain_trace.shapes.call)
        for method, key in zip(methods, keys, strict=True):
            with method.using(pipe, sigmas):
                images, trace = _run(pipe, method, texts, noise, call, by_method[key], is_first, is_timed)
            _score(by_method[key], images, plain, texts, scorer, slow)
            if is_first and method.same_steps:
                by_method[key].feature_errors = _feature_errors(trace, plain_trace, len(sigmas) - 1)
        done += len(texts)
        if report is not None:
            report(done, {"evaluated_samples": float(done)})
    for _ in range(part.further):
        _time_all(pipe, methods, keys, prompts[first], seeds[first], call, sigmas, by_method)
    return MeasuredPart(by_method=by_method, sigmas=sigmas, model=model, threads=torch.get_num_threads())


def _converged(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    part: Part,
    call: CallParams,
    settings: EvaluateParams,
) -> dict[int, torch.Tensor]:
    """Images of the converged run, by sample, of those samples of the part that have one."""
    size = settings.batch_size
    chosen = [
        index
        for index in converged_indices(len(prompts), settings.converged_fraction)
        if index // size * size in part.starts
    ]
    if not chosen:
        return {}
    slow = dataclasses.replace(call, num_inference_steps=settings.converged_steps)
    texts, noise = [prompts[index] for index in chosen], [seeds[index] for index in chosen]
    return dict(zip(chosen, sample(pipe, texts, noise, slow, batch_size=size), strict=True))


def _run(
    pipe: Any,
    method: Method | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    measured: Measured,
    is_first: bool,
    is_timed: bool,
) -> tuple[torch.Tensor, RunTrace]:
    """Images of one batch, and what the run did; the method is on the pipeline already."""
    own = call if method is None else method.call(call)
    with probe(pipe, deep=is_first, held=method.held if method else None) as trace:
        images, seconds = timed_sample(pipe, prompts, seeds, own, len(prompts))
    measured.calls += trace.calls
    measured.computed += trace.computed
    if is_first:
        measured.images, measured.peak_bytes = images, trace.peak_bytes
    if is_timed:
        measured.seconds.append(seconds)
    return images, trace


def _score(
    measured: Measured,
    images: torch.Tensor,
    plain: torch.Tensor | None,
    prompts: list[str],
    scorer: Scorer | None,
    converged: Mapping[int, torch.Tensor],  # place in the batch -> image
) -> None:
    if plain is not None:
        measured.psnr.append(metrics.psnr(images, plain))
        measured.ssim.append(metrics.ssim(images, plain))
    if scorer is not None:
        measured.agreement.append(scorer.agreement(images, prompts).double())
    if converged:
        measured.converged.append(metrics.psnr(images[list(converged)], torch.stack(list(converged.values()))))


def _feature_errors(trace: RunTrace, plain: RunTrace, num_steps: int) -> tuple[float, ...]:
    """[S] relative L1 of the first batch, the mean over its samples and the step's branches."""
    pairs = zip(trace.features, plain.features, strict=True)
    by_call = torch.stack([metrics.relative_l1(ours, true).mean() for ours, true in pairs])
    return tuple(by_call.reshape(num_steps, -1).mean(dim=1).tolist())


def _time_all(
    pipe: Any,
    methods: Sequence[Method],
    keys: Sequence[Key],
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    sigmas: torch.Tensor,
    by_method: Mapping[Key, Measured],
) -> None:
    """One more timed call of everything, where there were fewer batches than repeats."""
    by_method[PLAIN].seconds.append(timed_sample(pipe, prompts, seeds, call, len(prompts))[1])
    for method, key in zip(methods, keys, strict=True):
        with method.using(pipe, sigmas):
            taken = timed_sample(pipe, prompts, seeds, method.call(call), len(prompts))[1]
        by_method[key].seconds.append(taken)


def check(methods: Sequence[Method], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """`ValueError` naming everything that cannot be measured so."""
    problems = []
    if not prompts:
        problems.append("prompts: at least one sample is needed")
    if len(prompts) != len(seeds):
        problems.append(f"{len(prompts)} prompts and {len(seeds)} seeds: every sample needs one of each")
    if len(set(seeds)) != len(seeds):
        problems.append("seeds: one is there twice; samples would not be independent")
    names = [(method.budget, method.name) for method in methods]
    doubles = sorted({f"{name} at {budget}" for budget, name in names if names.count((budget, name)) > 1})
    if doubles:
        problems.append(f"methods: {', '.join(doubles)} is there twice")
    if problems:
        raise LesaError("evaluation: " + "; ".join(problems))
