"""The power goes at every moment of a commit: what is found afterwards is the old or the new, and never something else.

What was reported as done is found after any later cut. The model of the disk is `tests.helpers.power_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lesa import atomic
from lesa.bundle import BundleError, load_bundle
from lesa.recording.catalogue import catalogue_of, check_catalogue, write_catalogue
from lesa.recording.ledger import Ledger
from lesa.recording.pruned import PrunedTrajectories
from lesa.recording.store import TrajectoryStore
from lesa.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from tests.helpers.bundles import make_bundle
from tests.helpers.power_loss import Disk, restored
from tests.helpers.tiny import tiny_flux
from tests.lesa.recording.test_store import trajectory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def after_cuts(root: Path, tmp_path: Path) -> Iterator[Callable[[Callable[[], object]], list[Path]]]:
    """Folders that the power cuts during an act leave, the last two with the act done."""
    disks: list[Disk] = []

    def after(act: Callable[[], object]) -> list[Path]:
        disk = Disk(root)
        disks.append(disk)
        with disk.watching():
            act()
        number = len(disks)
        return [restored(image, tmp_path / f"cuts-{number}" / str(i)) for i, image in enumerate(disk.images)]

    yield after
    for disk in disks:
        disk.close()


def test_the_model_loses_what_is_not_synced(root: Path, after_cuts: Callable[..., list[Path]]) -> None:
    """A rename without a sync before it is found as an empty file, and without one after it perhaps not at all."""

    def careless() -> None:
        (root / "aside").write_bytes(b"new")
        (root / "aside").rename(root / "file")

    (root / "file").write_bytes(b"old")
    found = {(folder / "file").read_bytes() for folder in after_cuts(careless)}
    assert found == {b"old", b""}
    (root / "file").write_bytes(b"old")
    careful = after_cuts(lambda: atomic.write_bytes(root / "file", b"new"))
    assert {(folder / "file").read_bytes() for folder in careful} == {b"old", b"new"}
    assert all((folder / "file").read_bytes() == b"new" for folder in careful[-2:])


def test_a_bundle_is_the_old_one_the_new_one_or_not_there(root: Path, after_cuts: Callable[..., list[Path]]) -> None:
    pipe, made = tiny_flux(), root / "bundles/tiny"
    first = after_cuts(lambda: make_bundle(pipe, made))
    new = load_bundle(made).digest
    assert load_bundle(first[-1] / "bundles/tiny").digest == new
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.bundles.BUDGETS", {"1.67x": 3})
        second = after_cuts(lambda: make_bundle(pipe, made))
    newer = load_bundle(made).digest
    assert newer != new
    for cuts, known in ((first, {new}), (second, {new, newer})):
        seen = set()
        for folder in cuts:
            bundle = folder / "bundles/tiny"
            if bundle.exists():  # between two renames there is none; a torn one never has its name
                seen.add(load_bundle(bundle).digest)
        assert seen == known
    for folder in (*first[-2:], *second[-2:]):
        assert (folder / "bundles/tiny").exists()
    with pytest.raises(BundleError):
        load_bundle(first[0] / "bundles/tiny")


def test_a_checkpoint_is_whole_and_the_one_before_it_stays_until_it_is(
    root: Path, after_cuts: Callable[..., list[Path]]
) -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())

    def save(iteration: int) -> None:
        state = TrainingState(iteration, 1.0 / iteration, {"x": torch.full((2,), float(iteration))})
        save_checkpoint(root / "work", "key", module, optimizer, state)

    def found(folder: Path) -> int:
        state = load_checkpoint(folder / "work", "key", module, optimizer)
        if state is None:
            return 0
        assert state.best["x"].tolist() == [state.iteration] * 2 and state.best_loss == 1.0 / state.iteration
        for path in (folder / "work").glob("iteration-????????"):
            assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]
            assert all(p.stat().st_size for p in path.iterdir())
        return state.iteration

    for iteration in (2, 4, 6):  # the third also removes the first
        iterations = [found(folder) for folder in after_cuts(lambda iteration=iteration: save(iteration))]
        assert set(iterations) == {iteration - 2, iteration} and iterations[-2:] == [iteration] * 2


def test_a_catalogue_and_a_ledger_are_the_old_or_the_new(root: Path, after_cuts: Callable[..., list[Path]]) -> None:
    store = TrajectoryStore.create(root / "toy.zarr")
    keys = [store.commit(trajectory(seed)) for seed in range(2)]

    def close() -> None:
        ledger = Ledger(store)
        assert ledger.verify(ledger.unread(store.keys())) == {}
        ledger.save()
        write_catalogue(store)

    close()
    keys.append(store.commit(trajectory(2)))
    sizes = []
    for folder in after_cuts(close):
        found = TrajectoryStore.open(folder / "toy.zarr")
        assert found.verify() == [] and set(keys) == set(found.keys())
        said = catalogue_of(found.path).read_text()
        sizes.append(sum(key in said for key in keys))
        if sizes[-1] == 3:
            check_catalogue(found.path, found.records())
        assert Ledger(found).verify(keys) == {}  # whatever is left of it, it makes nothing of ours damaged
    assert set(sizes) == {2, 3} and sizes[-2:] == [3, 3]


def test_a_trajectory_on_its_way_out_of_the_store_or_back_is_never_torn(
    root: Path, after_cuts: Callable[..., list[Path]]
) -> None:
    store = TrajectoryStore.create(root / "toy.zarr")
    kept, moved = (store.commit(trajectory(seed)) for seed in range(2))
    pruned = PrunedTrajectories(store)
    for act in (lambda: pruned.prune({kept}), lambda: pruned.restore([moved])):
        for folder in after_cuts(act):
            found = TrajectoryStore.open(folder / "toy.zarr")
            assert found.verify() == [] and kept in found.keys()
            PrunedTrajectories(found).restore([moved])  # nothing to do where the store has it
            assert found.verify() == [] and moved in found.keys()
