"""Recording: pipeline runs of planned prompts and seeds, one trajectory each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lesa import atomic
from lesa.errors import LesaError
from lesa.models.pipelines import sample
from lesa.params import CallParams, Workload
from lesa.recording.catalogue import write_catalogue
from lesa.recording.plan import (
    PlannedTrajectory,
    RecordingSize,
    batches,
    count_by_steps,
    describe_source,
    fewest_steps,
    missing,
    plan_recording,
    recorded_prompts,
)
from lesa.recording.store import Trajectory, TrajectoryStore
from lesa.recording.tap import FeatureTap

CONDITIONING = "conditioning."  # prefix of the transformer's own arguments in a trajectory's context


def record_batch(pipe: Any, batch: Sequence[PlannedTrajectory], workload: Workload) -> list[Trajectory]:
    """Run the pipeline once, every step full, and keep what the tap sees of each sample, in the batch's order.

    Args:
        batch: of one number of steps, at most `record.batch_size` of them; fewer are made up with copies.

    Raises:
        ValueError: a cache is enabled on the transformer, or an argument of it cannot be kept.
    """
    transformer, size = pipe.transformer, workload.record.batch_size
    if getattr(transformer, "is_cache_enabled", False):
        raise LesaError("a cache is enabled on the transformer; disable it: only full steps are recorded")
    if not 0 < len(batch) <= size or len({item.num_steps for item in batch}) != 1:
        raise LesaError(f"a batch is 1 to {size} trajectories of one number of steps")
    filled = [*batch, *[batch[-1]] * (size - len(batch))]
    call = dataclasses.replace(workload.call, num_inference_steps=batch[0].num_steps)
    single = _arguments_of_one(pipe, batch[0], call) if size > 1 else None
    fraction = workload.record.token_fraction

    def token_index(num_tokens: int) -> torch.Tensor | None:
        kept = [kept_tokens(item.key, num_tokens, fraction) for item in filled]
        return None if kept[0] is None else torch.stack([index for index in kept if index is not None])

    with FeatureTap(transformer, token_index=token_index) as tap:
        prompts, seeds = [item.prompt for item in filled], [item.seed for item in filled]
        latents = sample(pipe, prompts, seeds, call, output_type="latent", batch_size=size)
    steps, branches = call.num_inference_steps, tap.num_branches
    if len(tap.features) != steps * branches or len(tap.temb) != steps * branches:
        raise LesaError(
            f"trajectory {batch[0].key}: {len(tap.features)} features, {branches} branch(es), {steps} steps; "
            "something on the transformer skips or repeats steps"
        )
    assert tap.latents is not None
    initial, features, temb = tap.latents.float().cpu(), torch.stack(tap.features), torch.stack(tap.temb)
    timesteps = torch.stack(tap.timesteps)[::branches]
    recorded = []
    for row, item in enumerate(batch):
        conditioning = tap.conditioning if single is None else _rows(tap.conditioning, single, row, size)
        tensors, plain = _split_arguments(item.key, conditioning)
        context = {
            "latents_final": latents[row : row + 1],
            "latents_initial": initial[row : row + 1],
            "model_timesteps": timesteps[:, row],
            "temb": temb[:, row].unflatten(0, (steps, branches)),
            **tensors,
        }
        recorded.append(
            Trajectory(
                identity=item.identity,
                prompt=item.prompt,
                seed=item.seed,
                features=features[:, row].unflatten(0, (steps, branches)),
                sigmas=pipe.scheduler.sigmas.detach().float().cpu(),
                timesteps=pipe.scheduler.timesteps.detach().float().cpu(),
                context=context,
                token_index=None if tap.tokens is None else tap.tokens[row],
                call_kwargs=plain,
            )
        )
    return recorded


def _arguments_of_one(pipe: Any, planned: PlannedTrajectory, call: CallParams) -> list[dict[str, Any]]:
    """The transformer's arguments, a branch each, when the call has one sample; from as short a run as there is."""
    with FeatureTap(pipe.transformer) as tap:
        short = dataclasses.replace(call, num_inference_steps=fewest_steps(call.num_inference_steps))
        sample(pipe, [planned.prompt], [planned.seed], short, output_type="latent", batch_size=1)
    return tap.conditioning


