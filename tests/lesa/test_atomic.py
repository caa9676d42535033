"""Durable writing and digests: with real files, links, FIFOs and processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lesa import atomic
from tests.helpers.digests import tree_digest


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
    atomic.write_json(tmp_path / "secret", {"auth": "x"}, mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


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
    digest = tree_digest(tmp_path / "a")
    assert tree_digest(tmp_path / "b") == digest
    (tmp_path / "b" / "top").write_bytes(b"morE")
    assert tree_digest(tmp_path / "b") != digest
    (tmp_path / "b" / "top").rename(tmp_path / "b" / "other")
    (tmp_path / "b" / "other").write_bytes(b"more")
    assert tree_digest(tmp_path / "b") != digest
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    with pytest.raises(OSError, match="neither a regular file"):
        tree_digest(tmp_path / "a")


@pytest.mark.parametrize(("replace", "kept"), [(False, "one"), (True, "two")])
def test_a_new_folder_yields_to_what_is_there_or_takes_its_place(tmp_path: Path, replace: bool, kept: str) -> None:
    for name in ("one", "two"):
        with atomic.new_dir(tmp_path / "final", replace=replace) as partial:
            (partial / name).write_text(name)
            assert atomic.sweep_partials(tmp_path) == [], "its process is alive"
    assert [path.name for path in (tmp_path / "final").iterdir()] == [kept]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_new_folder_that_fails_leaves_nothing(tmp_path: Path, replace: bool, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic.new_dir(tmp_path / "final", replace=replace) as partial:
        (partial / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("x")
    with pytest.raises(type(error)), atomic.new_dir(tmp_path / "final", replace=replace) as partial:
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "old"]


def test_a_new_folder_with_a_link_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError), atomic.new_dir(tmp_path / "final", replace=True) as partial:
        (partial / "link").symlink_to("/etc/hostname")
    assert list(tmp_path.iterdir()) == []


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


def test_require_space_names_need_and_free(tmp_path: Path) -> None:
    atomic.require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(OSError, match=r"needs 1024.0 TiB and .* are free") as caught:
        atomic.require_space(tmp_path / "new.zarr", 2**50)
    assert caught.value.errno == errno.ENOSPC
    assert "new.zarr" in str(caught.value)
