"""What a power cut may leave of a folder: a model of a disk that keeps what was synced and owes nothing else.

Under `Disk.watching`, every act of `os` that makes something durable or gives it a name is a moment at which the power
may go. At each, two disks are kept, which bound what file systems do: one has lost everything that was not synced,
names and contents; one has every name at once and the contents of no file that was not synced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

_ACTS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")
Image = dict[str, bytes | None]  # relative path -> a file's bytes; None: a folder


class Disk:
    """The folder `root`, all of it synced at first, and what every power cut since would have left."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: dict[int, int] = {}  # inode -> a descriptor, so that its number is not given to another file
        self._contents: dict[int, bytes] = {}  # of files, when they were synced
        self._names: dict[int, dict[str, int]] = {}  # of folders: name -> inode, likewise
        self._folders: set[int] = set()
        self.images: list[Image] = []
        for folder, _, files in os.walk(root):
            self._sync(Path(folder))
            for name in files:
                self._sync(Path(folder) / name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the block: `images` has what a cut before or after each act leaves; the last two are of its end."""
        with mock.patch.multiple(os, **{name: self._watched(getattr(os, name), name) for name in _ACTS}):
            yield
        self.images += self._cuts()

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)

    def _watched(self, act: Any, name: str) -> Any:
        def watched(*arguments: Any, **options: Any) -> Any:
            self._cut()
            done = act(*arguments, **options)
            if name == "fsync":
                self._sync(Path(os.readlink(f"/proc/self/fd/{arguments[0]}")))
            self._cut()
            return done

        return watched

    def _sync(self, path: Path) -> None:
        if not path.is_relative_to(self._root):
            return
        inode = self._hold(path)
        if path.is_dir():
            self._names[inode] = {entry.name: self._hold(Path(entry.path)) for entry in os.scandir(path)}
        else:
            self._contents[inode] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        found = path.lstat()
        if found.st_ino not in self._held:
            self._held[found.st_ino] = os.open(path, os.O_RDONLY)
            if stat.S_ISDIR(found.st_mode):
                self._folders.add(found.st_ino)
        return found.st_ino

    def _cut(self) -> None:
        self.images += [image for image in self._cuts() if image not in self.images[-2:]]

    def _cuts(self) -> list[Image]:
        return [self._synced(self._root.stat().st_ino, ""), self._named(self._root, "")]

    def _synced(self, folder: int, prefix: str) -> Image:
        image: Image = {}
        for name, inode in self._names.get(folder, {}).items():
            if inode in self._folders:
                image |= {prefix + name: None, **self._synced(inode, f"{prefix}{name}/")}
            else:
                image[prefix + name] = self._contents.get(inode, b"")
        return image

    def _named(self, folder: Path, prefix: str) -> Image:
        image: Image = {}
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            inode = self._hold(Path(entry.path))
            if inode in self._folders:
                image |= {prefix + entry.name: None, **self._named(Path(entry.path), f"{prefix}{entry.name}/")}
            else:
                image[prefix + entry.name] = self._contents.get(inode, b"")
        return image


def restored(image: Image, folder: Path) -> Path:
    """The folder that the machine finds when it is switched on again."""
    folder.mkdir(parents=True)
    for name, content in image.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder
