"""What is read from disk is damaged at random: it means what it meant, or is refused in words, in bounded time.

    LESA_FUZZ_SECONDS   in all (15)
    LESA_FUZZ_SEED      of the damage (0); a failure names it, with the number of the case
    LESA_FUZZ_FIRST     the first case's number (0), to begin at one that failed
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lesa.bundle import load_bundle
from lesa.errors import LesaError
from lesa.params_file import load_params
from lesa.recording.catalogue import catalogue_of, check_catalogue, write_catalogue
from lesa.recording.dataset import load_trajectories
from lesa.recording.ledger import Ledger, ledger_of
from lesa.recording.store import TrajectoryStore
from lesa.strict_json import parse
from lesa.training.jobs import load_figures, load_predictor, save_predictor
from tests.attacks.hostile import MANIFEST, WEIGHTS, reweigh
from tests.attacks.mutations import mutated_bytes, mutated_tree
from tests.helpers.bundles import make_bundle
from tests.helpers.tiny import tiny_flux, tiny_repository
from tests.helpers.training_set import make_store

SECONDS = float(os.environ.get("LESA_FUZZ_SECONDS", "15"))
SEED, FIRST = os.environ.get("LESA_FUZZ_SEED", "0"), int(os.environ.get("LESA_FUZZ_FIRST", "0"))
CASE_SECONDS = 10.0  # of the processor, a case
GROWTH = 512 << 20  # bytes that the process may grow by, over all cases of a target
PARTS = 8  # targets, which share the seconds
PROMPTS = {"one": 1, "two": 2}
FORMAT_1 = Path(__file__).resolve().parents[1] / "lesa/recording/store_of_format_1"


class Hangs(BaseException):
    """A case that takes longer than any document is worth."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Ends the block once it has used so much of the processor, whatever else the machine does."""

    def end(signum: int, frame: Any) -> None:
        raise Hangs(f"more than {seconds} s of the processor")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(name: str, damage: Callable[[random.Random], bytes], read: Callable[[], object]) -> None:
    """Damages and reads again and again: `read` raises a LesaError, or finds (and asserts) that all is well."""
    peak, deadline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + SECONDS / PARTS
    number, refused = FIRST, 0
    while number == FIRST or time.monotonic() < deadline:
        written = damage(random.Random(f"{name} {SEED} {number}"))
        try:
            with bounded(CASE_SECONDS):
                read()
        except LesaError as error:
            assert str(error).strip(), "a refusal says why"
            refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            shown = written if len(written) < 3000 else written[:1500] + b" ... " + written[-1500:]
            lines = "".join(traceback.format_exception(error)[-6:])[-3000:]
            pytest.fail(
                f"{name}: {type(error).__name__}: {str(error)[:500]}\n"
                f"again: LESA_FUZZ_SEED={SEED} LESA_FUZZ_FIRST={number}\n{lines}\nread was: {shown!r}",
                pytrace=False,
            )
        number += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    assert grown < GROWTH, f"{name}: {grown >> 20} MiB more memory after {number - FIRST} cases"
    print(f"{name}: {number - FIRST} cases, {refused} refused")
    assert refused or number == FIRST + 1, f"{name}: none of {number - FIRST} cases was refused"


def either(rng: random.Random, good: bytes, *, yaml_too: bool = False) -> bytes:
    """Damage to the structure of a document, or to its bytes."""
    document = yaml.safe_load(good) if yaml_too else json.loads(good)
    return mutated_tree(rng, document, yaml=yaml_too) if rng.random() < 0.7 else mutated_bytes(rng, good)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tiny_flux(), tmp_path_factory.mktemp("good") / "bundle").path


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_manifests(copied: Path) -> None:
    good, expected = (copied / MANIFEST).read_bytes(), load_bundle(copied)

    def damage(rng: random.Random) -> bytes:
        data = either(rng, good)
        (copied / MANIFEST).write_bytes(data)
        return data

    def read() -> None:
        found = load_bundle(copied)
        assert same_tensors(found.predictor.tensors, expected.predictor.tensors)
        said = json.loads((copied / MANIFEST).read_bytes())
        assert found.manifest.to_dict() == said, "nothing is read as something else"
        assert list(found.manifest.sigmas) == said["sigmas"] and found.manifest.channels == said["channels"]
        for name, budget in found.manifest.budgets.items():
            assert list(budget.schedule.full_steps) == said["budgets"][name]["full_steps"]

    fuzz("manifest.json", damage, read)


def test_weights_that_a_manifest_vouches_for(copied: Path) -> None:
    good = (copied / WEIGHTS).read_bytes()
    size = int.from_bytes(good[:8], "little")
    manifest = (copied / MANIFEST).read_bytes()

    def damage(rng: random.Random) -> bytes:
        if rng.random() < 0.6:  # the header's structure, with its length put right or not
            header = mutated_tree(rng, json.loads(good[8 : 8 + size]))
            length = len(header) if rng.random() < 0.8 else rng.choice((0, size, 1 << 20, 1 << 40, (1 << 64) - 1))
            data = length.to_bytes(8, "little") + header + good[8 + size :]
        else:
            data = mutated_bytes(rng, good[: 8 + size]) + good[8 + size :]
        (copied / MANIFEST).write_bytes(manifest)
        reweigh(copied, data)
        return data

    def read() -> None:
        found = load_bundle(copied)
        assert found.manifest.weights_sha256 == sha256((copied / WEIGHTS).read_bytes()).hexdigest()
        assert all(torch.isfinite(value).all() for value in found.predictor.tensors.values())

    fuzz("weights.safetensors", damage, read)


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (value.dtype, value.shape) for name, value in tensors.items()}


