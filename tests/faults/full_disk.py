"""Fills a small disk to every size around what a writer needs, and has it write.

    python -m tests.faults.full_disk DISK      prints a line a trial: the writer, the bytes that were free, how it ended

DISK is a tmpfs of its own. A trial: the old content lies there, some pages are free, the writer replaces it. Where it
fails, the error names a path and the remedy, the old content is what is found, and nothing unfinished is left; once
there is room, it writes what it writes on a disk that never was full.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lesa.bundle import load_bundle, write_bundle
from lesa.recording.catalogue import catalogue_of, write_catalogue
from lesa.recording.ledger import Ledger, ledger_of
from lesa.recording.store import TrajectoryStore
from lesa.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from lesa.training.jobs import load_predictor, save_predictor
from tests.helpers.bundles import make_bundle
from tests.helpers.digests import tree_digest
from tests.helpers.tiny import tiny_flux
from tests.lesa.recording.test_store import trajectory

PAGE = 4096
Writer = tuple[Callable[[Path], object], Callable[[Path], object], Callable[[Path], object]]  # old, new, read


def bundle_writer(scratch: Path) -> Writer:
    made = make_bundle(tiny_flux(), scratch / "bundle")
    follow = ("schema", "channels", "step_range", "predictor", "files")
    manifest = {name: value for name, value in made.manifest.to_dict().items() if name not in follow}
    return (
        lambda disk: write_bundle(disk / "bundle", manifest, made.predictor),
        lambda disk: write_bundle(disk / "bundle", {**manifest, "license": "MIT"}, made.predictor),
        lambda disk: load_bundle(disk / "bundle").digest,
    )


def predictor_writer(scratch: Path) -> Writer:
    predictor = load_bundle(scratch / "bundle").predictor
    return (
        lambda disk: save_predictor(disk / "predictor", predictor, {"loss": 1.0}),
        lambda disk: save_predictor(disk / "predictor", predictor, {"loss": 2.0}),
        lambda disk: (load_predictor(disk / "predictor"), tree_digest(disk / "predictor"))[1],
    )


def checkpoint_writer(scratch: Path) -> Writer:
    module = nn.Linear(40, 40)
    optimizer = torch.optim.Adam(module.parameters())

    def save(disk: Path, iteration: int) -> Path:
        return save_checkpoint(disk / "work", "key", module, optimizer, TrainingState(iteration, None, {}))

    def found(disk: Path) -> int:
        state = load_checkpoint(disk / "work", "key", module, optimizer)
        assert state is not None
        return state.iteration

    return lambda disk: save(disk, 2), lambda disk: save(disk, 4), found


def store_writer(write: Callable[[TrajectoryStore], object], place: Callable[[Path], Path]) -> Writer:
    """What lies beside a store of one trajectory, and then of two."""

    def old(disk: Path) -> None:
        store = TrajectoryStore.create(disk / "toy.zarr")
        store.commit(trajectory(0))
        write(store)
        store.commit(trajectory(1))

    def new(disk: Path) -> None:
        write(TrajectoryStore(disk / "toy.zarr"))

    return old, new, lambda disk: place(disk / "toy.zarr").read_bytes()


def write_ledger(store: TrajectoryStore) -> None:
    ledger = Ledger(store)
    ledger.verify(ledger.unread(store.keys()))
    ledger.save()


def free_pages(disk: Path, pages: int) -> Path:
    """Fill the disk but for so many pages; what fills it."""
    space, ballast = os.statvfs(disk), disk / "ballast"
    ballast.write_bytes(b"x" * max(0, space.f_bavail * space.f_frsize - pages * PAGE))
    return ballast


def names(disk: Path) -> list[str]:
    return sorted(str(path.relative_to(disk)) for path in disk.rglob("*"))


def trial(disk: Path, writer: Writer, pages: int) -> str:
    old, new, read = writer
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    old(disk)
    before, known = read(disk), names(disk)
    ballast = free_pages(disk, pages)
    try:
        new(disk)
    except OSError as error:
        assert error.errno == errno.ENOSPC and str(disk) in str(error.filename), repr(error)
        assert "make room and run again" in str(error), str(error)
        ballast.unlink()
        assert read(disk) == before, "what was there is not found any more"
        assert names(disk) == known, set(names(disk)) ^ set(known)
        new(disk)
        outcome = "full"
    else:
        ballast.unlink()
        outcome = "fits"
    assert read(disk) != before
    return outcome


def main() -> None:
    disk = Path(sys.argv[1])
    scratch = Path(sys.argv[2])
    writers = {
        "bundle": bundle_writer(scratch),
        "predictor": predictor_writer(scratch),
        "checkpoint": checkpoint_writer(scratch),
        "catalogue": store_writer(write_catalogue, catalogue_of),
        "ledger": store_writer(write_ledger, ledger_of),
    }
    for name, writer in writers.items():
        for pages in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            outcome = trial(disk, writer, pages)
            print(name, pages * PAGE, outcome, flush=True)
            if outcome == "fits":
                break


if __name__ == "__main__":
    main()
