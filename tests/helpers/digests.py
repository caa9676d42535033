"""One digest for all that lies in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lesa.atomic import regular_files, sha256_file


def tree_digest(folder: str | Path) -> str:
    """One SHA-256 for a folder: relative paths and contents, nothing of times, owners or order on disk.

    Links and special files raise OSError.
    """
    digest = hashlib.sha256()
    for relative in regular_files(Path(folder)):
        digest.update(f"{relative}\0{sha256_file(Path(folder) / relative)}\n".encode())
    return digest.hexdigest()
