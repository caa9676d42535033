"""Locks between processes, and whether one is alive: with real files and processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lesa import locks


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
        "import sys, time; from lesa.locks import file_lock\n"
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


def test_who_waits_for_a_lock_gets_it_or_the_holders_name(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    with locks.file_lock(lock):
        start = time.monotonic()
        with pytest.raises(locks.Locked, match=str(os.getpid())), locks.file_lock(lock, timeout=0.3):
            pass
        assert time.monotonic() - start >= 0.3
        waiting = threading.Thread(target=lambda: locks.file_lock(lock, timeout=float("inf")).__enter__())
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_lock_that_nobody_waits_for_is_tried_once(tmp_path: Path) -> None:
    with locks.file_lock(tmp_path / "a.lock", timeout=0.0):
        pass
    assert not (tmp_path / "a.lock").exists()


def test_a_private_lock_is_its_users_alone(tmp_path: Path) -> None:
    with locks.file_lock(tmp_path / "a.lock", mode=0o600), locks.shared_lock(tmp_path / "b.lock"):
        os.close(locks.new_locked_file(tmp_path / "c.lock"))
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_shared_lock_is_free_when_the_last_holder_is_gone(tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    assert locks.is_free(lease, shared=True), "there is no such file yet"
    with locks.shared_lock(lease):
        with locks.shared_lock(lease):
            assert not locks.is_free(lease, shared=True)
        assert not locks.is_free(lease, shared=True)
    assert locks.is_free(lease, shared=True)


def test_a_new_locked_file_is_never_seen_free(tmp_path: Path) -> None:
    spool = tmp_path / "run.jsonl"
    descriptor = locks.new_locked_file(spool)
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]
    assert not os.get_inheritable(descriptor), "a child must not hold it any longer than its owner"
    assert not locks.is_free(spool)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        os.close(descriptor)
        deadline = time.monotonic() + 20  # the child drops its copy a moment after its start returned here
        while not locks.is_free(spool) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert locks.is_free(spool) and spool.exists()
    finally:
        child.kill()
        child.wait()


def test_asking_whether_a_lock_is_free_disturbs_nobody_who_asks_too(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    with locks.file_lock(lock):
        assert not locks.is_free(lock)
    lock.touch()
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.extend(locks.is_free(lock) for _ in range(50))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers) and len(answers) == 200
    with locks.file_lock(lock):
        pass


def test_a_process_that_ends_while_it_is_looked_at_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path) -> str:
        raise ProcessLookupError(3, "No such process", str(path))

    monkeypatch.setattr(Path, "read_text", gone)
    assert not locks.process_alive(os.getpid())


def test_the_holder_is_still_named_in_another_process(tmp_path: Path) -> None:
    error = locks.Locked(tmp_path / "a.lock", 4711)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made in the line above
    assert (type(again), str(again), again.path, again.pid) == (locks.Locked, str(error), error.path, 4711)
