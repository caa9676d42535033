"""The trajectory store: Zarr v3, one group a trajectory, one shard an array, addressed by what was recorded.

    <store>/zarr.json                     version of this format
    <store>/<key>/zarr.json               commit record: identity, digests, sigmas; and the arrays' metadata
    <store>/<key>/features/c.0.0.0.0      one shard, one inner chunk a step, bfloat16 as uint16
    <store>/<key>/context/c.0             float32, everything small; its attributes say what lies where

A trajectory is built in `<key>.<pid>.<n>.partial`, synced and renamed: if `<key>` exists it is whole, and its
key is the hash of everything that determines it, so recording twice changes nothing. The format is closed:
metadata is compared with the only one this module writes, before anything is allocated. What it does not
promise: who wrote it. Shapes: S steps, R branches, L tokens, C channels.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lesa import atomic, locks
from lesa.models.families import TAP
from lesa.recording import store_format as form
from lesa.recording.store_format import StoreError, read_context, read_features

_BLOCK = 4096  # bytes; what a file takes on disk is a multiple
_KEY = re.compile(r"[0-9a-f]{32}")
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ELOOP)  # gone, or something else in its place


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One prompt and seed through every step of the sampler."""

    identity: dict[str, Any]  # everything that determines it, JSON; its hash is the key
    prompt: str
    seed: int
    features: torch.Tensor  # bfloat16 [S, R, L, C] at the tap; L the kept tokens
    sigmas: torch.Tensor  # float32 [S + 1], noise levels, the last is what the run ends at
    timesteps: torch.Tensor  # float32 [S], the scheduler's
    context: dict[str, torch.Tensor]  # what training needs beside it; any shapes
    token_index: torch.Tensor | None = None  # int64 [L] increasing, which tokens were kept; None: all
    call_kwargs: list[dict[str, Any]] = field(
        default_factory=list
    )  # a branch each: arguments that are no tensors


def trajectory_key(identity: Mapping[str, Any]) -> str:
    """First 32 hexadecimal digits of the SHA-256 of the identity's canonical JSON."""
    return atomic.sha256_bytes(atomic.canonical_json(identity))[:32]


def estimate_bytes(
    num_trajectories: int,
    *,
    num_steps: int,
    num_branches: int,
    num_tokens: int,  # kept ones
    channels: int,
    context_values: int,  # float32 values beside the features
) -> int:
    """Bytes on disk, to within the metadata's few kilobytes a trajectory."""
    features = form.features_bytes((num_steps, num_branches, num_tokens, channels))
    metadata = 2 * _BLOCK + num_tokens * 8  # a kept token is a line of the record
    return num_trajectories * (_blocks(features) + _blocks(form.context_bytes(context_values)) + metadata)


def _root_metadata(format: int) -> dict[str, Any]:
    return form.group_metadata({"format": format, "kind": "lesa trajectories", "tap": TAP})


def _readable(metadata: Path) -> dict[str, Any] | None:
    """What a zarr.json says; None where there is none, or none that can be read."""
    try:
        return form.read_metadata(metadata)
    except StoreError:
        return None


