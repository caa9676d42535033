"""Durable writing: aside, synced, then committed by one rename; and the digests that go with it.

Whatever ends in `.partial` is unfinished and belongs to nobody once the process in its name is gone.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from lesa.locks import process_alive

PARTIAL = ".partial"
_NO_RIGHT = "this user may not write there: have the folder's owner or mode changed, or write elsewhere"
_NO_SPACE = "make room and run again: what is committed stays"
_REMEDIES = {
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: _NO_RIGHT,
    errno.EROFS: "the file system is mounted read-only: mount it writable, or write elsewhere",
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
}
_COUNTER = itertools.count()  # two threads of one process must not share a temporary name
_BLOCK = 1 << 20  # bytes read at a time when hashing


def write_bytes(path: str | Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write `data` so that `path` holds its old content or all of the new one, also after a power cut.

    Args:
        mode: of the file, less the umask; 0o600 for a secret.
    """
    path = Path(path)
    with explained(path, len(data)):
        _write_aside(path, data, mode)
        fsync_dir(path.parent)


def _write_aside(path: Path, data: bytes, mode: int) -> None:
    aside = path.with_name(partial_name(path.name))
    try:
        # O_EXCL and O_NOFOLLOW: a link planted under the temporary name is an error, not a way out.
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def explained(path: str | Path, num_bytes: int | None = None) -> Iterator[None]:
    """What the disk refuses the block, as the same kind of OSError with a path and a remedy.

    Args:
        path: what is written; named where the error names no file.
        num_bytes: how much of it.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        is_explained = error.filename is not None and remedy in str(error.strerror)
        if error.errno is None or is_explained:
            raise
        size = f" while writing {num_bytes} bytes" if error.filename is None and num_bytes is not None else ""
        said = f"{error.strerror}{size}" + (f"; {remedy}" if remedy else "")
        raise OSError(error.errno, said, error.filename or str(path)) from error


def write_json(path: str | Path, value: object, *, sort_keys: bool = True, mode: int = 0o666) -> None:
    """Write `value` as indented JSON with sorted keys; NaN and infinities are refused (ValueError)."""
    write_bytes(path, json_bytes(value, sort_keys=sort_keys), mode=mode)


def json_bytes(value: object, *, sort_keys: bool = True) -> bytes:
    """`value` as indented JSON, UTF-8, with a final newline; NaN and infinities are refused (ValueError)."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def canonical_json(value: object) -> bytes:
    """The one spelling of `value` that digests are taken of: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a regular file in hexadecimal; links and devices are refused (OSError)."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes; a link, FIFO, device or folder raises OSError naming it."""
    # O_NONBLOCK: opening a FIFO must not wait for a writer that never comes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def regular_files(folder: str | Path, prefix: str = "") -> list[str]:
    """Relative paths of all files under `folder`, sorted; OSError for a link, FIFO or device among them."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                files += regular_files(entry.path, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                files.append(name)
            else:
                raise OSError(errno.EINVAL, "neither a regular file nor a folder", entry.path)
    return sorted(files)


def _raise(error: OSError) -> NoReturn:
    raise error


def fsync_dir(folder: str | Path) -> None:
    """Make the names in `folder` durable (renames and new files)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dirs(folder: str | Path) -> None:
    """Make a folder and those above it that are missing, their names durable; nothing to do for one that is there."""
    folder = Path(folder).absolute()
    with explained(folder):
        missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)  # another process may make it at the same time
            fsync_dir(path.parent)


def fsync_tree(folder: str | Path) -> None:
    """Make everything under `folder` durable: files first, then the folders that name them, deepest first."""
    for root, _, files in os.walk(folder, topdown=False, onerror=_raise):
        for name in files:
            with open_regular(Path(root) / name) as file:
                os.fsync(file.fileno())
        fsync_dir(root)


@contextmanager
def new_dir(final: str | Path, *, replace: bool) -> Iterator[Path]:
    """An empty folder beside `final` to be filled by the block; then it is synced and renamed to `final`.

    The folder is removed where the block or the commit raises; a block that raises leaves `final` as it was.

    Args:
        replace: True puts it in the place of a `final` that is there; False drops it then: the first to commit wins.
    """
    final = Path(final)
    partial = final.with_name(partial_name(final.name))
    with explained(final):
        partial.mkdir()
        try:
            yield partial
            if replace:
                replace_dir(partial, final)
            else:
                _commit_first(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _commit_first(partial: Path, final: Path) -> None:
    """Sync `partial` and rename it to `final`; `partial` is removed if `final` is there already."""
    fsync_tree(partial)
    try:
        os.rename(partial, final)  # fails on a folder with content
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(partial)
    else:
        fsync_dir(final.parent)


def replace_dir(partial: str | Path, final: str | Path) -> None:
    """Sync `partial` and put it in the place of `final`, which may exist.

    A kill between the two renames leaves no `final`, never a mixed one: rerun what made it.
    """
    partial, final = Path(partial), Path(final)
    fsync_tree(partial)
    if final.is_dir() and not final.is_symlink():
        remove_dir(final, before_delete=lambda: os.rename(partial, final))
    else:
        os.rename(partial, final)
    fsync_dir(final.parent)


def remove_dir(folder: str | Path, before_delete: Callable[[], object] | None = None) -> None:
    """Remove a folder as one act: renamed to a `.partial` name first, so that no half of it is ever seen."""
    folder = Path(folder)
    aside = folder.with_name(partial_name(folder.name))
    os.rename(folder, aside)
    if before_delete is not None:
        before_delete()
    fsync_dir(folder.parent)
    shutil.rmtree(aside)


def partial_name(name: str) -> str:
    """`<name>.<pid>.<n>.partial`: where this process builds `name` before committing it."""
    return f"{name}.{os.getpid()}.{next(_COUNTER)}{PARTIAL}"


def sweep_partials(folder: str | Path) -> list[str]:
    """Delete unfinished files and folders of dead processes directly under `folder`; their names, sorted."""
    swept = []
    for entry in sorted(os.scandir(folder), key=lambda item: item.name):
        parts = entry.name.split(".")
        if not entry.name.endswith(PARTIAL) or len(parts) < 4 or not parts[-3].isdigit():
            continue
        if process_alive(int(parts[-3]), since=entry.stat(follow_symlinks=False).st_mtime):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
        swept.append(entry.name)
    return swept


def require_space(path: str | Path, num_bytes: int) -> None:
    """OSError (ENOSPC) naming need and free space if the disk under `path` cannot hold `num_bytes` more."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        message = f"needs {format_bytes(num_bytes)} and {format_bytes(free)} are free"
        raise OSError(errno.ENOSPC, message, str(path))


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` for a person, in binary units."""
    value = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
