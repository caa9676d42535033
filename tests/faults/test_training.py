"""Training that is killed, starved of disk or fed damage ends with the weights of an undisturbed run, or says why not.

Children come from a fork server: real processes with a real SIGKILL, without importing torch anew for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.predictor.predictor import Predictor
from lesa.recording.store import TrajectoryStore
from lesa.recording.store_format import StoreError
from lesa.training import jobs
from tests.faults import sweep
from tests.helpers.recording import record
from tests.helpers.tiny import tiny_repository

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
SECONDS = 120  # far more than any child needs
STEPS = ("ground_truth", "closed_loop")


def settings(gate: str) -> Workload:
    """The tiny repository's workload with six iterations and three checkpoints of either step."""
    workload = load_params()
    every: dict[str, Any] = {"iterations": 6, "checkpoint_every": 2, "batch_size": 2}
    return dataclasses.replace(
        workload,
        predictor=dataclasses.replace(
            workload.predictor, boundaries=(0.6,), history_sizes=(2, 2), gate=gate, hidden=4, grid=3
        ),
        ground_truth=dataclasses.replace(workload.ground_truth, **every),
        closed_loop=dataclasses.replace(workload.closed_loop, **every),
    )


def run_job(workload: Workload, step: str, report: Callable[[int, dict[str, float]], None]) -> dict[str, Any]:
    """One job of a training step; digests of its tensors and its figures."""
    torch.set_num_threads(1)
    if step == "ground_truth":
        trained = jobs.run_ground_truth_job(workload, jobs.Job("2x", 1), report)
    else:
        trained = jobs.run_closed_loop_job(workload, "2x", report)
    digests = {
        f"{stage}/{name}": hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for stage, tensors in trained.experts.items()
        for name, value in tensors.items()
    }
    return {"digests": digests, "figures": trained.figures}


def child(root: str, step: str, gate: str, kill: tuple[str, int] | None, result: str) -> None:
    """Runs a job and writes its result, or ends itself by SIGKILL where `kill` says."""
    os.chdir(root)
    if kill is not None and kill[0] == "write":
        count_down_writes(kill[1])
    iterations: list[int] = []

    def report(iteration: int, values: dict[str, float]) -> None:
        iterations.append(iteration)
        if kill == ("iteration", iteration):
            os.kill(os.getpid(), signal.SIGKILL)

    done = run_job(settings(gate), step, report)
    Path(result).write_text(json.dumps(done | {"iterations": iterations}))


def count_down_writes(left: int) -> None:
    """SIGKILL before the n-th call that makes something durable: between any two acts of a commit."""
    calls = [0]
    for name in ("fsync", "rename", "replace"):

        def counted(*args: Any, true: Any = getattr(os, name), **kwargs: Any) -> Any:  # noqa: B008
            calls[0] += 1
            if calls[0] == left:
                os.kill(os.getpid(), signal.SIGKILL)
            return true(*args, **kwargs)

        setattr(os, name, counted)


