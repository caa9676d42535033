"""Which trajectories a workload's prompts and seeds ask for, and what they take of the disk."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lesa import atomic
from lesa.errors import LesaError
from lesa.models.families import TAP
from lesa.models.fingerprint import base_parameters, fingerprint
from lesa.params import Recording
from lesa.recording.prompts import PromptError, read_splits
from lesa.recording.store import TrajectoryStore, estimate_bytes, trajectory_key

RECORDED_SPLITS = ("train", "validation")
_STOCHASTIC = ("Ancestral", "SDE", "LCM", "TCD", "DDPM")  # in the names of diffusers' schedulers that add noise
_CONTENT = 1  # version of what is recorded, in every key; how it lies on disk is the store's own


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

    Raises:
        LesaError: the scheduler adds noise of its own at every step.
    """
    _require_deterministic(pipe.scheduler)
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


def _require_deterministic(scheduler: Any) -> None:
    """Refuse to record what no predictor can learn: two plain runs of one seed would differ."""
    config, name = scheduler.config, type(scheduler).__name__
    algorithm = str(config.get("algorithm_type", ""))
    if config.get("stochastic_sampling"):
        why, remedy = "stochastic_sampling is true", "set it to false in the pipeline's scheduler_config.json"
    elif algorithm.startswith("sde"):
        why, remedy = f"algorithm_type is {algorithm}", "choose one without sde in the pipeline's scheduler_config.json"
    elif any(kind in name for kind in _STOCHASTIC):
        why, remedy = "so does every scheduler of its kind", "give the pipeline a deterministic one"
    else:
        return
    raise LesaError(f"scheduler: {name} adds fresh noise at every step ({why}), which cannot be predicted; {remedy}")


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


def plan_recording(recording: Recording, source: Mapping[str, Any]) -> list[PlannedTrajectory]:
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
    known = recorded_prompts(recording)
    planned = []
    for num_steps in recording.step_counts:
        for split, count in recording.num_recorded(num_steps).items():
            for index, prompt in enumerate(known[split][:count]):
                for repeat in range(recording.record.seeds_per_prompt):
                    number = index * recording.record.seeds_per_prompt + repeat
                    seed = recording.record.seed_offset + 2 * number + RECORDED_SPLITS.index(split)
                    identity = _identity(recording, source, prompt, seed, num_steps)
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


def recorded_prompts(recording: Recording) -> dict[str, list[str]]:
    """The prompts that are recorded, by split, in file order; PromptError as in `plan_recording`."""
    splits = read_splits(recording.prompts)
    counts = recording.num_recorded(recording.call.num_inference_steps)
    problems = [
        f"record.{split}_prompts: {count} asked for, {split}.txt has {len(splits[split])}"
        for split, count in counts.items()
        if count > len(splits[split])
    ]
    if problems:
        raise PromptError("; ".join(problems) + "; lower the number or add prompts")
    return {split: splits[split][: counts[split]] for split in RECORDED_SPLITS}


def _identity(
    recording: Recording, source: Mapping[str, Any], prompt: str, seed: int, num_steps: int
) -> dict[str, Any]:
    batch_size = recording.record.batch_size
    return {
        **source,
        # Left out at 1: who records one by one keeps the keys there were before there was a choice.
        **({"batch_size": batch_size} if batch_size > 1 else {}),
        "call": dataclasses.asdict(recording.call) | {"num_inference_steps": num_steps},
        "dtype": recording.model.dtype,
        "format": _CONTENT,
        "prompt": prompt,
        "seed": seed,
        "tap": TAP,
        "token_fraction": recording.record.token_fraction,
    }


def fewest_steps(most: int) -> int:
    # Two, where there are two: a scheduler that stretches its noise levels (Qwen-Image's) divides by zero for one.
    return min(2, most)


def missing(store: TrajectoryStore, plan: Iterable[PlannedTrajectory]) -> list[PlannedTrajectory]:
    """The part of the plan that is not committed yet, in its order, every key once."""
    have = set(store.keys())
    return list({item.key: item for item in plan if item.key not in have}.values())


def batches(todo: Iterable[PlannedTrajectory], size: int) -> list[list[PlannedTrajectory]]:
    """What a call of the pipeline each records, in the order of `todo`: at most `size`, of one number of steps."""
    alike = (list(run) for _, run in itertools.groupby(todo, key=lambda item: item.num_steps))
    return [run[start : start + size] for run in alike for start in range(0, len(run), size)]
