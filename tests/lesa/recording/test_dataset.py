"""Recorded trajectories as training reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lesa.errors import LesaError
from lesa.recording import dataset as trajectories
from lesa.recording.dataset import draw, load_trajectories, recorded_splits, trajectories_digest
from lesa.recording.store import TrajectoryStore
from lesa.recording.store_format import StoreError
from tests.helpers.training_set import CHANNELS, OUTPUTS, STEPS, TOKENS, make_store, sigmas, workload


def test_one_entry_a_trajectory_and_branch(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", {"b": 1, "a": 2, "other": 3}, branches=2, seeds=2)
    data = load_trajectories(tmp_path / "s.zarr", ["b", "a"])
    assert len(data) == 8 and data.channels == CHANNELS
    assert data.prompts == ("a",) * 4 + ("b",) * 4
    assert data.seeds == (0, 0, 1, 1) * 2 and data.branch == (0, 1) * 4
    assert data.first_branch_rows() == [0, 2, 4, 6]
    assert torch.equal(data.sigmas, sigmas())
    assert data.temb.shape == (8, STEPS, CHANNELS) and data.latents.shape == (8, TOKENS, OUTPUTS)
    for row, key in enumerate(data.keys):
        assert store.record(key)["prompt"] == data.prompts[row]
        expected = store.features(key)[[4, 0], data.branch[row]].float()
        assert torch.equal(data.feature_batch([row], [4, 0])[0], expected)
        context = store.context(key)
        assert torch.equal(data.temb[row], context["temb"][:, data.branch[row]])
        assert torch.equal(data.latents[row], context["latents_final"][0])


def test_what_does_not_fit_in_memory_is_read_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s.zarr", {"a": 1, "b": 2}, branches=2)
    held = load_trajectories(tmp_path / "s.zarr", ["a", "b"])
    monkeypatch.setattr(trajectories, "MEMORY_LIMIT", 100)
    read = load_trajectories(tmp_path / "s.zarr", ["a", "b"])
    assert held.features is not None and read.features is None
    for indices, steps in (([0, 1, 2, 3], [0, 5]), ([3, 1], [11]), ([2], list(range(STEPS)))):
        assert torch.equal(held.feature_batch(indices, steps), read.feature_batch(indices, steps))
    assert read.channels == held.channels


def test_every_record_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and checking a record takes longer than its features do; a job reads hundreds."""
    store = make_store(tmp_path / "s.zarr", {"a": 1, "b": 2, "c": 3})
    read: list[str] = []
    real = TrajectoryStore.record

    def noted(self: TrajectoryStore, key: str) -> dict[str, Any]:
        read.append(key)
        return real(self, key)

    monkeypatch.setattr(TrajectoryStore, "record", noted)
    data = load_trajectories(tmp_path / "s.zarr", ["a", "b"])
    assert sorted(read) == sorted(store.keys()) and len(data) == 2
    records = store.records()
    read.clear()
    again = load_trajectories(tmp_path / "s.zarr", ["a", "b"], records=records)
    assert not read and again.keys == data.keys and again.features is not None and data.features is not None
    assert torch.equal(again.features, data.features)


def test_prompts_without_a_trajectory_are_named(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", {"a": 1})
    with pytest.raises(ValueError, match="2 of 3 prompts have no trajectory, e.g. 'b'; run the record stage"):
        load_trajectories(tmp_path / "s.zarr", ["a", "c", "b"])
    with pytest.raises(StoreError, match="is not a trajectory store"):
        load_trajectories(tmp_path / "none.zarr", ["a"])


def test_damage_is_never_trained_on(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", {"a": 1})
    (key,) = store.keys()
    shard = store.path / key / "features/c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=key):
        load_trajectories(store.path, ["a"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layout: layout.update(tamb=layout.pop("temb")), "needs temb \\[12, 1, D\\] and latents_final"),
        (lambda layout: layout["temb"].update(shape=[1, STEPS, CHANNELS]), "needs temb"),
        (lambda layout: layout["temb"].update(dtype="int32"), "needs temb"),
        (lambda layout: layout["latents_final"].update(shape=[TOKENS, 1, OUTPUTS]), "needs temb"),
        (lambda layout: layout["latents_final"].update(shape=[1, OUTPUTS, TOKENS]), "of different sizes of features"),
    ],
)
def test_a_context_that_does_not_belong_to_the_features_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    """What its values are called is covered by no digest."""
    store = make_store(tmp_path / "s.zarr", {"a": 1, "b": 2})
    path = store.path / store.keys()[0] / "zarr.json"
    document = json.loads(path.read_text())
    change(document["consolidated_metadata"]["metadata"]["context"]["attributes"])
    path.write_text(json.dumps(document))
    with pytest.raises(LesaError, match=said):
        load_trajectories(store.path, ["a", "b"])


def test_the_digest_is_of_the_keys_and_of_which_split_they_are_in(tmp_path: Path) -> None:
    prompts = {str(i): i for i in range(4)}
    make_store(tmp_path / "s.zarr", prompts)
    by_key = sorted(prompts, key=lambda p: load_trajectories(tmp_path / "s.zarr", [p]).keys)

    def digest(train: list[str], validation: list[str]) -> str:
        return trajectories_digest(
            *(load_trajectories(tmp_path / "s.zarr", prompts) for prompts in (train, validation))
        )

    whole = digest(by_key[:2], by_key[2:])
    assert whole == digest(by_key[1::-1], by_key[:1:-1])
    assert whole != digest(by_key[:2], by_key[2:3])
    assert whole != digest(by_key[:3], by_key[3:])  # the same keys in the same order, another split


def test_draws_are_distinct_and_seeded() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(4)

    drawn = draw(generator(), 10, 4)
    assert drawn == draw(generator(), 10, 4)
    assert len(set(drawn)) == 4 and all(0 <= i < 10 for i in drawn)
    assert sorted(draw(generator(), 3, 8)) == [0, 1, 2]


def test_each_split_is_read_for_its_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training first; of each split the first prompts, as many as are recorded."""
    splits = {"train": ["a", "b", "c"], "validation": ["d", "e"], "test": ["f"]}
    monkeypatch.setattr(trajectories, "read_splits", lambda folder: splits)
    monkeypatch.setattr(trajectories, "load_trajectories", lambda path, prompts, num_steps, records: prompts)
    monkeypatch.setattr(trajectories, "_open_store", lambda workload: trajectories._Verified(records={}, sets={}))
    recorded = workload(record={"train_prompts": 2, "validation_prompts": 1})
    assert recorded_splits(recorded.recording) == (("a", "b"), ("d",))
