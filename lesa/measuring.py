"""Judging: every method on the same prompts and noise, beside the plain run and beside a converged one.

Paired by construction: a batch is sampled plain, then by each method, before the next batch begins. The
first batch is also looked into (features, bytes, shapes); others are timed, each method against the plain call
of its own batch. Processes may share the batches out (`lesa.measured.share_out`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from lesa import metrics
from lesa.flops import count_transformer
from lesa.gathering import gather
from lesa.measured import PLAIN, Key, Measured, MeasuredPart, Part, converged_indices, share_out
from lesa.methods import Method
from lesa.params import CallParams, EvaluateParams
from lesa.pipelines import sample
from lesa.probe import RunTrace, probe
from lesa.results import Results
from lesa.timing import timed_sample

Report = Callable[[int, dict[str, float]], None]


class Scorer(Protocol):
    """Reads whether pictures show what was asked for."""

    def agreement(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """[B] of each picture [B, 3, H, W] in [0, 1]."""
        ...


def samples(prompts: Sequence[str], seeds_per_prompt: int, seed_offset: int) -> tuple[list[str], list[int]]:
    """A prompt and a noise seed for every sample: prompts in order, each with seeds no other sample has."""
    if seeds_per_prompt < 1:
        raise ValueError(f"seeds_per_prompt must be at least 1, got {seeds_per_prompt}")
    repeated = [prompt for prompt in prompts for _ in range(seeds_per_prompt)]
    return repeated, list(range(seed_offset, seed_offset + len(repeated)))


def evaluate_methods(
    pipe: Any,
    methods: Sequence[Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    call: CallParams,
    settings: EvaluateParams,
    scorer: Scorer | None = None,
    report: Report | None = None,
    timing: bool = True,
    about: Mapping[str, Any] | None = None,
) -> Results:
    """Measure methods on the same samples.

    Args:
        pipe: the pipeline, with nothing enabled on it.
        methods: what is compared; names must differ within a budget.
        prompts: one a sample.
        seeds: noise of each sample.
        call: the plain run.
        settings: batch size, resamples, converged run, timed repeats.
        scorer: None leaves the column out.
        report: called after every batch with the number of samples done.
        timing: whether wall-clock ratios are wanted, at the cost of further runs where batches are few.
        about: what is judged, for the reader of the results.

    Raises:
        ValueError: no samples, prompts and seeds that do not match, a seed twice, methods of one name.
    """
    check(methods, prompts, seeds)
    (part,) = share_out(len(prompts), settings, timing=timing)
    found = measure_part(
        pipe, methods, prompts, seeds, part, call=call, settings=settings, scorer=scorer, report=report
    )
    return gather([found], methods, prompts, seeds, call=call, settings=settings, about=about)


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
    result = {key: Measured() for key in (PLAIN, *keys)}
    converged = _converged(pipe, prompts, seeds, part, call, settings)
    first = slice(part.starts[0], part.starts[0] + size)
    if part.starts[0] in part.timed:  # the process's first call of this size is nobody's time
        sample(pipe, prompts[first], seeds[first], call, batch_size=size)
    sigmas, done = torch.empty(0), 0
    for start in part.starts:
        chunk = slice(start, min(start + size, len(prompts)))
        is_first, is_timed = start == 0, start in part.timed
        texts, noise = list(prompts[chunk]), seeds[chunk]
        slow = {index - start: picture for index, picture in converged.items() if start <= index < chunk.stop}
        plain, plain_trace = _run(pipe, None, texts, noise, call, result[PLAIN], is_first, is_timed)
        sigmas = pipe.scheduler.sigmas.detach().cpu()
        _score(result[PLAIN], plain, None, texts, scorer, slow)
        if is_first:
            assert plain_trace.shapes.call is not None, "the plain run calls the transformer"
            model = count_transformer(pipe.transformer, *plain_trace.shapes.call)
        for method, key in zip(methods, keys, strict=True):
            with method.using(pipe, sigmas):
                images, trace = _run(pipe, method, texts, noise, call, result[key], is_first, is_timed)
            _score(result[key], images, plain, texts, scorer, slow)
            if is_first and method.same_steps:
                result[key].feature_errors = _feature_errors(trace, plain_trace, len(sigmas) - 1)
        done += len(texts)
        if report is not None:
            report(done, {"evaluated_samples": float(done)})
    for _ in range(part.further):
        _time_all(pipe, methods, keys, prompts[first], seeds[first], call, sigmas, result)
    return MeasuredPart(found=result, sigmas=sigmas, model=model, threads=torch.get_num_threads())


def _converged(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    part: Part,
    call: CallParams,
    settings: EvaluateParams,
) -> dict[int, torch.Tensor]:
    """Pictures of the converged run, by sample, of those samples of the part that have one."""
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
    found: Measured,
    is_first: bool,
    is_timed: bool,
) -> tuple[torch.Tensor, RunTrace]:
    """Pictures of one batch, and what the run did; the method is on the pipeline already."""
    own = call if method is None else method.call(call)
    with probe(pipe, deep=is_first, held=method.held if method else None) as trace:
        images, seconds = timed_sample(pipe, prompts, seeds, own, len(prompts))
    found.calls += trace.calls
    found.computed += trace.computed
    if is_first:
        found.pictures, found.peak_bytes = images, trace.peak_bytes
    if is_timed:
        found.seconds.append(seconds)
    return images, trace


def _score(
    found: Measured,
    images: torch.Tensor,
    plain: torch.Tensor | None,
    prompts: list[str],
    scorer: Scorer | None,
    converged: Mapping[int, torch.Tensor],  # place in the batch -> picture
) -> None:
    if plain is not None:
        found.psnr.append(metrics.psnr(images, plain))
        found.ssim.append(metrics.ssim(images, plain))
    if scorer is not None:
        found.agreement.append(scorer.agreement(images, prompts).double())
    if converged:
        found.converged.append(metrics.psnr(images[list(converged)], torch.stack(list(converged.values()))))


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
    found: Mapping[Key, Measured],
) -> None:
    """One more timed call of everything, where there were fewer batches than repeats."""
    found[PLAIN].seconds.append(timed_sample(pipe, prompts, seeds, call, len(prompts))[1])
    for method, key in zip(methods, keys, strict=True):
        with method.using(pipe, sigmas):
            taken = timed_sample(pipe, prompts, seeds, method.call(call), len(prompts))[1]
        found[key].seconds.append(taken)


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
        raise ValueError("evaluation: " + "; ".join(problems))
