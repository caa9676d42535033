"""Durable writing, digests, locks: with real files, links, FIFOs and processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lesa import atomic, locks


def test_write_bytes_replaces_whole_files_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    atomic.write_bytes(target, b"one")
    atomic.write_bytes(target, b"two, longer")
    assert target.read_bytes() == b"two, longer"
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_write_bytes_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic.write_bytes(tmp_path / "value", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "value").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    atomic.write_json(target, {"a": 1})
    with pytest.raises(ValueError):
        atomic.write_json(target, {"a": float("nan")})
    with pytest.raises(TypeError):
        atomic.write_json(target, {"a": object()})
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert len(list(tmp_path.iterdir())) == 1


def test_json_is_written_with_sorted_keys(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a", {"b": 1, "a": {"d": 2, "c": "ü"}})
    atomic.write_json(tmp_path / "b", {"a": {"c": "ü", "d": 2}, "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert atomic.canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'.encode()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path, real = tmp_path / "thing", tmp_path / "real"
    real.write_bytes(b"secret")
    if kind == "link":
        path.symlink_to(real)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(OSError) as caught:  # and at once: a FIFO without a writer must not hang
        atomic.sha256_file(path)
    assert caught.value.filename == str(path) or "thing" in str(caught.value)


def test_tree_digest_sees_names_and_contents_but_not_times(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_bytes(b"content")
        (tmp_path / name / "top").write_bytes(b"more")
    os.utime(tmp_path / "b" / "top", (1, 1))
    digest = atomic.tree_digest(tmp_path / "a")
    assert atomic.tree_digest(tmp_path / "b") == digest
    (tmp_path / "b" / "top").write_bytes(b"morE")
    assert atomic.tree_digest(tmp_path / "b") != digest
    (tmp_path / "b" / "top").rename(tmp_path / "b" / "other")
    (tmp_path / "b" / "other").write_bytes(b"more")
    assert atomic.tree_digest(tmp_path / "b") != digest
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    with pytest.raises(OSError, match="neither a regular file"):
        atomic.tree_digest(tmp_path / "a")


def test_the_first_commit_of_a_folder_wins(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "value").write_text(name)
    assert atomic.commit_dir(tmp_path / "one", tmp_path / "final") is True
    assert atomic.commit_dir(tmp_path / "two", tmp_path / "final") is False
    assert (tmp_path / "final" / "value").read_text() == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


def test_replace_dir_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for name in ("final", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    atomic.replace_dir(tmp_path / "new", tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_partials_of_dead_processes_are_swept_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    mine = tmp_path / atomic.partial_name("key")
    mine.mkdir()
    (tmp_path / f"key.{dead.pid}.0.partial").mkdir()
    (tmp_path / f"key.{dead.pid}.0.partial" / "half").write_text("x")
    (tmp_path / f"file.json.{dead.pid}.3.partial").write_text("x")
    (tmp_path / "mine.partial").write_text("not ours: no process in its name")
    swept = atomic.sweep_partials(tmp_path)
    assert swept == [f"file.json.{dead.pid}.3.partial", f"key.{dead.pid}.0.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, "mine.partial"])


def test_a_number_given_to_a_later_process_counts_as_dead(tmp_path: Path) -> None:
    assert locks.process_alive(os.getpid())
    assert locks.process_alive(os.getpid(), since=time.time())
    assert not locks.process_alive(os.getpid(), since=time.time() - 10 * 365 * 86400)
    zombie = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert not locks.process_alive(zombie.pid)
    zombie.wait()


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "store.lock"
    script = (
        "import sys, time; from lesa.atomic import file_lock\n"
        "with file_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(locks.Locked, match=f"process {holder.pid}") as caught, locks.file_lock(lock):
            pass
        assert caught.value.pid == holder.pid
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert lock.exists()  # what it left behind
        with locks.file_lock(lock):
            assert int(lock.read_text()) == os.getpid()
        assert not lock.exists()
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


def test_a_lock_lets_one_thread_in_at_a_time(tmp_path: Path) -> None:
    inside, most, entered = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, entered
        while True:
            try:
                with locks.file_lock(tmp_path / "lock"):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.002)
                    inside -= 1
                    entered += 1
                    return
            except locks.Locked:
                time.sleep(0.001)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 16)


def test_require_space_names_need_and_free(tmp_path: Path) -> None:
    atomic.require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(OSError, match=r"needs 1024.0 TiB and .* are free") as caught:
        atomic.require_space(tmp_path / "new.zarr", 2**50)
    assert caught.value.errno == errno.ENOSPC
    assert "new.zarr" in str(caught.value)
