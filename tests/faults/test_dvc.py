"""DVC around the recording: killed in the middle, its lock file or its cache damaged, the store damaged under it.

The stage is the repository's own but for its command, which records in one process instead of with Prefect and Ray.
What DVC hashes, keeps and checks out is real.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lesa.atomic import sha256_file
from lesa.recording.pruned import PrunedTrajectories
from lesa.recording.store import TrajectoryStore
from lesa.recording.store_format import StoreError
from tests.faults import sweep
from tests.faults.recording_server import ASK
from tests.helpers.clone import ROOT, clone, commit, environment
from tests.helpers.digests import tree_digest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STORE = "data/trajectories/tiny.zarr"
SHARD = "features/c.0.0.0.0"


@pytest.fixture(scope="module", autouse=True)
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the stage asks to record."""
    path = tmp_path_factory.mktemp("recorder") / "socket"
    command = [sys.executable, "-m", "tests.faults.recording_server", str(path)]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LESA_TEST_RECORDER", str(path))
            patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
            yield
        process.kill()


def dvc(repository: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a DVC command, in this process: importing it takes longer than all that it does."""
    from dvc.cli import main

    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("dvc").addHandler(handler)
    try:
        with contextlib.chdir(repository), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([*arguments])
    finally:
        logging.getLogger("dvc").removeHandler(handler)
    return code, said.getvalue()


def reproduce(repository: Path, *options: str) -> dict[str, Any]:
    """Run the stage; what the recording returned."""
    (repository / "said.txt").unlink(missing_ok=True)
    code, output = dvc(repository, "repro", *options, "record")
    assert code == 0, output
    done: dict[str, Any] = json.loads((repository / "said.txt").read_text().splitlines()[-1])
    return done


def store_of(repository: Path) -> TrajectoryStore:
    return TrajectoryStore.open(repository / STORE)


def locked(repository: Path) -> dict[str, Any]:
    """The outputs of the stage as DVC's lock file has them, by path."""
    document = yaml.safe_load((repository / "dvc.lock").read_text())
    return {out["path"]: out for out in document["stages"]["record"]["outs"]}


def flip(path: Path) -> None:
    """One byte, by whoever may write there: DVC takes the right to write from what it caches."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def set_train_prompts(repository: Path, count: int) -> None:
    settings = yaml.safe_load((repository / "params.yaml").read_text())
    settings["workloads"]["tiny"]["record"]["train_prompts"] = count
    (repository / "params.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the stage `record` that nothing was run in."""
    folder = clone(tmp_path_factory.mktemp("fresh") / "repository")
    document = yaml.safe_load((folder / "dvc.yaml").read_text())
    stage = {**document["stages"]["record"], "cmd": "python ask.py > said.txt"}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"vars": document["vars"], "stages": {"record": stage}}))
    (folder / "ask.py").write_text(ASK)
    commit(folder, "One stage")
    return folder


