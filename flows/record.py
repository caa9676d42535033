"""Stage `record`: the trajectories of a workload's prompts, recorded by Ray actors into its store.

python -m flows.record [--workload NAME]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from flows.prefect_flow import flow, task
from flows.ray_jobs import ray_session
from flows.recorders import RecorderPool
from flows.stage import billed, read_workload, stage_main
from lesa.params import Workload
from lesa.recording.drive import Log, drive
from lesa.recording.plan import recorded_prompts
from lesa.recording.store import TrajectoryStore


@flow(name="record")
def record(workload: str | None = None) -> dict[str, Any]:
    """Record what the workload's plan names and the store does not hold whole; then set aside what it does not name."""
    settings = read_workload(workload)
    recorded_prompts(settings.recording)  # unusable prompt files are refused before anything starts
    return record_trajectories(settings)


@task(name="record trajectories")
def record_trajectories(workload: Workload) -> dict[str, Any]:
    """A task so that Prefect shows it; the work is `record_with_ray`."""
    with billed("record", workload):
        return record_with_ray(workload, get_run_logger())


def record_with_ray(workload: Workload, log: Log) -> dict[str, Any]:
    """`lesa.recording.drive.drive` with Ray actors.

    Raises:
        flows.recorders.RecordingFailed: a trajectory failed again and again; what is committed stays.
    """
    store = TrajectoryStore.create(workload.paths.trajectories)
    return drive(workload.recording, store, _ray_recorders(workload), log)


@contextmanager
def _ray_recorders(workload: Workload) -> Iterator[RecorderPool]:
    share = workload.resources.record
    with ray_session(share.actors * share.threads_per_actor) as ray:
        pool = RecorderPool(ray, workload, Path.cwd())
        try:
            yield pool
        finally:
            pool.close()


if __name__ == "__main__":
    raise SystemExit(stage_main(record))