def start(target: Callable[..., None], *arguments: Any) -> int | None:
    """Exit code of a child; minus nine where it was killed."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recorded tiny repository with the first step's predictor, to be copied for each fault."""
    CONTEXT.set_forkserver_preload(["kan", "tests.faults.test_training"])
    made = tiny_repository(tmp_path_factory.mktemp("repository"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(made):
        # The server does not take over our sys.path before it preloads.
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        for gate in ("table", "kan"):
            workload = settings(gate)
            pipe = load_pipeline(workload.model, workload.resources.device)
            record(workload, pipe)
            experts = {
                str(job): jobs.run_ground_truth_job(workload, job, lambda *_: None)
                for job in jobs.list_ground_truth_jobs(workload)
            }
            assert isinstance(jobs.finish(workload, "ground_truth", experts), Predictor)
            shutil.copytree(workload.paths.ground_truth, made / "first_step" / gate)
        yield made
    torch.set_num_threads(threads)


def copy_of(root: Path, folder: Path, gate: str) -> Path:
    """A repository of one's own; what is only read is shared by links."""
    target = folder / "repository"
    (target / "data/checkpoints/tiny").mkdir(parents=True)
    for name in ("base", "prompts", "trajectories"):
        (target / "data" / name).symlink_to(root / "data" / name)
    shutil.copy(root / "params.yaml", target)
    shutil.copytree(root / "first_step" / gate, target / "data/checkpoints/tiny/ground_truth")
    return target


@pytest.fixture(scope="module")
def undisturbed(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    results = {}
    for step, gate in ((s, g) for s in STEPS for g in ("table", "kan")):
        own = copy_of(root, tmp_path_factory.mktemp("whole"), gate)
        assert start(child, str(own), step, gate, None, str(own / "result.json")) == 0
        results[step, gate] = json.loads((own / "result.json").read_text())
        assert results[step, gate]["iterations"] == [1, 2, 3, 4, 5, 6]
    return results


def resumed(own: Path, step: str, gate: str) -> dict[str, Any]:
    assert start(child, str(own), step, gate, None, str(own / "result.json")) == 0
    done: dict[str, Any] = json.loads((own / "result.json").read_text())
    return done


@pytest.mark.parametrize(
    ("step", "gate", "iteration"),
    [
        ("ground_truth", "kan", 1),
        ("ground_truth", "kan", 2),
        ("ground_truth", "kan", 5),
        ("ground_truth", "table", 6),
        ("closed_loop", "kan", 3),
        ("closed_loop", "kan", 4),
        ("closed_loop", "table", 1),
    ],
)
def test_killed_at_an_iteration(
    root: Path, undisturbed: Any, tmp_path: Path, step: str, gate: str, iteration: int
) -> None:
    own = copy_of(root, tmp_path, gate)
    code = start(child, str(own), step, gate, ("iteration", iteration), str(own / "none"))
    assert code == -signal.SIGKILL
    done = resumed(own, step, gate)
    assert done["iterations"] == list(range(iteration // 2 * 2 + 1, 7)), "goes on from the newest checkpoint"
    assert done["digests"] == undisturbed[step, gate]["digests"]
    assert done["figures"] == undisturbed[step, gate]["figures"]


# Three acts: sync the parents of new folders. Then eleven a commit: sync, rename and sync the folder for two files,
# sync the tree (three), rename the folder, sync its parent. The third commit also removes the first, in two.
WRITES = [*range(1, 15), 15, 24, 35, 37, 38]


@pytest.mark.parametrize(("step", "writes"), [("ground_truth", WRITES), ("closed_loop", [4, 10, 13, 24, 37])])
def test_killed_inside_a_checkpoint(
    root: Path, undisturbed: Any, tmp_path: Path, step: str, writes: list[int]
) -> None:
    for write in writes:
        own = copy_of(root, tmp_path / str(write), "table")
        assert (
            start(child, str(own), step, "table", ("write", write), str(own / "none")) == -signal.SIGKILL
        ), write
        with contextlib.chdir(own):
            done = run_job(settings("table"), step, lambda *_: None)
        assert done["digests"] == undisturbed[step, "table"]["digests"], write
        assert done["figures"] == undisturbed[step, "table"]["figures"], write
        assert not list((own / "data/checkpoints").rglob("*.partial")), write


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_moment(
    root: Path, undisturbed: Any, tmp_path: Path, step: str, record_property: Callable[[str, object], None]
) -> None:
    """Kills from outside, over all that a training takes, its start and its last checkpoint included."""
    started = time.monotonic()
    resumed(copy_of(root, tmp_path / "timed", "table"), step, "table")
    whole = time.monotonic() - started
    killed = 0
    for number, moment in enumerate(sweep.moments(whole, sweep.kills(1), seed=len(step))):
        own = copy_of(root, tmp_path / str(number), "table")
        process = CONTEXT.Process(target=child, args=(str(own), step, "table", None, str(own / "none")))
        process.start()
        process.join(moment)  # one that was quicker than its killer needs no rerun to be whole
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        done = resumed(own, step, "table")
        assert done["digests"] == undisturbed[step, "table"]["digests"], moment
        assert done["figures"] == undisturbed[step, "table"]["figures"], moment
        assert not list((own / "data/checkpoints").rglob("*.partial")), moment
    record_property("kills", killed)
    assert killed >= sweep.kills(1) // 2, "the sweep did hit trainings in the middle"


def test_killed_again_and_again(root: Path, undisturbed: Any, tmp_path: Path) -> None:
    own = copy_of(root, tmp_path, "table")
    for write in (3, 14, 8, 20):
        code = start(child, str(own), "ground_truth", "table", ("write", write), str(own / "none"))
        assert code == -signal.SIGKILL, write
    assert resumed(own, "ground_truth", "table")["digests"] == undisturbed["ground_truth", "table"]["digests"]


def checkpoints(own: Path) -> list[Path]:
    return sorted((own / "data/checkpoints/tiny/work").rglob("iteration-*"))


def test_a_torn_newest_checkpoint_costs_two_iterations(root: Path, undisturbed: Any, tmp_path: Path) -> None:
    own = copy_of(root, tmp_path, "table")
    start(child, str(own), "ground_truth", "table", ("iteration", 5), str(own / "none"))
    older, newest = checkpoints(own)
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    done = resumed(own, "ground_truth", "table")
    assert done["iterations"] == [3, 4, 5, 6]
    assert done["digests"] == undisturbed["ground_truth", "table"]["digests"]
    assert older.name == "iteration-00000002"


def test_a_changed_setting_never_goes_on_from_the_old_checkpoint(
    root: Path, undisturbed: Any, tmp_path: Path
) -> None:
    own = copy_of(root, tmp_path, "table")
    start(child, str(own), "ground_truth", "table", ("iteration", 5), str(own / "none"))
    text = (own / "params.yaml").read_text()
    (own / "params.yaml").write_text(text.replace("    prompts: tiny", "    prompts: tiny\n    seed: 4"))
    done = resumed(own, "ground_truth", "table")
    assert done["iterations"] == [1, 2, 3, 4, 5, 6]
    assert done["digests"] != undisturbed["ground_truth", "table"]["digests"]


def starved(root: str, step: str, how: str, result: str) -> None:
    """A disk that takes the first checkpoint only; then it grows, and the run goes on."""
    os.chdir(root)
    work = Path("data/checkpoints/tiny/work")
    work.mkdir()
    sizes: list[int] = []
    if how == "tmpfs" and not mount_tmpfs(work, 0):
        Path(result).write_text(json.dumps({"skip": "the kernel allows no mount namespace here"}))
        return

    def report(iteration: int, values: dict[str, float]) -> None:
        if iteration == 2:
            (first,) = work.rglob("state.safetensors")
            sizes.append(first.stat().st_size)
            if how == "tmpfs":
                mount_tmpfs(work, used(work) + 4096)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] // 2, resource.RLIM_INFINITY))

    message: dict[str, Any] = {}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run_job(settings("table"), step, report)
    except OSError as error:
        message = {"errno": error.errno, "filename": str(error.filename), "text": str(error)}
    if how == "tmpfs":
        mount_tmpfs(work, 1 << 26)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = sorted(p.name for p in work.rglob("iteration-*"))
    iterations: list[int] = []
    done = run_job(settings("table"), step, lambda iteration, _: iterations.append(iteration))
    Path(result).write_text(json.dumps(done | {"error": message, "left": left, "iterations": iterations}))


def used(folder: Path) -> int:
    at = os.statvfs(folder)
    return (at.f_blocks - at.f_bfree) * at.f_frsize


def mount_tmpfs(folder: Path, size: int) -> bool:
    """A tmpfs of `size` bytes in a namespace of our own (0: the first mount, 64 MiB); False where it is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, remount = 0x10000000, 0x00020000, 0x20
    if size == 0:
        user, group = os.getuid(), os.getgid()
        if libc.unshare(new_user | new_mounts) != 0:
            return False
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        except OSError:
            return False
    options = f"size={size or 1 << 26}".encode()
    flags = 0 if size == 0 else remount
    return bool(libc.mount(b"lesa", str(folder.absolute()).encode(), b"tmpfs", flags, options) == 0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", ["tmpfs", "file limit"])
def test_a_full_disk_says_so_and_keeps_what_was_saved(
    root: Path, undisturbed: Any, tmp_path: Path, step: str, how: str
) -> None:
    own = copy_of(root, tmp_path, "table")
    assert start(starved, str(own), step, how, str(own / "result.json")) == 0
    done = json.loads((own / "result.json").read_text())
    if "skip" in done:
        pytest.skip(done["skip"])
    assert done["error"]["errno"] == (errno.ENOSPC if how == "tmpfs" else errno.EFBIG)
    assert "iteration-00000004" in done["error"]["filename"]
    assert done["left"] == ["iteration-00000002"]
    assert done["iterations"] == [3, 4, 5, 6]
    assert done["digests"] == undisturbed[step, "table"]["digests"]


def test_a_damaged_trajectory_is_named_and_never_trained_on(root: Path, tmp_path: Path) -> None:
    own = copy_of(root, tmp_path, "table")
    (own / "data/trajectories").unlink()
    shutil.copytree(root / "data/trajectories", own / "data/trajectories")
    store = TrajectoryStore.open(own / "data/trajectories/tiny.zarr")
    key = store.keys()[0]
    shard = store.path / key / "features/c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with contextlib.chdir(own), pytest.raises(StoreError, match=key):
        jobs.run_ground_truth_job(settings("table"), jobs.Job("2x", 1), lambda *_: pytest.fail("trained"))
    assert not (own / "data/checkpoints/tiny/work").exists()