def _blocks(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK


class TrajectoryStore:
    """A folder of trajectories. Reading verifies; several processes may write, a trajectory each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path) -> TrajectoryStore:
        """The store at `path` to be written to, made if there is none; an existing one is checked like `open` does.

        One of an older format keeps its trajectories and takes new ones beside them: its root then says the newer
        format, so that older versions refuse it whole.
        """
        path = Path(path)
        atomic.make_dirs(path)
        root = path / "zarr.json"
        found = _readable(root)
        if found is not None:
            cls.open(path)
        if found != _root_metadata(form.FORMAT):  # also where it cannot be read: it says nothing but the format
            atomic.write_json(root, _root_metadata(form.FORMAT))
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> TrajectoryStore:
        """The store at `path`; StoreError if there is none or its version is another."""
        path = Path(path)
        if not (path / "zarr.json").exists():
            raise StoreError(
                f"{path} is not a trajectory store (it has no zarr.json); run the record stage first"
            )
        got = form.read_metadata(path / "zarr.json")
        if not any(got == _root_metadata(format) for format in form.FILES):
            newest = form.short(_root_metadata(form.FORMAT))
            raise StoreError(
                f"{path}: got {form.short(got)}, this version reads {newest} and older; upgrade, or where "
                "its zarr.json alone is damaged delete that file: the record stage writes it anew"
            )
        return cls(path)

    def __contains__(self, key: str) -> bool:
        return _KEY.fullmatch(key) is not None and (self.path / key).is_dir()

    def keys(self) -> list[str]:
        """Keys of the committed trajectories, sorted."""
        return sorted(entry.name for entry in os.scandir(self.path) if _KEY.fullmatch(entry.name))

    def state(self) -> str:
        """SHA-256 over the states of all trajectories: as long as it stays, so do their bytes."""
        return atomic.sha256_bytes("\n".join(f"{key} {self.state_of(key)}" for key in self.keys()).encode())

    def state_of(self, key: str) -> str:
        """SHA-256 over name, size, inode and times of change of a trajectory's files, none of which is read."""
        return atomic.sha256_bytes("\n".join(_file_states(self.path / key)).encode())

    @contextmanager
    def writer_lock(self) -> Iterator[None]:
        """Held by whoever fills or prunes the store; `locks.Locked` names the holder's pid."""
        with locks.file_lock(self.path.with_name(self.path.name + ".lock")):
            yield

    def sweep(self) -> list[str]:
        """Delete what dead writers left unfinished; names. Under the writer lock."""
        return atomic.sweep_partials(self.path)

    def require_readable(self, keys: Iterable[str]) -> None:
        """Refuse to call damaged what the disk or this user's rights keep from being read: OSError naming the file."""
        for key in keys:
            try:
                for name in atomic.regular_files(self.path / key):
                    atomic.sha256_file(self.path / key / name)
            except OSError as error:
                if error.errno in _DAMAGE:
                    continue
                raise OSError(
                    error.errno,
                    f"{error.strerror}; trajectory {key} is not recorded again as long as it may be whole: see to the "
                    "disk and to this user's rights, or delete its folder",
                    error.filename,
                ) from error

    def remove(self, keys: Iterable[str]) -> None:
        """Delete trajectories, and what only has the name of one. Under the writer lock."""
        for key in keys:
            folder = self.path / key
            if folder.is_dir() and not folder.is_symlink():
                atomic.remove_dir(folder)
            else:
                folder.unlink()

    def commit(self, trajectory: Trajectory) -> str:
        """Write a trajectory durably and return its key; nothing happens if it is there already.

        Raises:
            StoreError: NaN or infinities (key, step and tap named), or shapes that do not belong together.
            OSError: the disk does not take it; nothing is committed then.
        """
        key = trajectory_key(trajectory.identity)
        if key in self:
            return key
        _check_trajectory(key, trajectory)
        features = trajectory.features.contiguous().view(torch.uint16).numpy()
        context, layout = form.pack(key, trajectory.context)
        record = {
            "call_kwargs": trajectory.call_kwargs,
            "digests": {"context": form.digest(context), "features": form.digest(features)},
            "format": form.FORMAT,
            "identity": trajectory.identity,
            "key": key,
            "prompt": trajectory.prompt,
            "seed": trajectory.seed,
            "sigmas": trajectory.sigmas.tolist(),
            "timesteps": trajectory.timesteps.tolist(),
            "token_index": None if trajectory.token_index is None else trajectory.token_index.tolist(),
        }
        try:
            with atomic.new_dir(self.path / key, replace=False) as partial:
                form.write_group(partial, record, features=features, context=context, layout=layout)
        except OSError as error:
            need = atomic.format_bytes(features.nbytes + context.nbytes)
            raise OSError(
                error.errno, f"{error.strerror} (trajectory {key} needs {need})", str(self.path)
            ) from error
        return key

    def record(self, key: str) -> dict[str, Any]:
        """The commit record: a mapping with the names in `form.RECORD`, its identity checked against the key."""
        format = self._format(key)
        metadata = form.read_metadata(self.path / key / "zarr.json")
        attributes = metadata.get("attributes")
        arrays = form.arrays_of(metadata)
        if not isinstance(attributes, dict) or metadata != form.group_metadata(attributes, arrays):
            raise StoreError(f"trajectory {key}: its zarr.json is not a Zarr v3 group's")
        form.check_record(key, attributes)
        identity = attributes["identity"]
        if attributes["format"] != format or (arrays is None) != (format == 1):
            said = attributes["format"]
            raise StoreError(f"trajectory {key}: its record says format {said!r}, its files are {format}'s")
        if trajectory_key(identity) != key or attributes["key"] != key:
            raise StoreError(f"trajectory {key}: its identity does not hash to its key; record it again")
        for name in ("prompt", "seed"):
            if attributes[name] != identity.get(name):
                raise StoreError(f"trajectory {key}: {name} differs between record and identity")
        return attributes

    def records(self) -> dict[str, dict[str, Any]]:
        """The commit record of every trajectory, by key."""
        return {key: self.record(key) for key in self.keys()}

    def features(self, key: str, record: Mapping[str, Any] | None = None) -> torch.Tensor:
        """The features, bfloat16 [S, R, L, C], verified against the digest in the record.

        Args:
            record: the trajectory's, where it was read just now.
        """
        record = self.record(key) if record is None else record
        metadata = self._array_metadata(key, "features", record["format"])
        shape = form.positive_shape(key, metadata, 4)
        form.compare(key, "features", metadata, form.features_metadata(shape, record["format"]))
        if len(record["timesteps"]) != shape[0]:
            raise StoreError(
                f"trajectory {key}: {shape[0]} steps of features, {len(record['timesteps'])} timesteps"
            )
        shard = form.SHARDS[record["format"]]["features"]
        self._check_size(key, shard, form.features_bytes(shape))
        values = read_features(key, self.path / key / shard, shape)
        form.check_digest(key, "features", values, record)
        return torch.from_numpy(values).view(torch.bfloat16)

    def context(self, key: str, record: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """The tensors kept beside the features, in their own shapes and dtypes, verified like them."""
        record = self.record(key) if record is None else record
        metadata = self._array_metadata(key, "context", record["format"])
        (size,) = form.positive_shape(key, metadata, 1)
        layout = metadata.get("attributes")
        if not isinstance(layout, dict):
            raise StoreError(f"trajectory {key}: context has no layout")
        form.compare(key, "context", metadata, form.context_metadata(size, layout, record["format"]))
        shard = form.SHARDS[record["format"]]["context"]
        self._check_size(key, shard, form.context_bytes(size))
        values = read_context(key, self.path / key / shard)
        form.check_digest(key, "context", values, record)
        return form.unpack(key, values, layout)

    def verify(self) -> list[str]:
        """Every problem of every trajectory, one line each; an empty list means all is as it was recorded."""
        return self.strangers() + [problem for key in self.keys() for problem in self.problems(key)]

    def strangers(self) -> list[str]:
        """A line for everything in the folder that is not the store's; unfinished work counts as absent."""
        names = sorted(entry.name for entry in os.scandir(self.path))
        own = {"zarr.json", *self.keys()}
        return [
            f"{name}: does not belong in a trajectory store"
            for name in names
            if name not in own and not name.endswith(atomic.PARTIAL)
        ]

    def problems(self, key: str) -> list[str]:
        """What is wrong with a trajectory, once every byte of it is read; nothing where it is as it was recorded."""
        problems: list[str] = []
        for read in (self.features, self.context):
            try:
                read(key)
            except (StoreError, OSError) as error:
                if str(error) not in problems:
                    problems.append(str(error))
        return problems

    def _format(self, key: str) -> int:
        """The trajectory's format, once its folder is known to hold that one's files and nothing else, no links."""
        if not _KEY.fullmatch(key):
            raise StoreError(f"{key!r} is not a trajectory key (32 hexadecimal digits)")
        folder = self.path / key
        try:
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise StoreError(f"trajectory {key}: not a folder")
            found = atomic.regular_files(folder)
        except FileNotFoundError:
            raise StoreError(f"trajectory {key} is not in {self.path}") from None
        except OSError as error:
            raise StoreError(f"trajectory {key}: {error.strerror}: {error.filename}") from None
        # The one it is nearest to: of what is missing or too many, the message names the least there is.
        format = min(form.FILES, key=lambda format: (len(set(form.FILES[format]) ^ set(found)), -format))
        if tuple(found) != form.FILES[format]:
            missing = ", ".join(sorted(set(form.FILES[format]) - set(found))) or "nothing"
            extra = ", ".join(sorted(set(found) - set(form.FILES[format]))) or "nothing"
            raise StoreError(f"trajectory {key}: {missing} missing, {extra} too many; record it again")
        return format

    def _array_metadata(self, key: str, name: str, format: int) -> dict[str, Any]:
        if format == 1:
            return form.read_metadata(self.path / key / name / "zarr.json")
        arrays = form.arrays_of(form.read_metadata(self.path / key / "zarr.json"))
        if arrays is None:
            raise StoreError(f"trajectory {key}: its zarr.json has no metadata of its arrays; record it again")
        array: dict[str, Any] = arrays[name]
        return array

    def _check_size(self, key: str, file: str, expected: int) -> None:
        got = (self.path / key / file).lstat().st_size
        if got != expected:
            raise StoreError(
                f"trajectory {key}: {file} has {got} bytes, its shape makes {expected}; record it again"
            )


def _file_states(folder: Path, prefix: str = "") -> list[str]:
    """A line for everything under `folder` but folders: what tells that a file was written or replaced."""
    lines: list[str] = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                lines += _file_states(Path(entry.path), f"{prefix}{entry.name}/")
                continue
            found = entry.stat(follow_symlinks=False)
            changed = f"{found.st_mtime_ns} {found.st_ctime_ns}"
            lines.append(f"{prefix}{entry.name} {found.st_mode} {found.st_size} {found.st_ino} {changed}")
    except OSError as error:  # gone or unreadable: reading the trajectory says more
        lines.append(f"{prefix} {error.errno}")
    return lines


def _check_trajectory(key: str, trajectory: Trajectory) -> None:
    features, tap = trajectory.features, trajectory.identity.get("tap")
    problems = []
    if features.dtype != torch.bfloat16 or features.ndim != 4 or features.numel() == 0:
        problems.append(
            f"features must be bfloat16 [S, R, L, C], got {features.dtype} {list(features.shape)}"
        )
    else:
        finite = torch.isfinite(features).flatten(1).all(dim=1)
        if not finite.all():
            steps = (~finite).nonzero().flatten().tolist()
            problems.append(f"NaN or infinity at step {steps[0]} ({len(steps)} steps) of the feature ({tap})")
        if trajectory.sigmas.shape != (features.shape[0] + 1,):
            problems.append(f"sigmas must be [{features.shape[0] + 1}], got {list(trajectory.sigmas.shape)}")
        if trajectory.timesteps.shape != (features.shape[0],):
            problems.append(
                f"timesteps must be [{features.shape[0]}], got {list(trajectory.timesteps.shape)}"
            )
        kept = trajectory.token_index
        if kept is not None and kept.shape != (features.shape[2],):
            problems.append(f"token_index must be [{features.shape[2]}], got {list(kept.shape)}")
    context = {"sigmas": trajectory.sigmas, "timesteps": trajectory.timesteps, **trajectory.context}
    for name, tensor in context.items():
        if not torch.isfinite(tensor).all():
            problems.append(f"NaN or infinity in {name}")
    for name, value in (("prompt", trajectory.prompt), ("seed", trajectory.seed)):
        if trajectory.identity.get(name) != value:
            problems.append(f"{name} is {value!r} and {trajectory.identity.get(name)!r} in the identity")
    if problems:
        raise StoreError(f"trajectory {key} is not recorded: " + "; ".join(problems))
