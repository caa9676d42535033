"""The recording of a workload: plan it, verify and record what the store lacks, set aside what the plan does not name.

`drive` is given what records: a `LocalRecorder` in this process, Ray actors in the record stage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from logging import Logger, LoggerAdapter
from typing import Any, Protocol

from tqdm import tqdm

from lesa.atomic import format_bytes, require_space
from lesa.params import Recording
from lesa.recording.catalogue import write_catalogue
from lesa.recording.ledger import Ledger
from lesa.recording.plan import (
    PlannedTrajectory,
    RecordingSize,
    batches,
    count_by_steps,
    describe_source,
    missing,
    plan_recording,
    recorded_prompts,
)
from lesa.recording.pruned import KEEP_DAYS, PrunedTrajectories
from lesa.recording.record import argument_lengths, measure_size, record_batch
from lesa.recording.store import TrajectoryStore
from lesa.recording.store_format import StoreError

Log = Logger | LoggerAdapter[Any]


class Recorders(Protocol):
    """Loaded pipelines that commit trajectories to a workload's store."""

    def describe(self) -> tuple[dict[str, Any], RecordingSize]:
        """What of the pipeline determines a recording, and how large one trajectory is."""
        ...

    def record(self, todo: Sequence[PlannedTrajectory], on_done: Callable[[str], object]) -> None:
        """Record and commit all of `todo`; `on_done` gets every key once its batch is committed."""
        ...

    def close(self) -> None:
        """End what was started for recording."""
        ...


class LocalRecorder:
    """Recorders that are one pipeline in this process; every Ray actor holds one too."""

    def __init__(self, pipe: Any, recording: Recording, store: TrajectoryStore) -> None:
        self._pipe, self._store = pipe, store
        self._params, self._call = recording.record, recording.call
        prompts = [prompt for split in recorded_prompts(recording).values() for prompt in split]
        self._longest_prompt = max(prompts, key=len)
        self._lengths: list[dict[str, int]] | None = None  # of the transformer's arguments; measured at first use

    def describe(self) -> tuple[dict[str, Any], RecordingSize]:
        source = describe_source(self._pipe)
        return source, measure_size(
            self._pipe, self._longest_prompt, self._params, self._call, self._argument_lengths()
        )

    def record(self, todo: Sequence[PlannedTrajectory], on_done: Callable[[str], object]) -> None:
        for batch in batches(todo, self._params.batch_size):
            for key in self.record_batch(batch):
                on_done(key)

    def record_batch(self, batch: Sequence[PlannedTrajectory]) -> list[str]:
        """Record and commit one run of the pipeline; nothing to do for what is committed. Returns the batch's keys."""
        todo = [item for item in batch if item.key not in self._store]
        if todo:
            recorded = record_batch(self._pipe, todo, self._params, self._call, self._argument_lengths())
            for trajectory in recorded:
                self._store.commit(trajectory)
        return [item.key for item in batch]

    def close(self) -> None:
        """The pipeline stays: its owner loaded it."""

    def _argument_lengths(self) -> list[dict[str, int]] | None:
        if self._lengths is None and self._params.batch_size > 1:
            self._lengths = argument_lengths(self._pipe, self._longest_prompt, self._call)
        return self._lengths


