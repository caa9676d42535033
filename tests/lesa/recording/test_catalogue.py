"""The catalogue of a store: written by recording, compared by whoever reads the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lesa.errors import LesaError
from lesa.recording.catalogue import catalogue_of, check_catalogue, write_catalogue
from lesa.recording.store import TrajectoryStore
from tests.helpers.training_set import make_store


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    store = make_store(tmp_path / "toy.zarr", {"one": 1, "two": 2})
    write_catalogue(store)
    return store


def test_keys_and_digests_and_the_same_bytes_again(store: TrajectoryStore) -> None:
    path = catalogue_of(store.path)
    assert path == store.path.parent / "toy.json"
    document, first = json.loads(path.read_text()), path.read_bytes()
    assert document["format"] == 1
    assert document["trajectories"] == {key: record["digests"] for key, record in store.records().items()}
    write_catalogue(store)
    assert path.read_bytes() == first
    check_catalogue(store.path, store.records())


def test_a_store_that_has_lost_or_gained_a_trajectory_is_refused(store: TrajectoryStore, tmp_path: Path) -> None:
    lost = min(store.records())
    store.remove([lost])
    with pytest.raises(LesaError, match=f"1 not in the store, e.g. {lost}.*run the record stage"):
        check_catalogue(store.path, store.records())
    make_store(store.path, {"one": 1, "two": 2, "three": 3})
    with pytest.raises(LesaError, match="1 not in the catalogue"):
        check_catalogue(store.path, store.records())


def test_a_trajectory_with_other_digests_is_refused(store: TrajectoryStore) -> None:
    path = catalogue_of(store.path)
    document = json.loads(path.read_text())
    key = min(document["trajectories"])
    document["trajectories"][key]["features"] = "0" * 64
    path.write_text(json.dumps(document))
    with pytest.raises(LesaError, match=f"1 with other digests, e.g. {key}"):
        check_catalogue(store.path, store.records())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "does not exist"),
        ("{", "toy.json"),
        ('{"format": 2, "trajectories": {}}', "not a catalogue of format 1"),
        ('{"format": 1, "trajectories": []}', "trajectories must be a mapping"),
    ],
)
def test_no_catalogue_or_a_broken_one_is_refused_with_the_remedy(
    store: TrajectoryStore, text: str | None, reason: str
) -> None:
    path = catalogue_of(store.path)
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(LesaError, match=f"{reason}.*run the record stage"):
        check_catalogue(store.path, store.records())
