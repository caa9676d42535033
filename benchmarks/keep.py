"""A study's result as it is kept: the document as JSON, its table as Markdown beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesa.atomic import write_bytes, write_json


def keep(path: Path, document: Mapping[str, Any], table: str) -> None:
    """Write `path` and the same name ending in `.md`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), dict(document), sort_keys=False)
    write_bytes(path.with_suffix(".md"), table.encode())