def drive(
    recording: Recording, store: TrajectoryStore, recorders: AbstractContextManager[Recorders], log: Log
) -> dict[str, Any]:
    """Record what the plan names and the store lacks, set aside what the plan does not name, write the catalogue.

    A run that was killed goes on where it was. Nothing is counted as recorded, and nothing gets into the catalogue,
    that is not as it was recorded: what is damaged is recorded anew.

    Args:
        recorders: entered once the store is locked, so that a second driver starts nothing.
        log: gets the plan, its bytes and the progress.

    Returns:
        How many trajectories were planned, recorded, repaired (the damaged among the recorded), restored and pruned,
        and the seconds.

    Raises:
        lesa.locks.Locked: another recorder is at work on this store.
        OSError: the disk cannot hold what is missing, or does not let a trajectory be read; nothing was recorded then.
        StoreError: trajectories were damaged while the others were recorded.
        Exception: what recording a trajectory raised; what is committed stays.
    """
    started = time.monotonic()
    with store.writer_lock():
        swept = store.sweep()
        if swept:
            log.info("removed %d unfinished trajectories of a recorder that was killed", len(swept))
        ledger, pruned = Ledger(store), PrunedTrajectories(store)
        with recorders as pool:
            source, size = pool.describe()
            plan = plan_recording(recording, source)
            every = {item.key for item in plan}
            restored = pruned.restore(every)
            pruned.drop_old()
            if restored:
                log.info("%d trajectories that were pruned are taken back instead of recorded again", len(restored))
            damaged = _drop_damaged(store, every, ledger, log)
            todo = missing(store, plan)
            _announce(plan, todo, size, log)
            num_bytes = size.bytes_of(count_by_steps(todo))
            pruned.make_room(num_bytes)
            require_space(store.path, num_bytes)
            seconds = _record(pool, todo, log)
        _verify_recorded(store, every, ledger, {item.key: seconds / len(todo) for item in todo})
        removed = _prune(store, pruned, every, ledger, log)
        write_catalogue(store)
    return {
        "planned": len(every),
        "pruned": len(removed),
        "recorded": len(todo),
        "repaired": len(damaged),
        "restored": len(restored),
        "seconds": round(time.monotonic() - started, 1),
    }


def _drop_damaged(store: TrajectoryStore, planned: set[str], ledger: Ledger, log: Log) -> list[str]:
    """Remove what is in the store and not as it was recorded; which."""
    unread = ledger.unread(sorted(planned.intersection(store.keys())))
    if unread:
        log.info("reading %d trajectories that are new here or were touched: is all as it was recorded?", len(unread))
    damaged = ledger.verify(unread)
    store.require_readable(damaged)
    for problem in damaged.values():
        log.warning("damaged, recorded anew: %s", problem)
    store.remove(damaged)
    ledger.save()
    return list(damaged)


def _announce(plan: list[PlannedTrajectory], todo: list[PlannedTrajectory], size: RecordingSize, log: Log) -> None:
    every = {item.key: item for item in plan}
    log.info(
        "%d trajectories planned, %d to record: about %s of %s in all",
        len(every),
        len(todo),
        format_bytes(size.bytes_of(count_by_steps(todo))),
        format_bytes(size.bytes_of(count_by_steps(every.values()))),
    )


def _verify_recorded(store: TrajectoryStore, planned: set[str], ledger: Ledger, seconds: Mapping[str, float]) -> None:
    """Read back what was recorded just now (key -> seconds), and what has been touched since it was verified."""
    damaged = ledger.verify(ledger.unread(sorted(planned)), seconds)
    ledger.save()
    if damaged:
        raise StoreError(
            f"{store.path}: {len(damaged)} trajectories were damaged while others were recorded: "
            f"{'; '.join(list(damaged.values())[:3])}. Run the record stage again; look after the disk if this stays"
        )


def _prune(
    store: TrajectoryStore, pruned: PrunedTrajectories, planned: set[str], ledger: Ledger, log: Log
) -> list[str]:
    """Set aside what the plan does not name, and say what it would cost to have it again; which."""
    moved = pruned.prune(planned)
    if moved:
        num_bytes, seconds = pruned.size(moved), ledger.seconds(moved)
        cost = format_bytes(num_bytes) + (f", {seconds:.0f} s of recording" if seconds else "")
        log.warning(
            "%d trajectories that the plan does not name any more (%s) are kept in %s for %d days, for a plan that "
            "names them again; `lesa store drop-pruned %s` deletes them",
            len(moved), cost, pruned.path, KEEP_DAYS, store.path,
        )  # fmt: skip
    ledger.keep_only(planned | set(pruned.keys()))
    ledger.save()
    return moved


def _record(pool: Recorders, todo: list[PlannedTrajectory], log: Log) -> float:
    """A progress bar for people, a log line every tenth for files; the seconds it took."""
    started, every = time.monotonic(), max(1, len(todo) // 10)
    done = 0
    with tqdm(total=len(todo), unit="trajectory", disable=not sys.stderr.isatty() or not todo) as bar:

        def on_done(key: str) -> None:
            nonlocal done
            done += 1
            bar.update()
            if done % every == 0 or done == len(todo):
                log.info("%d of %d recorded, %.1f s", done, len(todo), time.monotonic() - started)

        pool.record(todo, on_done)
    return time.monotonic() - started
