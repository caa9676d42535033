"""Settings files of an older layout, rewritten: `lesa migrate params.yaml`.

Comments, order and flow style stay: ruamel.yaml changes the file, which keeps them, and only where a key has moved.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lesa import atomic
from lesa.errors import LesaError
from lesa.params_file import MOVED, load_params


def migrate_params(path: Path, *, write: bool = True) -> list[str]:
    """Move every key of `params.yaml` that stands where it stood in an older version.

    Args:
        path: the file.
        write: False only tells what would be done.

    Returns:
        A line for each key that was moved, by its dotted path.

    Raises:
        LesaError: the file cannot be read, or not by this version even after the moves; it is left as it was.
    """
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError
    except ImportError:
        raise LesaError("lesa migrate needs ruamel.yaml, which the pipeline's dependencies bring") from None
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.load(text)
    except FileNotFoundError:
        raise LesaError(f"{path} does not exist; name the params.yaml to rewrite") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise LesaError(f"{path}: not YAML that can be read: {' '.join(str(error).split())}") from None
    workloads = document.get("workloads") if isinstance(document, dict) else None
    if not isinstance(workloads, dict):
        raise LesaError(f"{path}: workloads must be a mapping of workloads")
    moves = []
    for name, section in workloads.items():
        for old, new in MOVED.items() if isinstance(section, dict) else ():
            if _take(section, old, new):
                moves.append(f"workloads.{name}.{old} -> workloads.{name}.{new}")
    if moves:
        buffer = io.StringIO()
        yaml.dump(document, buffer)
        _refuse_unreadable(path, buffer.getvalue())
        if write:
            atomic.write_bytes(path, buffer.getvalue().encode())
    return moves


def _take(section: Any, old: str, new: str) -> bool:
    """Move one key of a workload, if it is there; what stands at the new place already wins."""
    *parents, last = old.split(".")
    place = section
    for parent in parents:
        place = place.get(parent)
        if not isinstance(place, dict):
            return False
    if last not in place:
        return False
    value = place.pop(last)
    *parents, last = new.split(".")
    place = section
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            place[parent] = {}
        place = place[parent]
    place.setdefault(last, value)
    return True


def _refuse_unreadable(path: Path, text: str) -> None:
    """`ParamsError` where the rewritten file would not be read: what is wrong in it was wrong before."""
    aside = path.with_name(atomic.partial_name(path.name))
    try:
        atomic.write_bytes(aside, text.encode())
        load_params(aside)
    finally:
        aside.unlink(missing_ok=True)
