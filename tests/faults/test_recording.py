"""Recorders are killed, stopped, run out of disk and meet each other: the store ends as if nothing had been.

The oracle is always the same: the digest of the store equals that of a recording nobody disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flows.ray_guard import MARK
from lesa import locks
from lesa.models.pipelines import load_pipeline
from lesa.params_file import load_params
from lesa.recording.store import TrajectoryStore
from tests.faults import sweep
from tests.helpers.digests import tree_digest
from tests.helpers.recording import record
from tests.helpers.tiny import tiny_repository
from tests.lesa.recording.test_store import trajectory

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
STORE = "data/trajectories/tiny.zarr"


def python(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("workload"), num_inference_steps=40, timeout_s=8)


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> str:
    """Digest of the store that one quiet process records."""
    here, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(root)
    torch.set_num_threads(1)
    try:
        workload = load_params()
        store = TrajectoryStore.create("undisturbed.zarr")
        assert record(workload, load_pipeline(workload.model, workload.resources.device), store)["recorded"] == 6
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
    assert store.path.name == "undisturbed.zarr"
    return tree_digest(root / store.path)


@pytest.fixture(scope="module")
def recorder(root: Path) -> Iterator[subprocess.Popen[str]]:
    process = python("-m", "tests.faults.forking_recorder", str(root), stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    for line in process.stdout:
        if line == "ready\n":
            break
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


def start(recorder: subprocess.Popen[str], store: Path, die_at: str = "") -> int:
    assert recorder.stdin is not None
    recorder.stdin.write(f"{store}\t{die_at}\n")
    recorder.stdin.flush()
    return int(answer(recorder, "pid"))


def answer(recorder: subprocess.Popen[str], word: str) -> str:
    """The next answer that begins with `word`; a test that failed half-way may have left others behind."""
    assert recorder.stdout is not None
    for line in recorder.stdout:
        if line.startswith(f"{word} "):
            return line.split()[1]
    raise AssertionError("the recorder has ended")


def kill(pid: int) -> None:
    """SIGKILL; a recording that was quicker than its killer is gone and reaped."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def status(recorder: subprocess.Popen[str]) -> int:
    """How the recording ended: 0, or minus the signal."""
    return os.waitstatus_to_exitcode(int(answer(recorder, "ended")))


