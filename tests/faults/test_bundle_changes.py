"""A bundle's files change while it is read, or after: the bytes that were verified are the bytes that are used."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lesa.bundle import Bundle, BundleError, load_bundle
from lesa.bundle import format as bundle_format
from tests.helpers.bundles import make_bundle
from tests.helpers.tiny import tiny_flux

FILES = ("README.md", "manifest.json", "weights.safetensors")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """Two good bundles with different weights; nobody changes these."""
    folder, pipe = tmp_path_factory.mktemp("bundles"), tiny_flux()
    first = make_bundle(pipe, folder / "first")
    second = make_bundle(pipe, folder / "second", sigmas=torch.linspace(1, 0, 11) ** 2)
    assert first.digest != second.digest
    return first, second


@pytest.fixture
def changing(two: tuple[Bundle, Bundle], tmp_path: Path) -> Path:
    return shutil.copytree(two[0].path, tmp_path / "bundle")


def overwrite(folder: Path, other: Path, names: tuple[str, ...] = FILES) -> None:
    """In place, as a careless copy does: whoever has a file open sees it change."""
    for name in names:
        with open(folder / name, "r+b") as file:
            file.write((other / name).read_bytes())
            file.truncate()


def same_weights(one: Bundle, other: Bundle) -> bool:
    pairs = ((tensor, other.predictor.tensors[name]) for name, tensor in one.predictor.tensors.items())
    return all(torch.equal(tensor, same) for tensor, same in pairs)


@pytest.mark.parametrize("moment", ["sha256_bytes", "parse", "load_safetensors"])
def test_files_that_change_after_they_were_read_change_nothing(
    two: tuple[Bundle, Bundle], changing: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and hashing, hashing and parsing, hashing and building: each step has the bytes of the first."""
    first, second = two
    place = bundle_format.atomic if moment == "sha256_bytes" else bundle_format
    true = getattr(place, moment)

    def late(data: bytes, **options: object) -> object:
        # The manifest is hashed and parsed before the weights are opened: these still have to fit it.
        names = FILES if moment == "load_safetensors" else FILES[:2]
        overwrite(changing, second.path, names)
        return true(data, **options)

    monkeypatch.setattr(place, moment, late)
    loaded = load_bundle(changing, expected_digest=first.digest)
    assert loaded.digest == first.digest and same_weights(loaded, first)


def test_weights_that_change_after_the_manifest_was_read_are_refused(
    two: tuple[Bundle, Bundle], changing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = bundle_format.parse

    def late(data: bytes, **options: int) -> dict[str, object]:
        overwrite(changing, two[1].path, FILES[2:])
        return true(data, **options)

    monkeypatch.setattr(bundle_format, "parse", late)
    with pytest.raises(BundleError, match="weights.safetensors: "):
        load_bundle(changing)


def test_a_loaded_bundle_does_not_read_its_files_again(two: tuple[Bundle, Bundle], changing: Path) -> None:
    """Nothing is mapped from the disk: overwritten in place, cut short or gone, the predictor stays what it was."""
    loaded = load_bundle(changing)
    overwrite(changing, two[1].path)
    assert same_weights(loaded, two[0]) and not same_weights(loaded, two[1])
    os.truncate(changing / "weights.safetensors", 0)
    assert same_weights(loaded, two[0])
    shutil.rmtree(changing)
    assert same_weights(loaded, two[0])


@pytest.fixture
def rewriting(two: tuple[Bundle, Bundle], changing: Path) -> Iterator[Path]:
    """A bundle that somebody overwrites with the one and the other, without a pause, as long as the test runs."""
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for bundle in (two[1], two[0]):
                overwrite(changing, bundle.path)

    writer = threading.Thread(target=rewrite)
    writer.start()
    yield changing
    stop.set()
    writer.join()


def test_a_bundle_that_is_rewritten_all_the_time_is_the_pinned_one_or_refused(
    two: tuple[Bundle, Bundle], rewriting: Path
) -> None:
    for _ in range(60):
        try:
            loaded = load_bundle(rewriting, expected_digest=two[0].digest)
        except BundleError:
            continue
        assert same_weights(loaded, two[0])
