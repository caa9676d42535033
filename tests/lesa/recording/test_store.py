"""The store: what goes in comes out bit for bit, what is damaged or foreign is refused and named."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lesa.recording.store import Trajectory, TrajectoryStore, estimate_bytes, trajectory_key
from lesa.recording.store_format import StoreError
from tests.helpers.digests import tree_digest

STEPS, BRANCHES, TOKENS, CHANNELS = 5, 2, 3, 4
FEATURES, CONTEXT = "features/c.0.0.0.0", "context/c.0"  # shards of what is written
FORMAT_1 = Path(__file__).parent / "store_of_format_1"  # written by the version that wrote it: two trajectories


def trajectory(seed: int = 0, **changes: Any) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "identity": {"prompt": "a thin seven", "seed": seed, "tap": "the tap", "call": {"height": 16}},
        "prompt": "a thin seven",
        "seed": seed,
        "features": torch.randn(STEPS, BRANCHES, TOKENS, CHANNELS, generator=generator).bfloat16(),
        "sigmas": torch.linspace(1, 0, STEPS + 1),
        "timesteps": torch.linspace(1000, 200, STEPS),
        "context": {
            "temb": torch.randn(STEPS, BRANCHES, CHANNELS, generator=generator),
            "mask": torch.tensor([[True, False]]),
            "ids": torch.arange(6).reshape(2, 3),
            "half": torch.randn(3, generator=generator).bfloat16(),
            "scalar": torch.tensor(3.5),
        },
        "call_kwargs": [{"return_dict": False}, {"return_dict": False}],
    }
    return Trajectory(**(values | changes))


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore.create(tmp_path / "set.zarr")


def test_a_trajectory_comes_back_bit_for_bit(store: TrajectoryStore) -> None:
    special = torch.tensor([0.0, -0.0, 1e-40, 3.3e38, -3.3e38, 65504.0 * 2]).bfloat16()
    features = trajectory().features.clone()
    features.view(-1)[:6] = special
    kept = trajectory(features=features, token_index=torch.tensor([1, 4, 7]))
    key = store.commit(kept)
    back = TrajectoryStore.open(store.path)
    assert torch.equal(back.features(key).view(torch.int16), features.view(torch.int16))
    context = back.context(key)
    assert set(context) == set(kept.context)
    for name, tensor in kept.context.items():
        assert context[name].dtype == tensor.dtype and torch.equal(context[name], tensor), name
    record = back.record(key)
    assert record["identity"] == kept.identity and record["prompt"] == "a thin seven"
    assert torch.equal(torch.tensor(record["sigmas"]), kept.sigmas)
    assert torch.equal(torch.tensor(record["timesteps"]), kept.timesteps)
    assert record["token_index"] == [1, 4, 7]
    assert back.verify() == []


@pytest.mark.parametrize("prompt", ["\U0001f469\u200d\U0001f52c in a lab", "\u0645\u06cc\u200c\u062e", "x" * 4000])
def test_any_prompt_that_a_set_may_hold_is_read_back(store: TrajectoryStore, prompt: str) -> None:
    identity = trajectory().identity | {"prompt": prompt}
    key = store.commit(trajectory(identity=identity, prompt=prompt))
    assert store.record(key)["prompt"] == prompt and store.verify() == []


def test_the_key_is_the_identity_and_recording_twice_changes_nothing(store: TrajectoryStore) -> None:
    one = trajectory()
    key = store.commit(one)
    before = tree_digest(store.path)
    inode = (store.path / key / "zarr.json").stat().st_ino
    assert store.commit(one) == key == trajectory_key(one.identity)
    assert trajectory_key({"b": 1, "a": 2}) == trajectory_key({"a": 2, "b": 1})
    assert trajectory_key(one.identity) != trajectory_key(trajectory(1).identity)
    assert tree_digest(store.path) == before
    assert (store.path / key / "zarr.json").stat().st_ino == inode


def test_two_stores_of_the_same_trajectories_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = TrajectoryStore.create(tmp_path / "a.zarr"), TrajectoryStore.create(tmp_path / "b.zarr")
    for seed in (0, 1, 2):
        first.commit(trajectory(seed))
    for seed in (2, 0, 1):
        second.commit(trajectory(seed))
    assert tree_digest(first.path) == tree_digest(second.path)
    assert first.keys() == second.keys() == sorted(first.keys())


def test_zeros_are_written_like_anything_else(store: TrajectoryStore) -> None:
    zeros = torch.zeros(STEPS, BRANCHES, TOKENS, CHANNELS, dtype=torch.bfloat16)
    key = store.commit(trajectory(features=zeros, context={"zero": torch.zeros(7)}))
    assert torch.equal(store.features(key), zeros)
    assert (store.path / key / FEATURES).exists() and (store.path / key / CONTEXT).exists()


def test_zarr_itself_reads_the_store(store: TrajectoryStore) -> None:
    import zarr

    one = trajectory()
    key = store.commit(one)
    group = zarr.open_group(str(store.path), mode="r")
    assert group[key].attrs["seed"] == 0
    array = group[key]["features"]
    assert array.metadata.zarr_format == 3
    assert (array.shards, array.chunks) == (array.shape, (1, BRANCHES, TOKENS, CHANNELS))
    assert torch.equal(torch.from_numpy(array[2]).view(torch.bfloat16), one.features[2])


def test_the_estimate_is_what_the_disk_takes(store: TrajectoryStore) -> None:
    one = trajectory()
    values = sum(tensor.numel() for tensor in one.context.values())
    sizes = {"num_steps": STEPS, "num_branches": BRANCHES, "num_tokens": TOKENS, "channels": CHANNELS}
    key = store.commit(one)
    taken = sum(file.stat().st_blocks * 512 for file in (store.path / key).rglob("*") if file.is_file())
    estimate = estimate_bytes(1, **sizes, context_values=values)
    assert taken <= estimate <= taken + 3 * 4096
    large = estimate_bytes(96, num_steps=50, num_branches=1, num_tokens=4096, channels=3072, context_values=0)
    assert large == pytest.approx(96 * 50 * 4096 * 3072 * 2, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_by_key_step_and_tap(store: TrajectoryStore, value: float) -> None:
    features = trajectory().features.clone()
    features[3, 1, 2, 0] = value
    bad = trajectory(features=features)
    with pytest.raises(StoreError, match=rf"{trajectory_key(bad.identity)}.*step 3.*the tap"):
        store.commit(bad)
    assert store.keys() == [] and [entry.name for entry in store.path.iterdir()] == ["zarr.json"]


def test_every_misfit_of_a_trajectory_is_listed(store: TrajectoryStore) -> None:
    bad = trajectory(
        sigmas=torch.ones(2),
        timesteps=torch.full((STEPS,), float("nan")),
        token_index=torch.tensor([1]),
        prompt="another",
    )
    with pytest.raises(StoreError) as caught:
        store.commit(bad)
    for part in ("sigmas must be [6]", "token_index must be [3]", "in timesteps", "prompt is 'another'"):
        assert part in str(caught.value)


def test_what_float32_cannot_hold_is_refused(store: TrajectoryStore) -> None:
    with pytest.raises(StoreError, match=r"big .int64. does not fit"):
        store.commit(trajectory(context={"big": torch.tensor([2**40 + 1])}))
    with pytest.raises(StoreError, match=r"fine .float64. does not fit"):
        store.commit(trajectory(context={"fine": torch.tensor([0.1], dtype=torch.float64)}))
    assert store.keys() == []


def test_open_refuses_what_is_no_store_of_this_version(tmp_path: Path, store: TrajectoryStore) -> None:
    with pytest.raises(StoreError, match="run the record stage first"):
        TrajectoryStore.open(tmp_path / "nothing.zarr")
    root = store.path / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["format"] = 3
    root.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"'format': 3.*reads.*'format': 2.*and older"):
        TrajectoryStore.open(store.path)


# Format 1, which an earlier version wrote: read like the other, taken over, never written.


@pytest.fixture
def old(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore.open(shutil.copytree(FORMAT_1, tmp_path / "old.zarr"))


def test_a_store_of_format_1_is_read_bit_for_bit(old: TrajectoryStore) -> None:
    first, second = trajectory(), trajectory(1, token_index=torch.tensor([1, 4, 7]))
    assert old.verify() == [] and len(old.keys()) == 2
    for kept in (first, second):
        key = trajectory_key(kept.identity)
        assert old.record(key)["format"] == 1 and torch.equal(old.features(key), kept.features)
        assert all(torch.equal(old.context(key)[name], tensor) for name, tensor in kept.context.items())


def test_a_store_of_format_1_keeps_its_trajectories_beside_new_ones(old: TrajectoryStore) -> None:
    before, state = {key: tree_digest(old.path / key) for key in old.keys()}, old.state()
    store = TrajectoryStore.create(old.path)
    assert json.loads((store.path / "zarr.json").read_text())["attributes"]["format"] == 2
    assert store.commit(trajectory()) in before, "it is there already, in the older format"
    assert store.state() == state
    key = store.commit(trajectory(2))
    assert store.record(key)["format"] == 2 and store.state() != state
    assert store.verify() == [] and len(store.keys()) == 3
    assert {other: tree_digest(store.path / other) for other in before} == before


@pytest.mark.parametrize("file", ["features/zarr.json", "context/zarr.json", "features/c/0/0/0/0", "zarr.json"])
def test_a_missing_or_damaged_file_of_format_1_is_an_error(old: TrajectoryStore, file: str) -> None:
    path = old.path / old.keys()[0] / file
    text = path.read_bytes()
    path.write_bytes(text[:-3] + b"   ")
    assert len(old.verify()) == 1
    path.unlink()
    (problem,) = old.verify()
    assert f"{file} missing, nothing too many; record it again" in problem


def test_a_record_of_the_other_format_is_refused(store: TrajectoryStore, old: TrajectoryStore) -> None:
    for trajectories, other in ((store, 1), (old, 2)):
        key = trajectories.commit(trajectory())
        path = trajectories.path / key / "zarr.json"
        document = json.loads(path.read_text())
        document["attributes"]["format"] = other
        path.write_text(json.dumps(document))
        with pytest.raises(StoreError, match=f"{key}: its record says format {other}, its files are {3 - other}'s"):
            trajectories.features(key)


@pytest.mark.parametrize("arrays", [None, {}, {"features": {}}, {"features": {}, "context": []}, 7])
def test_a_group_without_its_arrays_is_refused(store: TrajectoryStore, arrays: Any) -> None:
    key = store.commit(trajectory())
    path = store.path / key / "zarr.json"
    document = json.loads(path.read_text())
    document["consolidated_metadata"]["metadata"] = arrays
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=key):
        store.record(key)
    del document["consolidated_metadata"]
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=f"{key}: its record says format 2, its files are 2's"):
        store.record(key)


# Damage: bytes of a committed trajectory change under us.


@pytest.mark.parametrize("file", [FEATURES, CONTEXT])
def test_a_flipped_byte_anywhere_is_found(store: TrajectoryStore, file: str) -> None:
    key = store.commit(trajectory())
    path = store.path / key / file
    data = path.read_bytes()
    for place in sorted({0, 1, len(data) // 2, *range(0, len(data), 17), len(data) - 2, len(data) - 1}):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        problems = store.verify()
        assert len(problems) == 1 and key in problems[0], (place, problems)
    path.write_bytes(data)
    assert store.verify() == []


def test_the_damaged_step_is_named(store: TrajectoryStore) -> None:
    key = store.commit(trajectory())
    path = store.path / key / FEATURES
    data = bytearray(path.read_bytes())
    chunk = BRANCHES * TOKENS * CHANNELS * 2 + 4
    data[3 * chunk + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=f"trajectory {key}: features, step 3"):
        store.features(key)


def test_a_damaged_index_or_context_is_named(store: TrajectoryStore) -> None:
    key = store.commit(trajectory())
    for file, what in ((FEATURES, "features, index of the shard"), (CONTEXT, "context")):
        path = store.path / key / file
        good = path.read_bytes()
        path.write_bytes(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
        with pytest.raises(StoreError, match=f"trajectory {key}: {what}: wrong checksum; record it again"):
            (store.features if file.startswith("features") else store.context)(key)
        path.write_bytes(good)
    assert store.verify() == []


def test_an_index_that_points_elsewhere_is_refused(store: TrajectoryStore) -> None:
    """Two steps exchanged in an index with a checksum of its own: only the digest of the values tells."""
    import google_crc32c

    key = store.commit(trajectory())
    path, steps = store.path / key / FEATURES, len(trajectory().features)
    data = bytearray(path.read_bytes())
    start = len(data) - 16 * steps - 4
    index = bytearray(data[start:-4])
    index[:16], index[16:32] = index[16:32], index[:16]
    for changed, problem in ((bytes(index), "features has digest"), (b"\xff" * len(index), "features, step 0")):
        data[start:] = changed + google_crc32c.value(changed).to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(StoreError, match=f"{key}: {problem}"):
            store.features(key)


@pytest.mark.parametrize("file", [FEATURES, CONTEXT])
def test_a_truncated_or_longer_shard_is_refused_before_it_is_read(store: TrajectoryStore, file: str) -> None:
    key = store.commit(trajectory())
    path = store.path / key / file
    data = path.read_bytes()
    for size in (0, 1, len(data) // 2, len(data) - 1, len(data) + 1):
        path.write_bytes((data + b"\0")[:size])
        (problem,) = store.verify()
        assert key in problem and f"has {size} bytes" in problem and str(len(data)) in problem


@pytest.mark.parametrize("file", [FEATURES, CONTEXT, "zarr.json"])
def test_a_missing_file_is_an_error_and_never_zeros(store: TrajectoryStore, file: str) -> None:
    key = store.commit(trajectory())
    (store.path / key / file).unlink()
    with pytest.raises(StoreError, match=f"{key}: {file} missing"):
        store.features(key)
    with pytest.raises(StoreError, match=f"{key}: {file} missing"):
        store.context(key)
    (problem,) = store.verify()
    assert "record it again" in problem


def test_a_consistent_forgery_of_the_values_needs_the_digest_to_be_found(store: TrajectoryStore) -> None:
    """Another trajectory's features have valid checksums of their own; the record's digest tells."""
    key, other = store.commit(trajectory(0)), store.commit(trajectory(1))
    source = store.path / other / FEATURES
    (store.path / key / FEATURES).write_bytes(source.read_bytes())
    with pytest.raises(StoreError, match=f"{key}: features has digest"):
        store.features(key)


def test_a_record_moved_to_another_key_is_refused(store: TrajectoryStore) -> None:
    key = store.commit(trajectory())
    os.rename(store.path / key, store.path / ("0" * 32))
    with pytest.raises(StoreError, match="does not hash to its key"):
        store.record("0" * 32)


@pytest.mark.parametrize("key", ["", "../x", "A" * 32, "0" * 31, "zarr.json", "0" * 32 + "\n"])
def test_only_keys_are_looked_up(store: TrajectoryStore, key: str) -> None:
    assert key not in store
    with pytest.raises(StoreError, match="is not a trajectory key"):
        store.record(key)


# Hostile metadata: refused from the document, before anything is allocated or decoded.


def _array(changes: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {**document, **changes}


def _codec(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(document: dict[str, Any]) -> dict[str, Any]:
        document = copy.deepcopy(document)
        document["codecs"][0]["configuration"]["codecs"].append({"name": name, "configuration": {}})
        return document

    return change


HOSTILE = {
    "a shape of 10^15": _array({"shape": [10**9, 1, 10**3, 10**3]}),
    "a shape beyond 2^63": _array({"shape": [2**62, 2**62, 2**62, 2**62]}),
    "a negative shape": _array({"shape": [-1, 2, 3, 4]}),
    "an empty shape": _array({"shape": [0, 2, 3, 4]}),
    "a fractional shape": _array({"shape": [5.0, 2, 3, 4]}),
    "a boolean shape": _array({"shape": [5, True, 3, 4]}),
    "no shape": _array({"shape": None}),
    "too many axes": _array({"shape": [1] * 1000}),
    "a chunk of a terabyte": _array(
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [5, 2, 3, 2**40]}}}
    ),
    "another dtype": _array({"data_type": "float64"}),
    "format 2": _array({"zarr_format": 2}),
    "a pickle codec": _codec("numcodecs.pickle"),
    "a compressor": _codec("zstd"),
    "an unknown codec": _codec("lesa.does_not_exist"),
    "a storage transformer": _array({"storage_transformers": [{"name": "x"}]}),
    "an extension": _array({"extra": {"must_understand": False}}),
}


def change_array(
    store: TrajectoryStore, key: str, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Change what a trajectory's zarr.json says of one of its arrays."""
    path = store.path / key / "zarr.json"
    document = json.loads(path.read_text())
    arrays = document["consolidated_metadata"]["metadata"]
    arrays[name] = change(arrays[name])
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_array_metadata_is_refused(store: TrajectoryStore, what: str) -> None:
    key = store.commit(trajectory())
    change_array(store, key, "features", HOSTILE[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StoreError, match=key):
        store.features(key)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_a_larger_shape_than_the_file_holds_is_refused_by_size(store: TrajectoryStore) -> None:
    """The document agrees with itself here: what is wrong is that the file is too small for it."""
    key = store.commit(trajectory())

    def enlarge(document: dict[str, Any]) -> dict[str, Any]:
        document["shape"][3] = document["chunk_grid"]["configuration"]["chunk_shape"][3] = 2**30
        document["codecs"][0]["configuration"]["chunk_shape"][3] = 2**30
        return document

    change_array(store, key, "features", enlarge)
    with pytest.raises(StoreError, match=r"features/c.0.0.0.0 has \d+ bytes, its shape makes \d{11}"):
        store.features(key)


def test_a_version_2_array_is_refused(store: TrajectoryStore) -> None:
    key = store.commit(trajectory())
    folder = store.path / key / "features"
    (store.path / key / FEATURES).unlink()
    (folder / ".zarray").write_text(
        json.dumps(
            {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "filters": [{"id": "pickle"}]}
        )
    )
    with pytest.raises(StoreError, match=rf"{FEATURES} missing, features/.zarray too many"):
        store.features(key)


@pytest.mark.parametrize(
    "layout",
    [
        {"temb": {"dtype": "float32", "offset": 0, "shape": [10**12]}},
        {"temb": {"dtype": "float32", "offset": -4, "shape": [7]}},
        {"temb": {"dtype": "object", "offset": 0, "shape": [7]}},
        {"temb": {"dtype": ["float32"], "offset": 0, "shape": [7]}},
        {"temb": {"dtype": "float32", "offset": 0, "shape": "7"}},
        {"temb": {"dtype": "float32", "offset": 0}},
        {"temb": {"dtype": "float32", "offset": 0, "shape": [6]}},
        {},
        {"temb": 7},
    ],
)
def test_a_layout_that_does_not_cover_the_context_is_refused(
    store: TrajectoryStore, layout: dict[str, Any]
) -> None:
    key = store.commit(trajectory(context={"temb": torch.randn(7)}))
    change_array(store, key, "context", lambda document: {**document, "attributes": layout})
    with pytest.raises(StoreError, match=f"{key}: (layout|temb)"):
        store.context(key)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'\xef\xbb\xbf{"node_type": "group"}',
        b'{"node_type": "group", "node_type": "group"}',
        b'{"attributes": {"seed": NaN}}',
        b"[" * 100_000,
        b"{" + b" " * (17 << 20) + b"}",
        b'{"attributes": {}, "node_type": "group", "zarr_format": 3}',
    ],
    ids=["empty", "list", "not UTF-8", "BOM", "key twice", "NaN", "deep", "17 MiB", "no record"],
)
def test_a_record_that_is_not_strict_json_is_refused(store: TrajectoryStore, text: bytes) -> None:
    key = store.commit(trajectory())
    (store.path / key / "zarr.json").write_bytes(text)
    with pytest.raises(StoreError, match=key):
        store.record(key)
    assert len(store.verify()) == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sigmas", None, "sigmas must be a list of numbers"),
        ("sigmas", [[0.0]], "sigmas must be a list of numbers"),
        ("sigmas", [0.5], "1 noise levels for 5 timesteps"),
        ("timesteps", 3, "timesteps must be a list of numbers"),
        ("timesteps", ["a"], "timesteps must be a list of numbers"),
        ("token_index", {"0": 1}, "token_index must be null or a list of whole numbers"),
        ("call_kwargs", [1], "call_kwargs must be a list of mappings"),
        ("digests", [], "digests must be a mapping"),
        ("format", True, "format must be a number"),
    ],
)
def test_a_record_with_a_value_of_another_kind_is_damaged(
    store: TrajectoryStore, name: str, value: Any, said: str
) -> None:
    key = store.commit(trajectory())
    path = store.path / key / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"][name] = value
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=f"{key}: {said}"):
        store.record(key)
    assert store.verify() and all(key in problem for problem in store.verify())


@pytest.mark.parametrize("file", [FEATURES, "zarr.json"])
def test_links_and_special_files_are_refused(store: TrajectoryStore, tmp_path: Path, file: str) -> None:
    key = store.commit(trajectory())
    path = store.path / key / file
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(StoreError, match="neither a regular file nor a folder"):
        store.features(key)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="neither a regular file nor a folder"):
        store.features(key)


def test_a_linked_trajectory_is_refused(store: TrajectoryStore, tmp_path: Path) -> None:
    key = store.commit(trajectory())
    os.rename(store.path / key, tmp_path / "elsewhere")
    (store.path / key).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="not a folder"):
        store.features(key)
    assert len(store.verify()) == 1


def test_unfinished_work_counts_as_absent_and_strangers_are_named(store: TrajectoryStore) -> None:
    key = store.commit(trajectory())
    (store.path / f"{'1' * 32}.1.0.partial").mkdir()
    (store.path / "notes.txt").write_text("hello")
    assert store.keys() == [key]
    assert store.verify() == ["notes.txt: does not belong in a trajectory store"]