def wait_for(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def committed(store: Path) -> list[str]:
    return sorted(name for name in os.listdir(store) if len(name) == 32) if store.exists() else []


def test_a_kill_at_any_moment_and_a_rerun_end_as_undisturbed(
    root: Path, undisturbed: str, recorder: subprocess.Popen[str], tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    started = time.monotonic()
    start(recorder, tmp_path / "timed.zarr")
    assert status(recorder) == 0
    whole = time.monotonic() - started  # kills are spread over what a recording takes on this machine
    pairs = max(1, sweep.kills(4) // 2)
    first, second = (sweep.moments(whole, pairs, seed) for seed in (0, 1))
    killed = interrupted = 0
    for trial, delays in enumerate(zip(first, reversed(second), strict=True)):
        store = tmp_path / f"{trial}.zarr"
        for delay in delays:  # killed twice, the second time while it goes on where the first was
            pid = start(recorder, store)
            time.sleep(delay)
            kill(pid)
            ended = status(recorder)
            killed += ended == -signal.SIGKILL
            interrupted += ended == -signal.SIGKILL and len(committed(store)) < 6
            assert TrajectoryStore.create(store).verify() == []
        start(recorder, store)
        assert status(recorder) == 0
        assert tree_digest(store) == undisturbed, f"trial {trial}"
        assert len(committed(store)) == 6
    record_property("kills", killed)
    assert interrupted >= pairs / 2  # the sweep did hit recordings in the middle


def test_a_kill_while_a_trajectory_is_being_written(
    root: Path, undisturbed: str, recorder: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Killed when the unfinished folder, its record or its arrays appear: never committed, swept."""
    for number, part in enumerate(("", "/zarr.json", "/context/c.0", "/features/c.0.0.0.0")):
        store = tmp_path / f"{number}.zarr"
        start(recorder, store, die_at=f"*/{'?' * 32}.*.partial{part}*")
        assert status(recorder) == -signal.SIGKILL
        assert committed(store) == [] and TrajectoryStore.open(store).verify() == []
        start(recorder, store)
        assert status(recorder) == 0
        assert list(store.glob("*.partial")) == []
        assert tree_digest(store) == undisturbed


def test_commits_killed_at_every_point_of_time_are_whole_or_absent(tmp_path: Path) -> None:
    """Nothing but commits, so that most kills fall inside one."""
    script = (
        "import sys; from lesa.recording.store import TrajectoryStore\n"
        "from tests.lesa.recording.test_store import trajectory\n"
        "import os; trajectory(); import zarr; print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        store = TrajectoryStore.create(line.strip())\n"
        "        [store.commit(trajectory(seed)) for seed in range(6)]; os._exit(0)\n"
        "    print('pid', pid, flush=True); print('ended', os.waitpid(pid, 0)[1], flush=True)\n"
    )
    expected = TrajectoryStore.create(tmp_path / "expected.zarr")
    for seed in range(6):
        expected.commit(trajectory(seed))
    process = python("-c", script, stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    delays = random.Random(1)
    try:
        for trial in range(25):
            path = tmp_path / f"{trial}.zarr"
            pid = start(process, path)
            time.sleep(delays.uniform(0.0, 0.15))
            kill(pid)
            status(process)
            store = TrajectoryStore.create(path)
            assert store.verify() == []
            store.sweep()
            for seed in range(6):
                store.commit(trajectory(seed))
            # A root document that was being written when the kill came leaves its own unfinished file.
            assert tree_digest(path) == tree_digest(expected.path), f"trial {trial}"
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def test_everything_is_synced_before_the_rename_that_commits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut drops what was not synced: when the trajectory gets its name, nothing of it is unsynced."""
    store = TrajectoryStore.create(tmp_path / "set.zarr")
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def log_rename(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    key = store.commit(trajectory())
    commit = events.index(("rename", str(store.path / key)))
    (partial,) = {Path(p).relative_to(store.path).parts[0] for kind, p in events[:commit] if kind == "sync"}
    synced = [path for kind, path in events[:commit] if kind == "sync"]
    written = [path.relative_to(store.path / key) for path in (store.path / key).rglob("*")]
    assert set(synced) == {str(store.path / partial / path) for path in (Path(), *written)}
    for path in synced:  # a folder is synced after what it names
        inside = [other for other in synced if other.startswith(path + "/")]
        assert all(synced.index(other) < synced.index(path) for other in inside)
    assert events[commit + 1 :] == [("sync", str(store.path))]


def test_the_second_recorder_is_told_who_the_first_is(
    root: Path, undisturbed: str, recorder: subprocess.Popen[str], tmp_path: Path
) -> None:
    path = tmp_path / "shared.zarr"
    pid = start(recorder, path)
    wait_for(lambda: committed(path))
    os.kill(pid, signal.SIGSTOP)
    store = TrajectoryStore.open(path)
    with pytest.raises(locks.Locked, match=f"process {pid}"), store.writer_lock():
        pass
    os.kill(pid, signal.SIGCONT)
    assert status(recorder) == 0
    with store.writer_lock():
        assert tree_digest(path) == undisturbed


def test_two_writers_of_one_trajectory_make_one(tmp_path: Path) -> None:
    """Ray may run a call twice at once; whoever renames first wins, the other's work is dropped."""
    path = tmp_path / "set.zarr"
    TrajectoryStore.create(path)
    script = (
        "import sys, time; from lesa.recording.store import TrajectoryStore; import zarr\n"
        "from tests.lesa.recording.test_store import trajectory\n"
        "items = [trajectory(seed) for seed in range(20)]; store = TrajectoryStore.open(sys.argv[1])\n"
        "print('ready', flush=True); sys.stdin.readline(); [store.commit(item) for item in items]"
    )
    writers = [python("-c", script, str(path), stdin=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    outputs = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], outputs
    single = TrajectoryStore.create(tmp_path / "single.zarr")
    for seed in range(20):
        single.commit(trajectory(seed))
    assert tree_digest(path) == tree_digest(single.path)


DISK = """
import sys, errno, os
from pathlib import Path
from lesa import atomic
from lesa.recording.store import TrajectoryStore
from tests.helpers.digests import tree_digest
from tests.lesa.recording.test_store import trajectory
disk, free, elsewhere = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
store = TrajectoryStore.create(disk / "set.zarr")
first = store.commit(trajectory(0))
space = os.statvfs(disk)
ballast = disk / "ballast"
ballast.write_bytes(b"x" * max(0, space.f_bavail * space.f_frsize - free))
try:
    store.commit(trajectory(1))
    print("fits")
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    assert "set.zarr" in str(error) and "needs" in str(error), error
    print("full")
    assert store.keys() == [first] and store.verify() == []
    assert sorted(os.listdir(store.path)) == sorted([first, "zarr.json"]), os.listdir(store.path)
    try:
        atomic.write_bytes(disk / "large", b"x" * (1 << 20))
        raise AssertionError("wrote a mebibyte to a full disk")
    except OSError as error:
        assert error.errno == errno.ENOSPC and "large" in str(error), error
    assert not list(disk.glob("large*"))
ballast.unlink()
store.commit(trajectory(1))
print(tree_digest(store.path))
"""


def test_a_full_disk_surfaces_and_leaves_nothing_committed(tmp_path: Path) -> None:
    """A real small disk, at several amounts of space left: each write of a commit meets its end once."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "fill.py").write_text(DISK)
    mount = f'mount -t tmpfs -o size=256k none "{disk}" && exec "$0" "$@"'
    expected = TrajectoryStore.create(tmp_path / "expected.zarr")
    for seed in (0, 1):
        expected.commit(trajectory(seed))
    seen = set()
    for pages in (0, 1, 2, 3, 4, 8, 16):
        command = [sys.executable, str(tmp_path / "fill.py"), str(disk), str(pages * 4096), str(tmp_path)]
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, *command], env=ENVIRONMENT, capture_output=True, text=True
        )
        if "unshare" in done.stderr or "mount" in done.stderr:
            pytest.skip(f"no private mounts here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        outcome, digest = done.stdout.split()
        seen.add(outcome)
        assert digest == tree_digest(expected.path)
    assert seen == {"full", "fits"}


def test_a_store_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "set.zarr")
    shutil.rmtree(store.path)  # vanished under us
    with pytest.raises(OSError) as caught:
        store.commit(trajectory())
    assert caught.value.errno == errno.ENOENT and "set.zarr" in str(caught.value)
    assert not store.path.exists()


# With real Ray.

DRIVER = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
os.chdir(sys.argv[1])
from flows.record import record_with_ray
from lesa.params_file import load_params
print(record_with_ray(load_params(), logging.getLogger("drive")))
"""


def marked_processes(mark: str) -> dict[int, str]:
    """Processes of this machine that inherited our mark, and their names."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def drive(root: Path, mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root)],
        env={**ENVIRONMENT, "LESA_TEST_MARK": mark},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def recorders(mark: str) -> list[int]:
    return [pid for pid, name in marked_processes(mark).items() if "ray::Recorder" in name]


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_killed_flow_a_killed_actor_and_a_hung_one(root: Path, undisturbed: str, tmp_path: Path) -> None:
    """First the driver dies, with a worker that cannot notice it; then the rerun loses two actors."""
    repository, mark = tmp_path / "repository", f"{os.getpid()}-{tmp_path.name}"
    shutil.copytree(root, repository, ignore=shutil.ignore_patterns("*.zarr", "*.lock"))
    store = repository / STORE
    process = drive(repository, mark)
    try:
        wait_for(lambda: committed(store))
        for pid in recorders(mark):
            os.kill(pid, signal.SIGSTOP)
    finally:
        process.kill()
        process.communicate()
    before = committed(store)
    assert 1 <= len(before) <= 3
    deadline = time.monotonic() + 30
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == {}

    inodes = {key: (store / key / "zarr.json").stat().st_ino for key in before}
    process = drive(repository, mark)
    try:
        wait_for(lambda: len(committed(store)) > len(before))
        for pid in recorders(mark):
            os.kill(pid, signal.SIGKILL)
        some = len(committed(store))
        wait_for(lambda: len(committed(store)) > some)
        for pid in recorders(mark):
            os.kill(pid, signal.SIGSTOP)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    assert f"6 trajectories planned, {6 - len(before)} to record" in output
    assert "no answer in time" in output
    assert {key: (store / key / "zarr.json").stat().st_ino for key in before} == inodes
    assert tree_digest(store) == undisturbed
    assert marked_processes(mark) == {} and MARK not in os.environ
