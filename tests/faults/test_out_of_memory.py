"""A recorder that runs out of memory: an error of its own, or the system's SIGKILL; tried again, and not for ever."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flows import recorders
from flows.ray_jobs import ray_session
from flows.recorders import OutOfMemory, Recorder, RecorderPool, RecordingFailed
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.recording.plan import PlannedTrajectory, plan_recording
from lesa.recording.store import TrajectoryStore
from tests.helpers.tiny import tiny_repository

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workload]:
    monkeypatch.chdir(tiny_repository(tmp_path, actors=1))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the actors must find this file
    threads = torch.get_num_threads()
    yield load_params()
    torch.set_num_threads(threads)


class Hungry(Recorder):
    """Records the first trajectory; for the next one its process gets no more memory than it has."""

    def record(self, batch: Any) -> list[str]:
        if TrajectoryStore.open("data/trajectories/tiny.zarr").keys():
            self._recorder.record_batch = lambda batch: [eat() for _ in batch]  # type: ignore[method-assign]
        return super().record(batch)


class Killed(Recorder):
    """Ended as the system ends the process that takes the most."""

    def record(self, batch: Any) -> list[str]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def eat() -> str:
    used = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, ((used << 10) + (64 << 20), resource.RLIM_INFINITY))
    return str(torch.ones(1 << 28).sum())  # a gibibyte


@pytest.mark.parametrize(
    "ask",
    [lambda: bytearray(1 << 60), lambda: torch.empty(1 << 50), lambda: (_ for _ in ()).throw(OSError(12, "no memory"))],
    ids=["Python", "torch", "system"],
)
def test_whoever_says_it_it_is_the_same_error_with_a_remedy(workload: Workload, ask: Callable[[], Any]) -> None:
    recorder = Recorder(workload, str(Path.cwd()))
    recorder._recorder.record_batch = lambda batch: [next(iter([ask()]))]  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match="out of memory.*fewer resources.record.actors or a smaller"):
        recorder.record([])


def test_another_error_stays_what_it_is(workload: Workload) -> None:
    recorder = Recorder(workload, str(Path.cwd()))
    recorder._recorder.record_batch = lambda batch: [torch.ones(2) @ torch.ones(3)]  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="size") as caught:
        recorder.record([])
    assert not isinstance(caught.value, OutOfMemory)


def test_a_death_and_too_little_memory_are_tried_again_and_nothing_else(workload: Workload) -> None:
    import ray

    class Cluster:
        exceptions = ray.exceptions

        @staticmethod
        def cluster_resources() -> dict[str, float]:
            return {"CPU": 1.0}

    def task_error(cause: Exception) -> Exception:
        return ray.exceptions.RayTaskError("record", "its traceback", cause)

    pool = RecorderPool(Cluster, workload, Path.cwd())
    assert pool._passing(task_error(OutOfMemory("out of memory: fewer actors"))) == "out of memory: fewer actors"
    assert pool._passing(ray.exceptions.RayActorError()).startswith("The actor")
    assert "memory" in pool._passing(ray.exceptions.OutOfMemoryError("the machine has no more memory"))
    with pytest.raises(ray.exceptions.RayTaskError):
        pool._passing(task_error(RuntimeError("a fault of code")))


def failed(workload: Workload, pool_of: Callable[[Any], RecorderPool], count: int) -> tuple[str, list[str]]:
    """What a pool says that cannot record all of `count` trajectories; the keys that were planned."""
    plan: list[PlannedTrajectory] = []
    with ray_session(1) as ray:
        pool = pool_of(ray)
        try:
            plan = plan_recording(workload.recording, pool.describe()[0])[:count]
            with pytest.raises(RecordingFailed) as caught:
                pool.record(plan, lambda key: None)
        finally:
            pool.close()
    return str(caught.value), [item.key for item in plan]


@pytest.mark.long
def test_a_recorder_without_memory_is_replaced_and_given_up_by_name(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "Recorder", Hungry)
    monkeypatch.setattr(recorders, "MAX_ATTEMPTS", 2)
    said, keys = failed(workload, lambda ray: RecorderPool(ray, workload, Path.cwd()), 2)
    assert said.startswith(f"trajectory {keys[1]} failed 2 times, at last: "), said
    store = TrajectoryStore.open(workload.paths.trajectories)
    assert store.keys() == [keys[0]] and store.verify() == []


@pytest.mark.long
def test_one_that_the_system_ends_each_time_is_given_up_by_name(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "Recorder", Killed)
    said, keys = failed(workload, lambda ray: RecorderPool(ray, workload, Path.cwd()), 1)
    assert said.startswith(f"trajectory {keys[0]} failed {recorders.MAX_ATTEMPTS} times, at last: "), said
    assert TrajectoryStore.open(workload.paths.trajectories).keys() == []
