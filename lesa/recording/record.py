"""Recording: pipeline runs of planned prompts and seeds, one trajectory each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lesa import atomic
from lesa.errors import LesaError
from lesa.models.pipelines import sample
from lesa.params import CallParams, RecordParams
from lesa.recording.plan import PlannedTrajectory, RecordingSize, fewest_steps
from lesa.recording.store import Trajectory
from lesa.recording.tap import FeatureTap

CONDITIONING = "conditioning."  # prefix of the transformer's own arguments in a trajectory's context


def record_batch(
    pipe: Any,
    batch: Sequence[PlannedTrajectory],
    record: RecordParams,
    call: CallParams,
    lengths: Sequence[Mapping[str, int]] | None = None,
) -> list[Trajectory]:
    """Run the pipeline once, every step full, and keep what the tap sees of each sample, in the batch's order.

    Args:
        batch: of one number of steps, at most `record.batch_size` of them; fewer are made up with copies.
        lengths: what `argument_lengths` says of this pipeline and call; None measures it where it is needed.

    Raises:
        ValueError: a cache is enabled on the transformer, or an argument of it cannot be kept.
    """
    transformer, size = pipe.transformer, record.batch_size
    if getattr(transformer, "is_cache_enabled", False):
        raise LesaError("a cache is enabled on the transformer; disable it: only full steps are recorded")
    if not 0 < len(batch) <= size or len({item.num_steps for item in batch}) != 1:
        raise LesaError(f"a batch is 1 to {size} trajectories of one number of steps")
    if size > 1 and lengths is None:
        lengths = argument_lengths(pipe, batch[0].prompt, call)
    filled = [*batch, *[batch[-1]] * (size - len(batch))]
    call = dataclasses.replace(call, num_inference_steps=batch[0].num_steps)

    def token_index(num_tokens: int) -> torch.Tensor | None:
        kept = [kept_tokens(item.key, num_tokens, record.token_fraction) for item in filled]
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
    return _trajectories(pipe, tap, batch, latents, lengths, size)


def _trajectories(
    pipe: Any,
    tap: FeatureTap,
    batch: Sequence[PlannedTrajectory],
    latents: torch.Tensor,
    lengths: Sequence[Mapping[str, int]] | None,
    size: int,
) -> list[Trajectory]:
    """A trajectory for each of the batch, out of what the tap saw of a call of `size` samples.

    Copies that only fill the call stand behind the batch and are dropped.

    Args:
        latents: [size, ...] final latents of the call.
        lengths: as in `record_batch`; None where the call has one sample.
    """
    assert tap.latents is not None
    branches = tap.num_branches
    initial, features, temb = tap.latents.float().cpu(), torch.stack(tap.features), torch.stack(tap.temb)
    timesteps = torch.stack(tap.timesteps)[::branches]
    recorded = []
    for row, item in enumerate(batch):
        conditioning = tap.conditioning if lengths is None else _rows(tap.conditioning, lengths, row, size)
        tensors, plain = _split_arguments(item.key, conditioning)
        context = {
            "latents_final": latents[row : row + 1],
            "latents_initial": initial[row : row + 1],
            "model_timesteps": timesteps[:, row],
            "temb": temb[:, row].unflatten(0, (item.num_steps, branches)),
            **tensors,
        }
        recorded.append(
            Trajectory(
                identity=item.identity,
                prompt=item.prompt,
                seed=item.seed,
                features=features[:, row].unflatten(0, (item.num_steps, branches)),
                sigmas=pipe.scheduler.sigmas.detach().float().cpu(),
                timesteps=pipe.scheduler.timesteps.detach().float().cpu(),
                context=context,
                token_index=None if tap.tokens is None else tap.tokens[row],
                call_kwargs=plain,
            )
        )
    return recorded


def argument_lengths(pipe: Any, prompt: str, call: CallParams) -> list[dict[str, int]]:
    """First dimension of the transformer's tensor arguments, a branch each, when the call has one sample.

    From as short a run as there is. What has more entries in a call of several samples has an entry a sample;
    that is a property of the pipeline and the call, so one run serves all batches.
    """
    with FeatureTap(pipe.transformer) as tap:
        short = dataclasses.replace(call, num_inference_steps=fewest_steps(call.num_inference_steps))
        sample(pipe, [prompt], [0], short, output_type="latent", batch_size=1)
    return [
        {
            name: len(value)
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor) and value.ndim > 0
        }
        for arguments in tap.conditioning
    ]


def _rows(
    conditioning: Sequence[Mapping[str, Any]], lengths: Sequence[Mapping[str, int]], row: int, size: int
) -> list[dict[str, Any]]:
    """One sample's arguments out of a call's: what grew from one entry to `size` has an entry a sample."""

    def sample_entry(value: Any, length: int | None) -> Any:
        has_rows = isinstance(value, torch.Tensor) and value.ndim > 0 and (length, len(value)) == (1, size)
        return value[row : row + 1] if has_rows else value

    return [
        {name: sample_entry(value, alone.get(name)) for name, value in arguments.items()}
        for arguments, alone in zip(conditioning, lengths, strict=True)
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


def measure_size(
    pipe: Any,
    longest_prompt: str,
    record: RecordParams,
    call: CallParams,
    lengths: Sequence[Mapping[str, int]] | None = None,  # as in `record_batch`
) -> RecordingSize:
    """The size of one trajectory, from a short run with the longest prompt."""
    steps = call.num_inference_steps
    probed = fewest_steps(steps)
    probe = PlannedTrajectory(
        key="0" * 32, identity={}, prompt=longest_prompt, seed=0, split="train", num_steps=probed
    )
    [trajectory] = record_batch(pipe, [probe], record, call, lengths)
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
