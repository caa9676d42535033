"""Stage `record`: the trajectories of a workload's prompts, recorded by Ray actors into its store.

python -m flows.record [--workload NAME]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from tqdm import tqdm

from flows.ray_jobs import ray_session
from flows.recorders import RecorderPool
from flows.stage import read_workload, stage_main
from lesa.atomic import format_bytes, require_space
from lesa.params import Workload
from lesa.recording.catalogue import write_catalogue
from lesa.recording.plan import count_by_steps, missing, plan_recording, recorded_prompts
from lesa.recording.store import TrajectoryStore


@flow(name="record")
def record(workload: str | None = None) -> dict[str, Any]:
    """Record what the workload's plan names and the store does not hold; then drop what it does not name."""
    settings = read_workload(workload)
    recorded_prompts(settings)  # unusable prompt files are refused before anything starts
    return record_trajectories(settings)


@task(name="record trajectories", cache_policy=NO_CACHE)
def record_trajectories(workload: Workload) -> dict[str, Any]:
    """A task so that Prefect shows it; the work is `drive`."""
    return drive(workload, get_run_logger())


def drive(workload: Workload, log: Any) -> dict[str, Any]:
    """Keep the actors recording until every planned trajectory is committed.

    Raises:
        lesa.locks.Locked: another recorder is at work on this store.
        OSError: the disk cannot hold what is missing; nothing was recorded then.
        flows.recorders.RecordingFailed: a trajectory failed again and again; what is committed stays.
    """
    started = time.monotonic()
    store = TrajectoryStore.create(workload.paths.trajectories)
    with store.writer_lock():
        swept = store.sweep()
        if swept:
            log.info("removed %d unfinished trajectories of a recorder that was killed", len(swept))
        share = workload.resources.record
        num_cpus = share.actors * share.threads_per_actor
        with ray_session(num_cpus) as ray:
            pool = RecorderPool(ray, workload, Path.cwd())
            try:
                source, size = pool.describe()
                plan = plan_recording(workload, source)
                todo = missing(store, plan)
                whole = {item.key: item for item in plan}
                num_planned = len(whole)
                log.info(
                    "%d trajectories planned, %d to record: about %s of %s in all",
                    num_planned,
                    len(todo),
                    format_bytes(size.bytes_of(count_by_steps(todo))),
                    format_bytes(size.bytes_of(count_by_steps(whole.values()))),
                )
                require_space(store.path, size.bytes_of(count_by_steps(todo)))
                _record(pool, todo, log)
            finally:
                pool.close()
        pruned = store.prune({item.key for item in plan})
        write_catalogue(store)
    if pruned:
        log.info("removed %d trajectories that the plan does not name any more", len(pruned))
    return {
        "planned": num_planned,
        "pruned": len(pruned),
        "recorded": len(todo),
        "seconds": round(time.monotonic() - started, 1),
    }


def _record(pool: RecorderPool, todo: list[Any], log: Any) -> None:
    """A progress bar for people, a log line every tenth for files."""
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


if __name__ == "__main__":
    raise SystemExit(stage_main(record))
