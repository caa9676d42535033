"""What a recording makes of a store that is there: damage is repaired, what a plan drops is kept and taken back."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from lesa import atomic
from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.recording.catalogue import catalogue_of
from lesa.recording.ledger import ledger_of
from lesa.recording.pruned import PrunedTrajectories
from lesa.recording.store import Trajectory, TrajectoryStore
from lesa.recording.store_format import StoreError
from tests.helpers.digests import tree_digest
from tests.helpers.recording import record
from tests.helpers.tiny import tiny_repository

SHARD, RECORD = "features/c.0.0.0.0", "zarr.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny repository whose store is recorded."""
    root = tiny_repository(tmp_path_factory.mktemp("made"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        workload = load_params()
        assert record(workload, load_pipeline(workload.model, workload.resources.device))["recorded"] == 6
    return root


@pytest.fixture(scope="module")
def pipe(made: Path) -> FluxPipeline:
    workload = load_params(made / "params.yaml")
    model = dataclasses.replace(workload.model, source=str(made / workload.model.source))
    return load_pipeline(model, workload.resources.device)


@pytest.fixture
def workload(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workload:
    """In a copy of that repository: its files are new there, but a recording has told its ledger so."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "repository"))
    return load_params()


@pytest.fixture
def store(workload: Workload, pipe: FluxPipeline) -> TrajectoryStore:
    store = TrajectoryStore.open(workload.paths.trajectories)
    again = record(workload, pipe, store)
    assert (again["recorded"], again["repaired"]) == (0, 0)
    return store


def fewer(workload: Workload, train_prompts: int) -> Workload:
    return dataclasses.replace(
        workload, record=dataclasses.replace(workload.record, train_prompts=train_prompts)
    )


def flip(file: str, place: int = 100) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[place] ^= 1
        (folder / file).write_bytes(data)

    return act


def change_noise_level(folder: Path) -> None:
    """Damage that leaves good JSON, in a part of the record that no digest covers."""
    document = json.loads((folder / RECORD).read_text())
    document["attributes"]["sigmas"][3] += 1e-3
    (folder / RECORD).write_text(json.dumps(document))


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def replace_by_link(folder: Path) -> None:
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte of a shard": flip(SHARD),
    "a byte of the context": flip("context/c.0"),
    "a byte of the record": flip(RECORD),
    "a noise level of the record": change_noise_level,
    "a truncated shard": lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1]),
    "a lost shard": lambda folder: (folder / SHARD).unlink(),
    "a stranger's file": lambda folder: (folder / "note.txt").write_text(""),
    "a file in its place": replace_by_file,
    "a link in its place": replace_by_link,
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_trajectory_is_recorded_anew(
    workload: Workload, pipe: FluxPipeline, store: TrajectoryStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, catalogue, key = tree_digest(store.path), catalogue_of(store.path).read_bytes(), store.keys()[2]
    DAMAGE[damage](store.path / key)
    done = record(workload, pipe, store)
    assert (done["planned"], done["recorded"], done["repaired"], done["pruned"]) == (6, 1, 1, 0)
    assert tree_digest(store.path) == before and catalogue_of(store.path).read_bytes() == catalogue
    assert f"damaged, recorded anew: trajectory {key}" in caplog.text
    again = record(workload, pipe, store)
    assert (again["recorded"], again["repaired"]) == (0, 0)


def test_what_cannot_be_read_is_not_taken_for_damaged(
    workload: Workload, pipe: FluxPipeline, store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that is not mounted whole, rights that were taken away: nothing that may be good is deleted."""
    before, shard = tree_digest(store.path), store.path / store.keys()[0] / SHARD
    true = atomic.open_regular

    def refuse(path: str | Path) -> Any:
        if Path(path) == shard:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return true(path)

    shard.touch()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "open_regular", refuse)
        with pytest.raises(OSError, match="Input/output error; trajectory .* is not recorded again"):
            record(workload, pipe, store)
    assert tree_digest(store.path) == before
    assert record(workload, pipe, store)["recorded"] == 0


def test_without_a_ledger_everything_is_read(workload: Workload, pipe: FluxPipeline, store: TrajectoryStore) -> None:
    before, key = tree_digest(store.path), store.keys()[0]
    flip(SHARD)(store.path / key)
    ledger_of(store.path).unlink()
    assert record(workload, pipe, store)["repaired"] == 1
    assert tree_digest(store.path) == before
    ledger_of(store.path).write_text("{")  # one that cannot be read costs a reading of the store, no more
    assert record(workload, pipe, store)["recorded"] == 0
    assert len(json.loads(ledger_of(store.path).read_text())["trajectories"]) == 6


def test_the_store_is_read_once_and_then_only_what_was_touched(
    workload: Workload, pipe: FluxPipeline, store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    true = TrajectoryStore.problems
    monkeypatch.setattr(TrajectoryStore, "problems", lambda self, key: (read.append(key), true(self, key))[1])
    record(workload, pipe, store)
    assert read == []
    key = store.keys()[1]
    (store.path / key / SHARD).touch()
    done = record(workload, pipe, store)
    assert read == [key] and done["recorded"] == 0


def test_another_recording_of_the_same_key_is_taken_as_it_is(
    workload: Workload, pipe: FluxPipeline, store: TrajectoryStore
) -> None:
    """What DVC checks out was recorded on another machine, whose last bits may differ."""
    key = store.keys()[0]
    said, features, context = store.record(key), store.features(key), store.context(key)
    store.remove([key])
    store.commit(
        Trajectory(
            identity=said["identity"],
            prompt=said["prompt"],
            seed=said["seed"],
            features=features * 1.01,
            sigmas=torch.tensor(said["sigmas"]),
            timesteps=torch.tensor(said["timesteps"]) + 1e-3,
            context=context,
            call_kwargs=said["call_kwargs"],
        )
    )
    other = tree_digest(store.path)
    assert record(workload, pipe, store)["recorded"] == 0 and tree_digest(store.path) == other


def test_damage_while_others_are_recorded_is_not_catalogued(
    workload: Workload, pipe: FluxPipeline, store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, lost = store.keys()[:2]
    before = tree_digest(store.path)
    shutil.rmtree(store.path / lost)
    catalogue_of(store.path).unlink()
    commit = TrajectoryStore.commit

    def damaging(self: TrajectoryStore, trajectory: Any) -> str:
        flip(SHARD)(self.path / victim)
        return commit(self, trajectory)

    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryStore, "commit", damaging)
        with pytest.raises(StoreError, match=f"1 trajectories were damaged while.*{victim}.*Run the record stage"):
            record(workload, pipe, store)
    assert not catalogue_of(store.path).exists()
    assert record(workload, pipe, store)["repaired"] == 1 and tree_digest(store.path) == before


def test_a_damaged_root_is_written_anew(workload: Workload, pipe: FluxPipeline, store: TrajectoryStore) -> None:
    before = tree_digest(store.path)
    for text in ("", "{", '{"a": 1, "a": 2}'):
        (store.path / "zarr.json").write_text(text)
        with pytest.raises(StoreError):
            TrajectoryStore.open(store.path)
        assert record(workload, pipe, TrajectoryStore.create(store.path))["recorded"] == 0
        assert tree_digest(store.path) == before
    (store.path / "zarr.json").write_text('{"attributes": {"format": 3}}')  # a newer version's, or damage: not for us
    with pytest.raises(StoreError, match="delete that file"):
        TrajectoryStore.create(store.path)
    (store.path / "zarr.json").unlink()
    assert record(workload, pipe, TrajectoryStore.create(store.path))["recorded"] == 0
    assert tree_digest(store.path) == before


@pytest.fixture
def pruned(store: TrajectoryStore) -> Iterator[PrunedTrajectories]:
    yield PrunedTrajectories(store)


def test_a_plan_that_shrinks_and_grows_again_records_nothing(
    workload: Workload,
    pipe: FluxPipeline,
    store: TrajectoryStore,
    pruned: PrunedTrajectories,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, keys = tree_digest(store.path), set(store.keys())
    caplog.set_level(logging.WARNING)
    small = record(fewer(workload, 2), pipe, store)
    assert (small["planned"], small["recorded"], small["pruned"]) == (4, 0, 2)
    assert set(pruned.keys()) == keys - set(store.keys()) and len(store.keys()) == 4
    assert sorted(p.name for p in store.path.iterdir()) == [*store.keys(), "zarr.json"]  # what DVC hashes: the plan
    assert "2 trajectories that the plan does not name any more (" in caplog.text
    assert " KiB, " in caplog.text and "s of recording) are kept" in caplog.text and "drop-pruned" in caplog.text
    large = record(workload, pipe, store)
    assert (large["planned"], large["recorded"], large["restored"], large["repaired"]) == (6, 0, 2, 0)
    assert tree_digest(store.path) == before and pruned.keys() == []


def test_what_was_damaged_while_it_was_set_aside_is_recorded_anew(
    workload: Workload, pipe: FluxPipeline, store: TrajectoryStore, pruned: PrunedTrajectories
) -> None:
    before = tree_digest(store.path)
    record(fewer(workload, 2), pipe, store)
    flip(SHARD)(pruned.path / pruned.keys()[0])
    done = record(workload, pipe, store)
    assert (done["restored"], done["repaired"], done["recorded"]) == (2, 1, 1)
    assert tree_digest(store.path) == before