@pytest.fixture(params=[1, 2])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TrajectoryStore:
    """One of each format, with its catalogue."""
    path = tmp_path / "set.zarr"
    if request.param == 1:
        shutil.copytree(FORMAT_1, path)
        made = TrajectoryStore.open(path)
    else:
        made = make_store(path, PROMPTS)
    write_catalogue(made)
    return made


def test_stores(store: TrajectoryStore) -> None:
    """Of one trajectory the record, an array's metadata or the root: what reads is what was recorded."""
    whole = store.records()
    prompts = [record["prompt"] for record in whole.values()]
    expected = {key: (store.features(key), store.context(key)) for key in whole}
    files = sorted(path for path in store.path.rglob("zarr.json"))
    good = {path: path.read_bytes() for path in files}

    def damage(rng: random.Random) -> bytes:
        for path, data in good.items():
            path.write_bytes(data)
        chosen = rng.choice(files)
        data = either(rng, good[chosen])
        chosen.write_bytes(data)
        return data

    def read() -> None:
        opened = TrajectoryStore.open(store.path)
        problems = opened.verify()
        Ledger(opened).verify(opened.keys())
        records = opened.records()
        check_catalogue(opened.path, records)
        if "latents_final" in next(iter(expected.values()))[1]:  # one that training can read
            load_trajectories(opened.path, prompts, records=records)
        read_again = {key: (opened.features(key), opened.context(key)) for key in opened.keys()}
        assert problems == [], "what is named damaged is not read"
        for key, (features, context) in read_again.items():
            assert torch.equal(features.view(torch.uint16), expected[key][0].view(torch.uint16))
            # No digest covers what its values are called: another name or shape is what the file says.
            is_renamed = layout(context) != layout(expected[key][1])
            assert is_renamed or same_tensors(context, expected[key][1])

    fuzz("zarr.json", damage, read)


@pytest.mark.parametrize("name", ["ledger", "catalogue"])
def test_what_lies_beside_a_store(name: str, tmp_path: Path) -> None:
    made = make_store(tmp_path / "set.zarr", PROMPTS)
    write_catalogue(made)
    ledger = Ledger(made)
    assert ledger.verify(made.keys()) == {}
    ledger.save()
    path = (ledger_of if name == "ledger" else catalogue_of)(made.path)
    good, records = path.read_bytes(), made.records()

    def damage(rng: random.Random) -> bytes:
        data = either(rng, good)
        path.write_bytes(data)
        return data

    def read() -> None:
        if name == "catalogue":
            check_catalogue(made.path, records)
            assert parse(path.read_bytes(), max_bytes=1 << 20)["trajectories"] == json.loads(good)["trajectories"]
            return
        read_again = Ledger(made)
        read_again.unread(made.keys())
        read_again.seconds(made.keys())
        # A ledger is believed in what it says of a record; whatever else it says, nothing is lost.
        assert all("its record is not" in problem for problem in read_again.verify(made.keys()).values())
        read_again.save()
        raise LesaError("read as one that knows nothing, or as it was")

    fuzz(name, damage, read)


def test_saved_predictors(bundle: Path, tmp_path: Path) -> None:
    folder, predictor = tmp_path / "closed_loop", load_bundle(bundle).predictor
    save_predictor(folder, predictor, {"loss": 1.0})
    path = folder / "predictor.json"
    good = path.read_bytes()

    def damage(rng: random.Random) -> bytes:
        data = either(rng, good)
        path.write_bytes(data)
        return data

    def read() -> None:
        load_figures(folder)
        assert same_tensors(load_predictor(folder).tensors, predictor.tensors)

    fuzz("predictor.json", damage, read)


def test_parameter_files(tmp_path: Path) -> None:
    path = tiny_repository(tmp_path) / "params.yaml"
    small = "presets: {small: {search: &small {descents: 1, evaluations: 2, samples: 1, max_gap: 6}}}\n"
    good = small.encode() + path.read_bytes().replace(
        b"\n    record:", b"\n    search: {<<: *small, samples: 2}\n    record:"
    )
    path.write_bytes(good)
    assert load_params(path).search.samples == 2 and load_params(path).search.evaluations == 2

    def damage(rng: random.Random) -> bytes:
        data = either(rng, good, yaml_too=True)
        path.write_bytes(data)
        return data

    def read() -> None:
        found = load_params(path)
        section = dataclasses.asdict(found)
        name = section.pop("name")
        again = path.with_name("again.yaml")
        again.write_text(json.dumps({"default_workload": name, "workloads": {name: section}}))
        assert load_params(again) == found, "what is read can be written and means the same"

    fuzz("params.yaml", damage, read)
