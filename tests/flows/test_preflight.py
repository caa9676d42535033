"""What stands in the way of `dvc repro`: said in a line, with the remedy, before anything starts."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.preflight import check_repository
from flows.repro import dvc_repro
from lesa.errors import LesaError


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process that is not ours and no dvc."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def lock(root: Path, content: object) -> Path:
    path = root / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def held_by(pid: int) -> dict[str, object]:
    holder = {"pid": pid, "cmd": "python -m dvc repro"}
    return {"write": {"/x/data/base": holder}, "read": {"/x/flows/base.py": [holder]}}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"write": {"x": {"pid": "many"}}}', '{"read": {"x": [1]}}'])
def test_a_torn_lock_is_named_with_the_remedy(tmp_path, content):
    path = lock(tmp_path, content)
    with pytest.raises(LesaError) as caught:
        check_repository(tmp_path)
    assert f"{path} is not what DVC writes" in str(caught.value) and "delete it if no dvc" in str(caught.value)
    assert path.read_text() == content


def test_a_lock_that_names_a_stranger_is_told_from_one_that_a_dvc_holds(tmp_path, stranger):
    path = lock(tmp_path, held_by(stranger))
    with pytest.raises(LesaError, match=f"names process {stranger} .python -m dvc repro., whose number another"):
        check_repository(tmp_path)
    code = "import time; print('on', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, "dvc", "repro"], stdout=subprocess.PIPE) as dvc:
        try:
            assert dvc.stdout is not None and dvc.stdout.readline() == b"on\n"
            path = lock(tmp_path, held_by(dvc.pid))
            check_repository(tmp_path)  # DVC itself says whom it waits for
            before = time.time() - 3600
            os.utime(path, (before, before))  # the number was another's when the table was written
            with pytest.raises(LesaError, match=f"names process {dvc.pid}"):
                check_repository(tmp_path)
        finally:
            dvc.kill()
    lock(tmp_path, held_by(dvc.pid))  # a holder that is gone: DVC removes it itself
    check_repository(tmp_path)
    lock(tmp_path, {})
    check_repository(tmp_path)


def test_a_registry_that_cannot_be_read_is_named_before_hours_of_work(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(LesaError, match="mlflow.db: the registry's database cannot be read .file is not a database"):
        check_repository(tmp_path)
    database.unlink()
    sqlite3.connect(database).close()
    check_repository(tmp_path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != database and access(path, mode))
    with pytest.raises(LesaError, match="mlflow.db: this user may not read and write"):
        check_repository(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    check_repository(tmp_path)


def test_a_folder_without_permission_is_named_and_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    bundles = tmp_path / "data/bundles"
    bundles.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != bundles and access(path, mode))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(LesaError, match="data/bundles: this user may not write there: have its owner or mode changed"):
        dvc_repro("dvc.yaml", root=tmp_path)
