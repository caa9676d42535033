"""Folders written beside their places and then put there, all or, of those not yet in place, none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from lesa.atomic import replace_dir


def save_folders(savers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Call each saver with a folder of its own, then replace what stands at the folders' names."""
    partials = {folder: folder.with_name(folder.name + ".partial") for folder in map(Path, savers)}
    for partial, save in zip(partials.values(), savers.values(), strict=True):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        save(partial)
    for folder, partial in partials.items():
        replace_dir(partial, folder)