def _rows(
    conditioning: Sequence[Mapping[str, Any]], single: Sequence[Mapping[str, Any]], row: int, size: int
) -> list[dict[str, Any]]:
    """One sample's arguments out of a call's: what grew from one entry to `size` has an entry a sample."""

    def of_row(value: Any, alone: Any) -> Any:
        has_rows = isinstance(value, torch.Tensor) and value.ndim > 0 and (len(alone), len(value)) == (1, size)
        return value[row : row + 1] if has_rows else value

    return [
        {name: of_row(value, alone[name]) for name, value in arguments.items()}
        for arguments, alone in zip(conditioning, single, strict=True)
    ]


def kept_tokens(key: str, num_tokens: int, fraction: float) -> torch.Tensor | None:
    """Increasing indices of a random part of the tokens, drawn from the key alone; None keeps all."""
    if fraction >= 1.0:
        return None
    generator = torch.Generator("cpu").manual_seed(int(key[:15], 16))
    kept = torch.randperm(num_tokens, generator=generator)[: max(1, round(fraction * num_tokens))]
    return kept.sort().values


def _split_arguments(
    key: str, conditioning: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The transformer's arguments as tensors for the context and JSON for the record, a branch each."""
    tensors: dict[str, torch.Tensor] = {}
    plain: list[dict[str, Any]] = []
    for branch, arguments in enumerate(conditioning):
        kept: dict[str, Any] = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                tensors[_argument_name(branch, name)] = value.detach().cpu()
            elif value is not None:
                try:
                    kept[name] = json.loads(atomic.canonical_json(value))
                except (TypeError, ValueError):
                    raise LesaError(
                        f"trajectory {key}: argument {name} of the transformer is {type(value).__name__}; "
                        "only tensors and JSON values can be recorded"
                    ) from None
        plain.append(kept)
    return tensors, plain


def _argument_name(branch: int, name: str) -> str:
    """`conditioning.<argument>` for the first branch, `conditioning.<branch>.<argument>` for the others."""
    return f"{CONDITIONING}{name}" if branch == 0 else f"{CONDITIONING}{branch}.{name}"


def transformer_arguments(
    record: Mapping[str, Any], context: Mapping[str, torch.Tensor], branch: int = 0
) -> dict[str, Any]:
    """Keyword arguments that the transformer was called with, all but hidden_states and timestep."""
    prefix = _argument_name(branch, "")
    tensors = {
        name.removeprefix(prefix): value
        for name, value in context.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }
    return {**record["call_kwargs"][branch], **tensors}


def measure_size(pipe: Any, workload: Workload) -> RecordingSize:
    """The size of one trajectory, from a short run with the longest prompt."""
    prompts = [prompt for split in recorded_prompts(workload).values() for prompt in split]
    steps = workload.call.num_inference_steps
    probed = fewest_steps(steps)
    probe = PlannedTrajectory(
        key="0" * 32, identity={}, prompt=max(prompts, key=len), seed=0, split="train", num_steps=probed
    )
    [trajectory] = record_batch(pipe, [probe], workload)
    _, branches, tokens, channels = trajectory.features.shape
    sizes = {name: tensor.numel() for name, tensor in trajectory.context.items()}
    step_values = (sizes["model_timesteps"] + sizes["temb"]) // probed
    return RecordingSize(
        num_steps=steps,
        num_branches=branches,
        num_tokens=tokens,
        channels=channels,
        context_values=sum(sizes.values()) + (steps - probed) * step_values,
        step_values=step_values,
    )


def record_all(
    workload: Workload,
    store: TrajectoryStore,
    pipe: Any,
    report: Callable[[int, dict[str, float]], object] = lambda step, values: None,
) -> list[str]:
    """Record what is missing, one call after the other in this process; then remove what the plan does not name.

    A run that was killed goes on where it was. `report` gets the number of trajectories done.

    Returns:
        The plan's keys in its order.

    Raises:
        OSError: the disk cannot hold the rest (before anything is recorded).
        lesa.locks.Locked: another recorder is at work on this store.
    """
    plan = plan_recording(workload, describe_source(pipe))
    with store.writer_lock():
        store.sweep()
        todo = missing(store, plan)
        if todo:
            atomic.require_space(store.path, measure_size(pipe, workload).bytes_of(count_by_steps(todo)))
        done = 0
        for batch in batches(todo, workload.record.batch_size):
            for trajectory in record_batch(pipe, batch, workload):
                store.commit(trajectory)
                done += 1
                report(done, {"recorded": float(done), "planned": float(len(todo))})
        store.prune({item.key for item in plan})
        write_catalogue(store)
    return [item.key for item in plan]
