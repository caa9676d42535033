"""Recorded trajectories as training reads them. Shapes: B trajectories, S steps, L tokens, C channels, D of temb."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from lesa.errors import LesaError
from lesa.params import Recording
from lesa.recording.catalogue import check_catalogue
from lesa.recording.prompts import read_splits
from lesa.recording.store import TrajectoryStore

MEMORY_LIMIT: int | None = None  # bytes; above it features are read from the store batch by batch; None: see below
_LEAST_LIMIT = 4 << 30


def memory_limit() -> int:
    """Bytes of features that are kept in memory: a quarter of what is available, at least 4 GiB."""
    if MEMORY_LIMIT is not None:
        return MEMORY_LIMIT
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return _LEAST_LIMIT
    return max(_LEAST_LIMIT, available // 4)


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """The trajectories of one split, one entry a trajectory and branch.

    `features` is None where they are too large for memory and are read when asked for.
    """

    store: TrajectoryStore
    keys: tuple[str, ...]
    branch: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sigmas: torch.Tensor  # [S + 1], the same for all
    temb: torch.Tensor  # [B, S, D] conditioning of norm_out
    latents: torch.Tensor  # [B, ...] final latents of the unaccelerated run
    features: torch.Tensor | None  # bfloat16 [B, S, L, C]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def channels(self) -> int:
        return self.feature_batch([0], [0]).shape[-1]

    def first_branch_rows(self) -> list[int]:
        """One row of each recorded run: all guidance branches of a run lead to the same latents."""
        return [row for row, branch in enumerate(self.branch) if branch == 0]

    def feature_batch(self, indices: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        """[len(indices), len(steps), L, C] in float32."""
        if self.features is not None:
            return self.features[torch.tensor(list(indices))[:, None], torch.tensor(list(steps))].float()
        rows = [self.store.features(self.keys[i])[list(steps), self.branch[i]] for i in indices]
        return torch.stack(rows).float()


def load_trajectories(
    path: Path,
    prompts: Sequence[str],
    num_steps: int | None = None,  # of the runs wanted; None: the store has runs of one number of steps only
    records: Mapping[str, Mapping[str, Any]] | None = None,  # `TrajectoryStore.records`, where they were read just now
) -> Trajectories:
    """All trajectories of the given prompts, verified.

    Raises:
        ValueError: prompts without a trajectory, or trajectories with different noise levels, are named.
    """
    store = TrajectoryStore.open(path)
    records = store.records() if records is None else records
    if num_steps is not None:
        records = {key: record for key, record in records.items() if len(record["timesteps"]) == num_steps}
    wanted = set(prompts)
    keys = [key for key, record in records.items() if record["prompt"] in wanted]
    keys.sort(key=lambda key: (records[key]["prompt"], records[key]["seed"]))
    missing = wanted - {records[key]["prompt"] for key in keys}
    if missing:
        raise LesaError(
            f"{path}: {len(missing)} of {len(wanted)} prompts have no trajectory"
            + (f" of {num_steps} steps" if num_steps is not None else "")
            + f", e.g. {sorted(missing)[0]!r}; run the record stage"
        )
    sigmas = {tuple(records[key]["sigmas"]) for key in keys}
    if len(sigmas) != 1:
        raise LesaError(f"{path}: trajectories with {len(sigmas)} different lists of noise levels; record anew")
    rows: list[tuple[str, int]] = []
    temb, latents, features = [], [], []
    size, limit = 0, memory_limit()
    shapes: dict[tuple[tuple[int, ...], ...], str] = {}  # of features, temb and latents: the first that has them
    for key in keys:
        context, recorded = store.context(key, records[key]), store.features(key, records[key])
        shapes.setdefault(_shapes(path, key, recorded, context), key)
        for branch in range(context["temb"].shape[1]):
            rows.append((key, branch))
            temb.append(context["temb"][:, branch])
            latents.append(context["latents_final"][0])  # a trajectory is one sample
        size += recorded.numel() * recorded.element_size()
        if size <= limit:
            features += list(recorded.unbind(1))
        else:
            features = []  # what is in memory already would help nobody
    if len(shapes) != 1:
        found = "; ".join(f"{key} {[list(shape) for shape in sizes]}" for sizes, key in list(shapes.items())[:3])
        raise LesaError(f"{path}: trajectories of different sizes of features, temb and latents ({found}); record anew")
    return Trajectories(
        store=store,
        keys=tuple(key for key, _ in rows),
        branch=tuple(branch for _, branch in rows),
        prompts=tuple(records[key]["prompt"] for key, _ in rows),
        seeds=tuple(records[key]["seed"] for key, _ in rows),
        sigmas=torch.tensor(next(iter(sigmas)), dtype=torch.float32),
        temb=torch.stack(temb),
        latents=torch.stack(latents),
        features=torch.stack(features) if size <= limit else None,
    )


def _shapes(
    path: Path, key: str, features: torch.Tensor, context: Mapping[str, torch.Tensor]
) -> tuple[tuple[int, ...], ...]:
    """Sizes of features [S, R, L, C], temb [S, R, D] and final latents [1, ...].

    No digest covers which of the context's values are whose.

    Raises:
        LesaError: one is missing or does not belong to the features.
    """
    temb, latents = context.get("temb"), context.get("latents_final")
    if (
        temb is None
        or latents is None
        or not (temb.is_floating_point() and latents.is_floating_point())
        or temb.ndim != 3
        or temb.shape[:2] != features.shape[:2]
        or latents.shape[:1] != (1,)
    ):
        found = {name: list(value.shape) for name, value in sorted(context.items())}
        raise LesaError(
            f"{path}: trajectory {key} needs temb [{features.shape[0]}, {features.shape[1]}, D] and latents_final "
            f"[1, ...], its context has {str(found)[:200]}; record it again"
        )
    return tuple(features.shape), tuple(temb.shape), tuple(latents.shape)


def trajectories_digest(*sets: Trajectories) -> str:
    """Identity of the data a training run saw."""
    return hashlib.sha256("\n\n".join("\n".join(sorted(set(data.keys))) for data in sets).encode()).hexdigest()


def draw(generator: torch.Generator, count: int, size: int) -> list[int]:
    """`size` distinct indices below `count` (all of them where there are fewer)."""
    return torch.randperm(count, generator=generator)[:size].tolist()


Splits = tuple[Trajectories, Trajectories]  # training and validation


def noise_levels(others: Mapping[int, Splits]) -> dict[int, torch.Tensor]:
    """Noise levels [S + 1] by number of steps."""
    return {count: train.sigmas for count, (train, _) in others.items()}


def recorded_splits(recording: Recording) -> Splits:
    """Training and validation trajectories, verified; prompts that stand in two splits are refused."""
    steps = recording.call.num_inference_steps
    return _recorded(recording, (steps,), _open_store(recording))[steps]


def recorded_elsewhere(recording: Recording) -> dict[int, Splits]:
    """`recorded_splits` at each of `record.step_counts`."""
    return _recorded(recording, recording.record.step_counts, _open_store(recording))


def kept_splits(recording: Recording) -> Splits:
    """`recorded_splits`, read and verified once a process as long as the store's files stay as they are."""
    steps = recording.call.num_inference_steps
    return _recorded(recording, (steps,), _kept_store(recording))[steps]


