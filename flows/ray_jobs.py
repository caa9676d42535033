"""Independent jobs side by side as Ray tasks; in this process where only one may run at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flows.confidential import confidential
from flows.environment import LOOPBACK, quiet_environment
from flows.job_signs import Report, Watch, signs_of_life
from flows.ray_guard import no_orphans
from flows.tracking.run import Reporter
from lesa.errors import LesaError
from lesa.models.bill import Bill, charge, counted
from lesa.params import WorkerResources, Workload

RAY_ATTEMPTS = 3  # to start Ray


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[Any]:
    """A local Ray on loopback for the block, without dashboard; yields the ray module.

    None of its processes outlives this one by more than seconds, however it ends.

    An already initialised Ray is used as it is and left running. num_cpus None lets Ray count.

    Raises:
        LesaError: RAY_ADDRESS names a cluster, or RAY_AUTH_MODE switches the token off.
    """
    quiet_environment()
    if os.environ["RAY_AUTH_MODE"] != "token":
        raise LesaError("RAY_AUTH_MODE: must be 'token' (others on this machine can reach Ray); unset it")
    if os.environ.get("RAY_ADDRESS"):
        raise LesaError("RAY_ADDRESS: a stage runs on this machine alone, in a Ray of its own; unset it")
    import ray

    if ray.is_initialized():
        yield ray
        return
    with no_orphans() as session_is:
        for attempt in range(1, RAY_ATTEMPTS + 1):
            try:
                started = _own_ray(
                    ray,
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                )
                break
            except Exception as error:
                ray.shutdown()
                # Ray gives itself 30 s, which a very busy machine can exceed; nothing is lost by trying again.
                if attempt == RAY_ATTEMPTS or "timed out during startup" not in str(error):
                    raise
        session_is(started.address_info["session_dir"])
        try:
            if started.address_info["node_ip_address"] != LOOPBACK:
                raise LesaError("ray: imported before flows, so that it listens beyond loopback; import flows first")
            yield ray
        finally:
            ray.shutdown()


def _own_ray(ray: Any, **settings: Any) -> Any:
    """`ray.init` of a new session, whatever else runs here; a SIGTERM goes to whom it went before.

    Ray's own handlers of that signal abort the process without a word.
    """
    if threading.current_thread() is not threading.main_thread():
        return ray.init(address="local", **settings)  # Ray sets none here either
    handler, terminated = signal.getsignal(signal.SIGTERM), False
    try:
        return ray.init(address="local", **settings)
    except SystemExit:  # what Ray makes of a SIGTERM while it starts
        terminated = True
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        if terminated:
            signal.raise_signal(signal.SIGTERM)


J = TypeVar("J")
MAX_RETRIES = 2  # of a job whose process dies; it goes on from its last checkpoint
LOOK_SECONDS = 1.0  # how often the driver reads the jobs' signs of life


class JobFailed(RuntimeError):
    """A job that no process got done; what it saved before stays."""


@contextlib.contextmanager
def kept_workers(share: WorkerResources) -> Iterator[None]:
    """Several `run_jobs` of the block share their processes, which keep what they have read and imported."""
    with ray_session(share.workers * share.threads_per_worker) if share.workers > 1 else contextlib.nullcontext():
        yield


def run_jobs(
    work: Callable[[Workload, Any, Any], Any],
    workload: Workload,
    jobs: Mapping[str, J],
    *,
    share: WorkerResources,
    reporter: Reporter,
) -> dict[str, Any]:
    """Runs `work(workload, job, report)` for every job and returns the results by the jobs' names.

    Args:
        work: a module-level function of lesa; it may be called again, and goes on from its
            checkpoints where it keeps any.
        jobs: name -> job; the names are the parts of the run that the values are reported under.
        share: how many jobs run at once, and torch threads of each. Where there are GPUs, they are shared among so
            many. Threads are part of the last bit of a result: sums are split by them.

    Raises:
        LesaError: a job's refusal, as the job raised it. Any other error of a job comes with its process's traceback.
            The other jobs are stopped and keep their checkpoints.
        JobFailed: a job whose every process died or had to be ended.

    A process that gives no sign of life, or reports nothing for `share.timeout_s`, is ended, and its job goes to
    another. A single job at a time is this process's own work, which nobody watches.
    """
    if min(share.workers, len(jobs)) <= 1:
        return {
            name: _job(work, workload, job, share.threads_per_worker, reporter.child(name).report, os.getcwd())
            for name, job in jobs.items()
        }
    with ray_session(share.workers * share.threads_per_worker) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0)) if workload.resources.device != "cpu" else 0
        # A process that has used a GPU keeps it and its memory: on GPUs each job has one of its own.
        remote = ray.remote(max_calls=1)(_watched_job) if gpus else ray.remote(_watched_job)
        task = remote.options(
            num_cpus=share.threads_per_worker,
            num_gpus=min(1.0, gpus / share.workers) if gpus else 0,
            max_retries=MAX_RETRIES,
        )
        watch = Watch(reporter.name, jobs, share.timeout_s)
        try:
            calls = {
                task.remote(
                    work, workload, job, share.threads_per_worker, reporter.child(name), os.getcwd(), watch.path(name)
                ): name
                for name, job in jobs.items()
            }
            results = _collect(ray, calls, watch)
        finally:
            watch.close()
        return {name: results[name] for name in jobs}


def _collect(ray: Any, calls: Mapping[Any, str], watch: Watch) -> dict[str, Any]:
    """The results by name, as the jobs end; the first error ends all, not only when its turn comes."""
    from ray.exceptions import RayTaskError, WorkerCrashedError

    results: dict[str, Any] = {}
    waiting = list(calls)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=LOOK_SECONDS)
        watch.look([calls[call] for call in waiting])
        for call in done:
            name = calls[call]
            try:
                results[name], passes = ray.get(call)
                charge(passes)
            except WorkerCrashedError:
                last = watch.reasons.get(name, "it died")
                raise JobFailed(
                    f"{name}: failed in {MAX_RETRIES + 1} processes, the last one: {last}; what is saved stays"
                ) from None
            except RayTaskError as error:
                if isinstance(error.cause, LesaError):  # of anything else the worker's whole traceback is wanted
                    raise error.cause from None
                raise
    return results


def _watched_job(
    work: Callable[[Workload, Any, Any], Any],
    workload: Workload,
    job: Any,
    threads: int,
    reporter: Reporter,
    folder: str,
    signs: Path,
) -> tuple[Any, Bill]:
    """`_job` in a process of Ray's, which logs what is raised; its result, and what it computed."""
    import lesa.models.pipelines  # noqa: F401 - takes seconds, which are none of the job's

    with signs_of_life(signs, reporter.report) as report, counted() as bill:
        return confidential(_job, work, workload, job, threads, report, folder), bill


def _job(
    work: Callable[[Workload, Any, Any], Any],
    workload: Workload,
    job: Any,
    threads: int,
    report: Report,
    folder: str,
) -> Any:
    os.chdir(Path(folder))
    import torch

    from lesa.models.pipelines import release_memory

    torch.set_num_threads(threads)
    try:
        return work(workload, job, report)
    finally:
        release_memory()
