"""Trajectories that a plan dropped: moved beside the store, taken back, and what ends their stay."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from lesa.recording.pruned import KEEP_DAYS, PrunedTrajectories
from lesa.recording.store import TrajectoryStore
from lesa.recording.store_format import StoreError
from tests.helpers.digests import tree_digest
from tests.lesa.recording.test_store import trajectory


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore.create(tmp_path / "set.zarr")


@pytest.fixture
def keys(store: TrajectoryStore) -> list[str]:
    return [store.commit(trajectory(seed)) for seed in range(4)]


def age(pruned: PrunedTrajectories, key: str, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(pruned.path / key, (then, then))


def test_a_plan_is_kept_and_refused_before_it_is_complete(store: TrajectoryStore, keys: list[str]) -> None:
    pruned = PrunedTrajectories(store)
    with pytest.raises(StoreError, match="1 keys to keep are not recorded"):
        pruned.prune({keys[0], "0" * 32})
    assert len(store.keys()) == 4 and not pruned.path.exists()
    assert pruned.prune(set(keys)) == [] and not pruned.path.exists()
    assert pruned.prune({keys[1]}) == sorted({*keys} - {keys[1]})
    assert sorted(entry.name for entry in store.path.iterdir()) == sorted([keys[1], "zarr.json"])


def test_they_come_back_as_they_were(store: TrajectoryStore, keys: list[str]) -> None:
    pruned, before = PrunedTrajectories(store), tree_digest(store.path)
    states = {key: store.state_of(key) for key in keys}
    pruned.prune({keys[1]})
    assert pruned.restore([keys[0], "0" * 32]) == [keys[0]]
    assert pruned.restore(keys) == sorted(keys[2:])
    assert tree_digest(store.path) == before and store.verify() == [] and pruned.keys() == []
    assert {key: store.state_of(key) for key in keys} == states  # known by their files: nothing is to be read


def test_one_that_was_recorded_again_meanwhile_takes_the_place(store: TrajectoryStore, keys: list[str]) -> None:
    pruned = PrunedTrajectories(store)
    pruned.prune(set(keys[1:]))
    store.commit(trajectory(0))
    assert pruned.restore(keys) == []
    assert pruned.prune(set(keys[1:])) == [keys[0]] and pruned.keys() == [keys[0]]
    assert pruned.size(keys) == sum(p.stat().st_size for p in pruned.path.rglob("*") if p.is_file())


def test_their_time_is_limited(store: TrajectoryStore, keys: list[str]) -> None:
    pruned = PrunedTrajectories(store)
    pruned.prune(set(keys[2:]))
    age(pruned, keys[0], KEEP_DAYS - 1)
    age(pruned, keys[1], KEEP_DAYS + 1)
    assert pruned.drop_old() == [keys[1]] and pruned.keys() == [keys[0]]


def test_they_take_no_more_than_the_store_did_and_the_oldest_go_first(store: TrajectoryStore, keys: list[str]) -> None:
    pruned = PrunedTrajectories(store)
    pruned.prune(set(keys[2:]))  # two of four are here
    age(pruned, keys[0], 3)
    age(pruned, keys[1], 2)
    later = store.commit(trajectory(9))
    pruned.prune({later})  # three were in the store: three may stay, and the two of just now are among them
    assert pruned.keys()[0] == keys[1] and set(pruned.keys()) == {keys[1], keys[2], keys[3]}


def test_they_make_room_for_what_is_recorded(
    store: TrajectoryStore, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = PrunedTrajectories(store)
    pruned.prune({keys[3]})
    for days, key in enumerate(keys[:3]):
        age(pruned, key, 10 - days)
    free, full = [0, 0, 50], shutil.disk_usage(store.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full._replace(free=free.pop(0)))
    assert pruned.make_room(50) == keys[:2] and pruned.keys() == [keys[2]]


def test_all_of_it_is_dropped_on_request(store: TrajectoryStore, keys: list[str]) -> None:
    pruned = PrunedTrajectories(store)
    assert pruned.drop() == []
    pruned.prune({keys[3]})
    assert sorted(pruned.drop()) == sorted(keys[:3]) and not pruned.path.exists() and store.keys() == [keys[3]]


def test_a_linked_store_keeps_them_on_its_own_disk(tmp_path: Path, store: TrajectoryStore, keys: list[str]) -> None:
    link = tmp_path / "elsewhere" / "link.zarr"
    link.parent.mkdir()
    link.symlink_to(store.path)
    pruned = PrunedTrajectories(TrajectoryStore.open(link))
    pruned.prune(set(keys[1:]))
    assert pruned.path.parent == store.path.parent and pruned.keys() == [keys[0]]