def kept_elsewhere(recording: Recording) -> dict[int, Splits]:
    """`recorded_elsewhere`, kept likewise."""
    return _recorded(recording, recording.record.step_counts, _kept_store(recording))


@dataclass(frozen=True)
class _Verified:
    """What has been read of a store and found to be what was recorded."""

    records: Mapping[str, Mapping[str, Any]]
    sets: dict[tuple[tuple[str, ...], int], Trajectories]  # by prompts and number of steps


def _open_store(recording: Recording) -> _Verified:
    return _catalogued(recording.trajectories)


def _kept_store(recording: Recording) -> _Verified:
    path = recording.trajectories.resolve()
    return _store_at(path, TrajectoryStore.open(path).state())


@lru_cache(maxsize=1)
def _store_at(path: Path, state: str) -> _Verified:
    return _catalogued(path)


def _catalogued(path: Path) -> _Verified:
    records = TrajectoryStore.open(path).records()
    check_catalogue(path, records)
    return _Verified(records=records, sets={})


def _recorded(recording: Recording, step_counts: Sequence[int], store: _Verified) -> dict[int, Splits]:
    splits = read_splits(recording.prompts)

    def load(split: Literal["train", "validation"], num_steps: int) -> Trajectories:
        prompts = tuple(splits[split][: recording.num_recorded(num_steps)[split]])
        if (prompts, num_steps) not in store.sets:
            path = recording.trajectories
            store.sets[prompts, num_steps] = load_trajectories(path, prompts, num_steps, store.records)
        return store.sets[prompts, num_steps]

    return {num_steps: (load("train", num_steps), load("validation", num_steps)) for num_steps in step_counts}