@pytest.fixture(scope="module")
def recorded(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, once the stage has run."""
    folder = shutil.copytree(fresh, tmp_path_factory.mktemp("recorded") / "repository", symlinks=True)
    assert reproduce(folder)["recorded"] == 6
    return folder


@pytest.fixture
def repository(recorded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(recorded, tmp_path / "repository", symlinks=True)


def test_killed_in_the_middle_it_goes_on(fresh: Path, recorded: Path, tmp_path: Path) -> None:
    repository = shutil.copytree(fresh, tmp_path / "repository", symlinks=True)
    (repository / "stop-at").write_text("3")
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "record"], cwd=repository, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    committed: list[str] = []
    while len(committed) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):
            committed = [name for name in os.listdir(repository / STORE) if len(name) == 32]
    os.killpg(process.pid, signal.SIGKILL)
    os.kill(int((repository / "said.txt").read_text().split()[1]), signal.SIGKILL)
    process.communicate()
    (repository / "stop-at").unlink()
    store = store_of(repository)
    before = store.keys()
    assert store.verify() == [] and not (repository / "dvc.lock").exists()
    assert len(before) == 2
    inodes = {key: (store.path / key / SHARD).stat().st_ino for key in before}
    done = reproduce(repository)
    assert (done["recorded"], done["repaired"]) == (4, 0)
    assert {key: (store.path / key / SHARD).stat().st_ino for key in before} == inodes, "DVC left them where they were"
    assert tree_digest(store.path) == tree_digest(recorded / STORE)
    assert locked(repository) == locked(recorded)


def test_killed_at_any_moment_it_goes_on(
    fresh: Path, recorded: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Kills of DVC and its stage from outside, over all of `dvc repro`: before, in and after the recording."""
    killed, started = 0, time.monotonic()
    timed = shutil.copytree(fresh, tmp_path / "timed", symlinks=True)
    assert begun(timed, "record").wait() == 0
    whole = time.monotonic() - started
    for number, moment in enumerate(sweep.moments(whole, sweep.kills(1), seed=3)):
        repository = shutil.copytree(fresh, tmp_path / str(number), symlinks=True)
        killed += killed_after(begun(repository, "record"), moment)
        with contextlib.suppress(FileNotFoundError, IndexError, ProcessLookupError):
            os.kill(int((repository / "said.txt").read_text().split()[1]), signal.SIGKILL)
        code, output = dvc(repository, "repro", "record")
        assert code == 0, (moment, output)
        assert store_of(repository).keys() == store_of(recorded).keys(), moment
        assert tree_digest(repository / STORE) == tree_digest(recorded / STORE), moment
        assert locked(repository) == locked(recorded), moment
    record_property("kills", killed)
    assert killed >= sweep.kills(1) // 2, "the sweep did hit DVC in the middle"


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_whole_pipeline_killed_at_any_moment_goes_on(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The stages' own commands, with Prefect and Ray, as `dvc.yaml` has them."""
    fresh = clone(tmp_path / "fresh")
    undisturbed = shutil.copytree(fresh, tmp_path / "undisturbed", symlinks=True)
    started = time.monotonic()
    whole_run(undisturbed)
    whole = time.monotonic() - started
    expected = result_of(undisturbed)
    killed = 0
    for number, moment in enumerate(sweep.moments(whole, sweep.kills(1), seed=5)):
        repository = shutil.copytree(fresh, tmp_path / str(number), symlinks=True)
        process = begun(repository, env=environment())
        killed += killed_after(process, moment)
        whole_run(repository)
        assert result_of(repository) == expected, moment
    record_property("kills", killed)
    assert killed >= sweep.kills(1) // 2, "the sweep did hit DVC in the middle"


def begun(repository: Path, *targets: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """`dvc repro` as a process group of its own."""
    with (repository.parent / f"{repository.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", *targets],
            cwd=repository, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def killed_after(process: subprocess.Popen[bytes], moment: float) -> bool:
    """SIGKILL of the whole group after so many seconds; False where it had ended before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
        return False
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def whole_run(repository: Path) -> None:
    process = begun(repository, env=environment())
    assert process.wait() == 0, (repository.parent / f"{repository.name}.log").read_text()[-4000:]


def result_of(repository: Path) -> dict[str, Any]:
    """What a run is to end with. Reports hold seconds, and what is published names reports: no bytes of these."""
    document = yaml.safe_load((repository / "dvc.lock").read_text())
    timed = {"data/reports/tiny", "data/bundles/tiny", "data/metrics/tiny/decision.json"}
    weights = sorted((repository / "data").glob("checkpoints/tiny/*/*.safetensors"))
    assert len(weights) >= 2
    return {
        "store": tree_digest(repository / STORE),
        "keys": store_of(repository).keys(),
        "weights": {str(path.relative_to(repository)): sha256_file(path) for path in weights},
        "published": sha256_file(repository / "data/bundles/tiny/weights.safetensors"),
        "lock": {
            name: {
                kind: [entry if entry["path"] not in timed else entry["path"] for entry in stage.get(kind, [])]
                for kind in ("deps", "outs")
            }
            for name, stage in document["stages"].items()
        },
    }


def test_a_damaged_trajectory_does_not_get_into_the_lock_file(repository: Path) -> None:
    good, before = locked(repository), tree_digest(repository / STORE)
    store = store_of(repository)
    flip(store.path / store.keys()[0] / SHARD)
    done = reproduce(repository)
    assert (done["recorded"], done["repaired"]) == (1, 1)
    assert locked(repository) == good and tree_digest(store.path) == before
    code, status = dvc(repository, "status", "record")
    assert code == 0 and "up to date" in status, status


def test_a_plan_that_shrinks_and_grows_again_costs_nothing(repository: Path) -> None:
    good, before = locked(repository), tree_digest(repository / STORE)
    set_train_prompts(repository, 2)
    assert reproduce(repository)["pruned"] == 2
    store = store_of(repository)
    assert len(store.keys()) == 4 and len(PrunedTrajectories(store).keys()) == 2
    assert locked(repository)[STORE]["md5"] != good[STORE]["md5"] and locked(repository)[STORE]["nfiles"] == 13
    set_train_prompts(repository, 4)
    done = reproduce(repository)
    assert (done["recorded"], done["restored"]) == (0, 2)
    assert locked(repository) == good and tree_digest(store.path) == before


@pytest.mark.parametrize("text", ["stages: [", "schema: '2.0'\nstages:\n  record: 7\n"])
def test_a_damaged_lock_file_is_reported_by_name_and_nothing_runs(repository: Path, text: str) -> None:
    lock, before = repository / "dvc.lock", tree_digest(repository / STORE)
    lock.write_text(text)
    (repository / "said.txt").unlink()
    code, output = dvc(repository, "repro", "record")
    assert code != 0 and "dvc.lock" in output and not (repository / "said.txt").exists(), output
    assert lock.read_text() == text and tree_digest(repository / STORE) == before


def test_a_lock_file_that_names_another_store_runs_the_stage_and_nothing_is_recorded(repository: Path) -> None:
    good, lock = locked(repository), repository / "dvc.lock"
    md5 = good[STORE]["md5"]
    lock.write_text(lock.read_text().replace(md5, f"{'0' * 32}.dir"))
    done = reproduce(repository)
    assert (done["recorded"], done["repaired"]) == (0, 0)
    assert locked(repository) == good


def test_a_damaged_object_of_the_cache_is_not_taken_for_a_trajectory(repository: Path) -> None:
    """DVC believes an object that nobody may write, and what it checks out of it; whoever reads the store does not."""
    good, before = locked(repository), tree_digest(repository / STORE)
    store = store_of(repository)
    key = store.keys()[0]
    shard = store.path / key / SHARD
    objects = [path for path in (repository / ".dvc/cache/files").rglob("*") if path.is_file()]
    (cached,) = [path for path in objects if path.read_bytes() == shard.read_bytes()]
    flip(cached)
    cached.chmod(0o444)
    shutil.rmtree(store.path / key)
    code, output = dvc(repository, "checkout", "record")
    if not shard.exists():  # a DVC that looks
        assert code != 0, output
    else:
        with pytest.raises(StoreError, match=key):
            store.features(key)
    assert reproduce(repository, "--force", "--single-item")["recorded"] == 1
    assert store.verify() == [] and tree_digest(store.path) == before
    assert locked(repository) == good
