"""The record stage through Prefect and Ray, and its parts without them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from flows.processes import identify
from flows.ray_jobs import ray_session
from flows.record import record_with_ray
from flows.recorders import MAX_ATTEMPTS, Recorder, RecorderPool, RecordingFailed
from lesa import locks
from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.recording.plan import plan_recording
from lesa.recording.prompts import PromptError
from lesa.recording.store import TrajectoryStore
from tests.helpers.clone import clone, run
from tests.helpers.digests import tree_digest
from tests.helpers.recording import record
from tests.helpers.tiny import SPLITS, tiny_repository, write_prompts


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workload:
    monkeypatch.chdir(tiny_repository(tmp_path))
    return load_params()


def test_a_recorder_commits_and_does_nothing_the_second_time(workload: Workload) -> None:
    threads = torch.get_num_threads()
    try:
        recorder = Recorder(workload, str(Path.cwd()))
        assert torch.get_num_threads() == workload.resources.record.threads_per_actor
        assert recorder.process() == identify(os.getpid())
        (source, size), _ = recorder.describe()
        plan = plan_recording(workload.recording, source)
        assert size.num_steps == 8
        store = TrajectoryStore.open(workload.paths.trajectories)
        keys, passes = recorder.record(plan[:1])
        assert keys == [plan[0].key] and passes.forwards == pytest.approx(8)
        inode = (store.path / plan[0].key).stat().st_ino
        keys, passes = recorder.record(plan[:1])
        assert keys == [plan[0].key] and passes.forwards == 0
        assert store.keys() == [plan[0].key] and (store.path / plan[0].key).stat().st_ino == inode
    finally:
        torch.set_num_threads(threads)


def test_a_second_driver_is_refused_before_ray_starts(workload: Workload) -> None:
    import ray

    store = TrajectoryStore.create(workload.paths.trajectories)
    with store.writer_lock(), pytest.raises(locks.Locked, match=f"process {os.getpid()}"):
        record_with_ray(workload, logging.getLogger("test"))
    assert not ray.is_initialized()


def test_bad_prompts_are_refused_before_anything_starts(workload: Workload, tmp_path: Path) -> None:
    from flows import record as stage

    write_prompts(tmp_path, {**SPLITS, "validation": SPLITS["train"][:2]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "read_workload", lambda name: load_params("params.yaml", name))
        with pytest.raises(PromptError, match="both train and validation"):
            stage.record.fn()
    assert not workload.paths.trajectories.parent.exists()


@pytest.mark.slow
def test_the_stage_records_what_a_plain_process_records(tmp_path: Path) -> None:
    repository = clone(tmp_path / "clone")
    refused = run(repository, "flows.record", "--workload", "nope")
    assert refused.returncode == 2 and "'nope' is not in the file" in refused.stderr
    assert "Traceback" not in refused.stderr and not (repository / "data/trajectories").exists()

    done = run(repository, "flows.record")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert (result["planned"], result["recorded"], result["pruned"]) == (6, 6, 0)
    assert "6 to record: about " in done.stderr

    here, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(repository)
    torch.set_num_threads(1)
    try:
        workload = load_params()
        plain = TrajectoryStore.create(tmp_path / "plain.zarr")
        record(workload, load_pipeline(workload.model, workload.resources.device), plain)
        recorded = TrajectoryStore.open(workload.paths.trajectories)
        assert recorded.verify() == []
        assert tree_digest(recorded.path.resolve()) == tree_digest(plain.path)
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_trajectory_that_never_ends_is_given_up_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2000 steps in a second: every attempt is too slow, and the last one says which trajectory it was."""
    monkeypatch.chdir(tiny_repository(tmp_path, num_inference_steps=2000, timeout_s=1))
    workload = load_params()
    with ray_session(2) as ray:
        pool = RecorderPool(ray, workload, Path.cwd())
        try:
            plan = plan_recording(workload.recording, pool.describe()[0])
            with pytest.raises(RecordingFailed, match=f"{plan[0].key} failed {MAX_ATTEMPTS} times.*in time"):
                pool.record(plan[:1], lambda key: None)
        finally:
            pool.close()
    assert TrajectoryStore.open(workload.paths.trajectories).keys() == []
