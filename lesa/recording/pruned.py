"""Trajectories that a plan no longer names: kept beside the store for a while, for a plan that names them again.

    <store>.pruned/<key>/    as it lay in the store, dated when it was moved here

They are no part of the store, nor of its hash. What ends a stay: KEEP_DAYS, more bytes than the store had when it was
last pruned (the oldest go first), a recording that needs the disk, `lesa store drop-pruned`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from lesa import atomic
from lesa.recording.store import TrajectoryStore
from lesa.recording.store_format import StoreError

KEEP_DAYS = 30
_DAY = 86400.0  # seconds


class PrunedTrajectories:
    """What was pruned from one store. Under the store's writer lock."""

    def __init__(self, store: TrajectoryStore) -> None:
        self._store = store
        whole = store.path.resolve()  # where the store really is: on the same disk, so that moving is renaming
        self.path = whole.with_name(whole.name + ".pruned")

    def keys(self) -> list[str]:
        """Keys of what is kept here, those that were pruned first at the front."""
        try:
            found = [entry for entry in os.scandir(self.path) if not entry.name.endswith(atomic.PARTIAL)]
        except FileNotFoundError:
            return []
        return [entry.name for entry in sorted(found, key=lambda entry: (entry.stat().st_mtime_ns, entry.name))]

    def size(self, keys: Iterable[str]) -> int:
        """Bytes of those of `keys` that are kept here."""
        return sum(_size(self.path / key) for key in set(keys) & set(self.keys()))

    def prune(self, keep: set[str]) -> list[str]:
        """Move every trajectory of the store that is not in `keep` here, once all of `keep` exist; their keys."""
        present = self._store.keys()
        missing = sorted(keep - set(present))
        if missing:
            raise StoreError(
                f"{self._store.path}: {len(missing)} keys to keep are not recorded, e.g. {missing[0]}; not pruned"
            )
        moved = [key for key in present if key not in keep]
        if moved:
            most = sum(_size(self._store.path / key) for key in present)
            atomic.make_dirs(self.path)
            for key in moved:
                if (self.path / key).exists():
                    atomic.remove_dir(self.path / key)
                os.rename(self._store.path / key, self.path / key)
                os.utime(self.path / key)
            atomic.fsync_dir(self.path)
            atomic.fsync_dir(self._store.path)
            self._drop_oldest_above(most)
        return moved

    def restore(self, keys: Iterable[str]) -> list[str]:
        """Move those of `keys` that are here and not in the store back to it; which. They are still to be verified."""
        here = set(self.keys())
        moved = sorted(key for key in set(keys) & here if key not in self._store)
        for key in moved:
            os.rename(self.path / key, self._store.path / key)
        if moved:
            atomic.fsync_dir(self._store.path)
        return moved

    def drop(self, keys: Iterable[str] | None = None) -> list[str]:
        """Delete these, None: everything; which."""
        dropped = self.keys() if keys is None else list(keys)
        for key in dropped:
            atomic.remove_dir(self.path / key)
        if self.path.is_dir():
            atomic.sweep_partials(self.path)
            if not os.listdir(self.path):
                self.path.rmdir()
        return dropped

    def drop_old(self) -> list[str]:
        """Delete what has been here for KEEP_DAYS; which."""
        before = time.time() - KEEP_DAYS * _DAY
        return self.drop([key for key in self.keys() if (self.path / key).stat().st_mtime < before])

    def make_room(self, num_bytes: int) -> list[str]:
        """Delete the oldest until the disk has `num_bytes` free, or nothing is left here; which."""
        dropped = []
        for key in self.keys():
            if shutil.disk_usage(self._store.path).free >= num_bytes:
                break
            dropped += self.drop([key])
        return dropped

    def _drop_oldest_above(self, num_bytes: int) -> None:
        sizes = {key: _size(self.path / key) for key in self.keys()}
        excess = sum(sizes.values()) - num_bytes
        for key, size in sizes.items():
            if excess <= 0:
                break
            self.drop([key])
            excess -= size


def _size(folder: Path) -> int:
    """Bytes of the files under `folder`."""
    return sum((folder / name).lstat().st_size for name in atomic.regular_files(folder))
