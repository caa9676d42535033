"""What stands in the way of `dvc repro` before it starts: each in one line with the remedy, before hours of work."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flows.environment import ROOT
from flows.tracking.client import tracking_uri
from lesa.errors import LesaError
from lesa.locks import process_alive

WRITTEN = ("data", "data/bundles", "data/metrics", "data/reports", "data/checkpoints", "data/trajectories")


def check_repository(root: Path = ROOT) -> None:
    """Refuse what a stage or DVC would only meet later; nothing is changed.

    Raises:
        LesaError: every problem with its remedy.
    """
    problems = [*_lock_problems(root), *_registry_problems(root), *_folder_problems(root)]
    if problems:
        raise LesaError("; ".join(problems))


def _lock_problems(root: Path) -> list[str]:
    """DVC's table of who reads and writes what: one that is torn, or names a number that another process has now."""
    path = root / ".dvc/tmp/rwlock"
    try:
        written, text = path.stat().st_mtime, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        return [f"{path} cannot be read ({error}): delete it if no dvc is at work here"]
    try:
        holders = _holders(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return [f"{path} is not what DVC writes (was one killed?): delete it if no dvc is at work here"]
    return [
        f"{path} names process {pid} ({command}), whose number another process has now: delete that file if no dvc is "
        "at work here"
        for pid, command in sorted(holders.items())
        if _exists(pid) and not _is_dvc(pid, written)
    ]


def _holders(table: Any) -> dict[int, str]:
    """Process -> its command, of everybody in the table."""
    entries = [entry for entry in table.get("write", {}).values() if entry]
    entries += [entry for several in table.get("read", {}).values() for entry in several]
    return {int(entry["pid"]): str(entry["cmd"])[:80] for entry in entries}


def _exists(pid: int) -> bool:
    """Whether DVC would wait for it: it asks for the number alone."""
    return Path(f"/proc/{pid}").exists() or process_alive(pid)


def _is_dvc(pid: int, since: float) -> bool:
    """Whether the process with this number is a dvc that ran when the table was written."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # no /proc: believed
        return process_alive(pid, since=since)
    return b"dvc" in command and process_alive(pid, since=since)


def _registry_problems(root: Path) -> list[str]:
    """The local registry, which the last stage writes to; one that is elsewhere is not asked here."""
    address = tracking_uri(root)
    database = Path(address.removeprefix("sqlite:///"))
    if not address.startswith("sqlite:///") or not database.exists():
        return []
    if not os.access(database, os.R_OK | os.W_OK):
        return [f"{database}: this user may not read and write the registry's database: have its owner or mode changed"]
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
            connection.execute("select name from sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        return [
            f"{database}: the registry's database cannot be read ({error}): bring a copy back, or move it away and "
            "register again: dvc repro --force --single-item publish"
        ]
    return []


def _folder_problems(root: Path) -> list[str]:
    return [
        f"{folder}: this user may not write there: have its owner or mode changed"
        for folder in (root / name for name in WRITTEN)
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK)
    ]
