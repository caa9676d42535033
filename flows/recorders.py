"""Ray actors that record, and the driver that keeps them busy and replaces them when they die or hang.

An actor holds one loaded pipeline and commits trajectories to the store itself: one writer, one trajectory. A call is
what one run of the pipeline records.
Every call may be made twice (Ray retries after a crash), so recording what is committed already does nothing.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flows.confidential import confidential
from flows.processes import Process, identify, send
from lesa.models.bill import Bill, charge, counted
from lesa.params import Workload
from lesa.recording.drive import LocalRecorder
from lesa.recording.plan import PlannedTrajectory, RecordingSize, batches
from lesa.recording.store import TrajectoryStore

Batch = Sequence[PlannedTrajectory]
MAX_ATTEMPTS = 3  # per batch, Ray's own restarts of an actor not counted
START_TIMEOUT_S = 1800  # loading a pipeline of tens of gigabytes from a slow disk
_TOO_LITTLE = ("out of memory", "not enough memory", "can't allocate memory", "can't start new thread")  # torch's words
_LOG = logging.getLogger("lesa.actors")
R = TypeVar("R")


class Recorder:
    """One loaded pipeline on one device; runs inside a Ray actor, and as it is in a test."""

    def __init__(self, workload: Workload, root: str) -> None:
        """
        Args:
            workload: what to record.
            root: repository root; the workload's paths are relative to it.
        """
        os.chdir(root)
        self._recorder = confidential(_load, workload)  # Ray logs what an actor raises

    def process(self) -> Process | None:
        """This actor's process; answering means that the pipeline is loaded."""
        return identify(os.getpid())

    def describe(self) -> tuple[tuple[dict[str, Any], RecordingSize], Bill]:
        """What of the pipeline determines a recording, and how large one trajectory is; and what telling it took."""
        return confidential(_billed, self._recorder.describe)

    def record(self, batch: Batch) -> tuple[list[str], Bill]:
        """Record and commit a batch; nothing to do for what is there. Returns its keys, and what they took."""
        return confidential(_billed, self._recorder.record_batch, batch)


class OutOfMemory(RuntimeError):
    """A recorder, or its device, has not the memory for a batch; another one may have, once this one's is free."""


def _billed(work: Callable[..., R], *arguments: Any) -> tuple[R, Bill]:
    with counted() as bill:
        return _within_memory(work, *arguments), bill


def _within_memory(work: Callable[..., R], *arguments: Any) -> R:
    """`work(*arguments)`; what Python, torch and the system say of too little memory is one error."""
    try:
        return work(*arguments)
    except (MemoryError, OSError, RuntimeError) as error:
        is_it = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if not is_it and not any(words in str(error) for words in _TOO_LITTLE):
            raise
        said = f" ({_first_line(error)})" if str(error) else ""
    # Out here, so that the batch's tensors, which the traceback holds, are free.
    raise OutOfMemory(f"out of memory{said}: fewer resources.record.actors or a smaller record.batch_size take less")


def _load(workload: Workload) -> LocalRecorder:
    import diffusers
    import torch
    import transformers

    from lesa.models.pipelines import load_pipeline

    for library in (diffusers, transformers):  # an actor's advice only clutters the driver's log
        library.utils.logging.set_verbosity_error()
    # Before the first operation: the number of threads decides how sums are split, and so the last bit.
    torch.set_num_threads(workload.resources.record.threads_per_actor)
    store = TrajectoryStore.create(workload.paths.trajectories)
    return LocalRecorder(load_pipeline(workload.model, workload.resources.device), workload.recording, store)


class RecordingFailed(RuntimeError):
    """A trajectory that could not be recorded; what was committed before stays."""


@dataclasses.dataclass(slots=True)
class _Actor:
    handle: Any
    process: Process | None = None  # its first one; None until the pipeline is loaded
    batch: Batch | None = None  # what it is recording
    deadline: float = 0.0  # seconds of time.monotonic


