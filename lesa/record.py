"""Recording: what a workload's prompts and seeds make the transformer do, one trajectory a pipeline run.

The plan comes first, from files alone; every entry's key says whether it is in the store already. Noise is from a
CPU generator a sample, and every call of the pipeline has `record.batch_size` samples, so that a trajectory's bytes
depend on nothing but its identity: at one and the same batch size a sample's numbers are its own, whoever shares
the call; at another one the last bits differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lesa import atomic
from lesa.families import TAP
from lesa.fingerprint import base_parameters, fingerprint
from lesa.params import CallParams, Workload
from lesa.pipelines import sample
from lesa.prompts import PromptError, read_splits
from lesa.store import FORMAT, Trajectory, TrajectoryStore, estimate_bytes, trajectory_key
from lesa.tap import FeatureTap

RECORDED_SPLITS = ("train", "validation")
CONDITIONING = "conditioning."  # prefix of the transformer's own arguments in a trajectory's context


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTrajectory:
    """One run to record."""

    key: str
    identity: dict[str, Any]
    prompt: str
    seed: int
    split: str  # train or validation; not part of the identity
    num_steps: int  # sampler steps; part of the identity's call


def count_by_steps(plan: Iterable[PlannedTrajectory]) -> Counter[int]:
    """How many planned trajectories have each number of steps."""
    return Counter(item.num_steps for item in plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingSize:
    """How large one trajectory of a workload is."""

    num_steps: int
    num_branches: int
    num_tokens: int  # kept ones
    channels: int
    context_values: int  # float32 values beside the features
    step_values: int  # those of them that come with each step

    def bytes(self, num_trajectories: int) -> int:
        """Bytes on disk of so many."""
        sizes = dataclasses.asdict(self)
        del sizes["step_values"]
        return estimate_bytes(num_trajectories, **sizes)

    def bytes_of(self, counts: Mapping[int, int]) -> int:
        """Bytes on disk of so many trajectories of each number of steps."""
        return sum(self._with_steps(num_steps).bytes(count) for num_steps, count in counts.items())

    def _with_steps(self, num_steps: int) -> RecordingSize:
        values = self.context_values + (num_steps - self.num_steps) * self.step_values
        return dataclasses.replace(self, num_steps=num_steps, context_values=values)


def describe_source(pipe: Any) -> dict[str, Any]:
    """What of a loaded pipeline determines a recording, as JSON: classes, weights, scheduler.

    The transformer by its fingerprint; text encoders and tokenizers by a digest, because the same transformer
    behind another encoder runs differently.
    """
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    described = {
        "fingerprint": fingerprint(pipe.transformer),
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": config},
        "text": _text_digest(pipe),
        "transformer": type(pipe.transformer).__name__,
    }
    plain: dict[str, Any] = json.loads(
        atomic.canonical_json(described)
    )  # tuples become the lists they are stored as
    return plain


def _text_digest(pipe: Any) -> str:
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module) and name not in ("transformer", "vae"):
            for parameter, value in base_parameters(part):
                digest.update(f"{name}.{parameter} {list(value.shape)}".encode())
                start = value.reshape(-1)[:64].to("cpu", torch.bfloat16)
                digest.update(start.contiguous().view(torch.int16).numpy().tobytes())
        elif hasattr(part, "get_vocab"):
            digest.update(name.encode() + atomic.canonical_json(part.get_vocab()))
    return f"sha256:{digest.hexdigest()}"


def plan_recording(workload: Workload, source: Mapping[str, Any]) -> list[PlannedTrajectory]:
    """Every trajectory of the workload: the first prompts of train.txt and validation.txt, in file order.

    The call's own number of steps comes first, then each of `record.step_counts` with the first of the same
    prompts and their noise. Prompt n of `train` has the seeds offset + 2 * (n * seeds_per_prompt + j), `validation`
    the odd numbers between: appending prompts to either file leaves every other trajectory's seed, and so its key,
    as it was.

    Args:
        source: what `describe_source` says of the pipeline.

    Raises:
        PromptError: unusable files, prompts in two splits, or fewer of them than are asked for.
    """
    known = recorded_prompts(workload)
    planned = []
    for num_steps in workload.step_counts:
        for split, count in workload.num_recorded(num_steps).items():
            for index, prompt in enumerate(known[split][:count]):
                for repeat in range(workload.record.seeds_per_prompt):
                    number = index * workload.record.seeds_per_prompt + repeat
                    seed = workload.record.seed_offset + 2 * number + RECORDED_SPLITS.index(split)
                    identity = _identity(workload, source, prompt, seed, num_steps)
                    planned.append(
                        PlannedTrajectory(
                            key=trajectory_key(identity),
                            identity=identity,
                            prompt=prompt,
                            seed=seed,
                            split=split,
                            num_steps=num_steps,
                        )
                    )
    return planned


def recorded_prompts(workload: Workload) -> dict[str, list[str]]:
    """The prompts that are recorded, by split, in file order; PromptError as in `plan_recording`."""
    splits = read_splits(workload.paths.prompts)
    counts = workload.num_recorded(workload.call.num_inference_steps)
    problems = [
        f"record.{split}_prompts: {count} asked for, {split}.txt has {len(splits[split])}"
        for split, count in counts.items()
        if count > len(splits[split])
    ]
    if problems:
        raise PromptError("; ".join(problems) + "; lower the number or add prompts")
    return {split: splits[split][: counts[split]] for split in RECORDED_SPLITS}


def _identity(
    workload: Workload, source: Mapping[str, Any], prompt: str, seed: int, num_steps: int
) -> dict[str, Any]:
    batch_size = workload.record.batch_size
    return {
        **source,
        # Left out at 1: who records one by one keeps the keys there were before there was a choice.
        **({"batch_size": batch_size} if batch_size > 1 else {}),
        "call": dataclasses.asdict(workload.call) | {"num_inference_steps": num_steps},
        "dtype": workload.model.dtype,
        "format": FORMAT,
        "prompt": prompt,
        "seed": seed,
        "tap": TAP,
        "token_fraction": workload.record.token_fraction,
    }


def recorded_keys(workload: Workload, store: TrajectoryStore) -> dict[str, list[str]]:
    """The committed keys by split, in the plan's order, without loading the pipeline.

    Raises:
        PromptError: a trajectory whose prompt is in neither split, or not at its number of steps: the store
            belongs to other prompts.
    """
    known = recorded_prompts(workload)
    place = {
        (num_steps, prompt): (split, at, index)
        for at, num_steps in enumerate(workload.step_counts)
        for split, count in workload.num_recorded(num_steps).items()
        for index, prompt in enumerate(known[split][:count])
    }
    found: dict[str, list[tuple[int, int, int, str]]] = {split: [] for split in RECORDED_SPLITS}
    strangers = []
    for key in store.keys():
        record = store.record(key)
        which = len(record["timesteps"]), record["prompt"]
        if which not in place:
            strangers.append(key)
            continue
        split, at, index = place[which]
        found[split].append((at, index, record["seed"], key))
    if strangers:
        raise PromptError(
            f"{store.path} holds {len(strangers)} trajectories of prompts that are not recorded any more, "
            f"e.g. {strangers[0]}; run the record stage, which removes them"
        )
    return {split: [entry[-1] for entry in sorted(entries)] for split, entries in found.items()}


def record_batch(pipe: Any, batch: Sequence[PlannedTrajectory], workload: Workload) -> list[Trajectory]:
    """Run the pipeline once, every step full, and keep what the tap sees of each sample, in the batch's order.

    Args:
        batch: of one number of steps, at most `record.batch_size` of them; fewer are made up with copies.

    Raises:
        ValueError: a cache is enabled on the transformer, or an argument of it cannot be kept.
    """
    transformer, size = pipe.transformer, workload.record.batch_size
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("a cache is enabled on the transformer; disable it: only full steps are recorded")
    if not 0 < len(batch) <= size or len({item.num_steps for item in batch}) != 1:
        raise ValueError(f"a batch is 1 to {size} trajectories of one number of steps")
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
        raise ValueError(
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
        short = dataclasses.replace(call, num_inference_steps=_fewest_steps(call.num_inference_steps))
        sample(pipe, [planned.prompt], [planned.seed], short, output_type="latent", batch_size=1)
    return tap.conditioning


def _fewest_steps(most: int) -> int:
    # Two, where there are two: a scheduler that stretches its noise levels (Qwen-Image's) divides by zero for one.
    return min(2, most)


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
                    raise ValueError(
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
    probed = _fewest_steps(steps)
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


def missing(store: TrajectoryStore, plan: Iterable[PlannedTrajectory]) -> list[PlannedTrajectory]:
    """The part of the plan that is not committed yet, in its order, every key once."""
    have = set(store.keys())
    return list({item.key: item for item in plan if item.key not in have}.values())


def batches(todo: Iterable[PlannedTrajectory], size: int) -> list[list[PlannedTrajectory]]:
    """What a call of the pipeline each records, in the order of `todo`: at most `size`, of one number of steps."""
    alike = (list(run) for _, run in itertools.groupby(todo, key=lambda item: item.num_steps))
    return [run[start : start + size] for run in alike for start in range(0, len(run), size)]


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
        lesa.atomic.Locked: another recorder is at work on this store.
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
    return [item.key for item in plan]