class RecorderPool:
    """Recorders as Ray actors, with at most one call in flight each."""

    def __init__(self, ray: Any, workload: Workload, root: Path) -> None:
        self._ray, self._workload, self._root = ray, workload, root
        self._gpus = int(ray.cluster_resources().get("GPU", 0)) if workload.resources.device != "cpu" else 0
        self._calls: dict[Any, _Actor] = {}  # what is in flight
        self._idle: list[_Actor] = []

    @property
    def capacity(self) -> int:
        """How many actors work side by side: one a GPU, or what the settings say where there is none."""
        return self._gpus or self._workload.resources.record.actors

    def describe(self) -> tuple[dict[str, Any], RecordingSize]:
        """Starts the first actor and asks it what `Recorder.describe` answers.

        Raises:
            RecordingFailed: it died, or has too little memory for a trajectory.
            Exception: what loading or describing raised.
        """
        actor = _Actor(self._new_handle())
        try:
            answer: tuple[dict[str, Any], RecordingSize]
            answer, passes = self._ray.get(actor.handle.describe.remote(), timeout=START_TIMEOUT_S)
            charge(passes)
            actor.process = self._ray.get(actor.handle.process.remote())
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor.handle, no_restart=True)
            raise RecordingFailed(f"a recorder could not start: {self._passing(error)}") from None
        self._idle.append(actor)
        return answer

    def record(self, todo: Sequence[PlannedTrajectory], on_done: Callable[[str], object]) -> None:
        """Record all of `todo`; `on_done` gets every key once its batch is committed.

        Raises:
            RecordingFailed: naming the first key of the batch whose every attempt crashed or took too long.
            Exception: what the recording itself raised, at once: another attempt would raise it again.
        """
        waiting: deque[Batch] = deque(batches(todo, self._workload.record.batch_size))
        attempts = {batch[0].key: 0 for batch in waiting}
        while len(self._idle) + len(self._calls) < min(self.capacity, len(waiting)):
            self._start(_Actor(self._new_handle()))
        while waiting or any(actor.batch for actor in self._calls.values()):
            while waiting and self._idle:
                self._submit(self._idle.pop(), waiting.popleft(), attempts)
            for actor, batch, problem in self._wait():
                if problem is None:
                    self._idle.append(actor)
                    for item in batch or ():
                        on_done(item.key)
                    continue
                _LOG.warning("recorder process %s: %s", actor.process and actor.process.pid, problem)
                if batch is None:
                    raise RecordingFailed(f"a recorder could not start: {problem}")
                if attempts[batch[0].key] >= MAX_ATTEMPTS:
                    which = f"trajectory {batch[0].key}"
                    others = f" (and {len(batch) - 1} in the same call)" if len(batch) > 1 else ""
                    raise RecordingFailed(
                        f"{which}{others} failed {MAX_ATTEMPTS} times, at last: {problem}; what is committed stays"
                    )
                waiting.appendleft(batch)
                self._start(_Actor(self._new_handle()))

    def close(self) -> None:
        """End every actor."""
        for actor in (*self._idle, *self._calls.values()):
            self._ray.kill(actor.handle, no_restart=True)
        self._idle, self._calls = [], {}

    def _new_handle(self) -> Any:
        threads = self._workload.resources.record.threads_per_actor
        resources: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if self._gpus else {"num_cpus": threads}
        remote = self._ray.remote(max_restarts=2, max_task_retries=2, **resources)(Recorder)
        return remote.remote(self._workload, str(self._root))

    def _start(self, actor: _Actor) -> None:
        actor.deadline = time.monotonic() + START_TIMEOUT_S
        self._calls[actor.handle.process.remote()] = actor

    def _submit(self, actor: _Actor, batch: Batch, attempts: dict[str, int]) -> None:
        attempts[batch[0].key] += 1
        actor.batch = batch
        actor.deadline = time.monotonic() + self._workload.resources.record.timeout_s
        self._calls[actor.handle.record.remote(batch)] = actor

    def _wait(self) -> list[tuple[_Actor, Batch | None, str | None]]:
        """Calls that ended: the actor, what it recorded (None: it started), what went wrong if anything."""
        nearest = min(actor.deadline for actor in self._calls.values())
        timeout = max(0.0, nearest - time.monotonic())
        done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=timeout)
        ended: list[tuple[_Actor, Batch | None, str | None]] = []
        for call in done:
            actor = self._calls.pop(call)
            batch, actor.batch = actor.batch, None
            try:
                answer = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                ended.append((actor, batch, self._passing(error)))
                self._ray.kill(actor.handle, no_restart=True)  # one that lacks memory lives, and holds what it has
                continue
            if batch is None:
                actor.process = answer
            else:
                charge(answer[1])
            ended.append((actor, batch, None))
        for call, actor in [(c, a) for c, a in self._calls.items() if a.deadline <= time.monotonic()]:
            del self._calls[call]
            batch, actor.batch = actor.batch, None
            self._ray.kill(actor.handle, no_restart=True)
            if actor.process is not None:  # a stopped process does not hear Ray
                send(actor.process, signal.SIGKILL)
            ended.append((actor, batch, "no answer in time"))
        return ended

    def _passing(self, error: Exception) -> str:
        """What ended a call that may succeed elsewhere: a death, or too little memory. Any other error is raised."""
        known = self._ray.exceptions
        if isinstance(error, known.RayTaskError) and isinstance(error.cause, OutOfMemory):
            return str(error.cause)
        if isinstance(error, known.RayActorError | known.OutOfMemoryError):
            return _first_line(error)
        raise error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
