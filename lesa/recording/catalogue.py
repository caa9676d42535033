"""The catalogue of a store: keys and digests in one small file, which is what later stages depend on.

`record` writes it when the store is as its plan says. Whoever reads the store compares: one that has lost, gained or
changed a trajectory since is refused, so that nothing else is trained on unnoticed, and a run that has nothing to do
looks at one file instead of at every file of the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesa import atomic, strict_json
from lesa.errors import LesaError
from lesa.recording.store import TrajectoryStore

FORMAT = 1
MAX_BYTES = 256 << 20  # of a file: a million trajectories
SHOWN = 3  # keys that a refusal names of each kind
REMEDY = "run the record stage (python -m flows.record), which records what is missing and writes it anew"


def catalogue_of(store: Path) -> Path:
    """Where a store's catalogue lies: beside it, `<name>.json` of `<name>.zarr`."""
    return store.with_suffix(".json")


def write_catalogue(store: TrajectoryStore) -> None:
    """Write the catalogue of everything that is committed; the same store gives the same bytes."""
    digests = {key: dict(record["digests"]) for key, record in store.records().items()}
    atomic.write_json(catalogue_of(store.path), {"format": FORMAT, "trajectories": digests})


def check_catalogue(store: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a store that is not what its catalogue says.

    Args:
        store: its folder.
        records: its commit records by key (`TrajectoryStore.records`).

    Raises:
        LesaError: there is no catalogue, or naming the trajectories that differ.
    """
    path = catalogue_of(store)
    try:
        document = strict_json.parse(path.read_bytes(), max_bytes=MAX_BYTES)
    except FileNotFoundError:
        raise LesaError(f"{path} does not exist: {REMEDY}") from None
    except LesaError as error:
        raise LesaError(f"{path}: {error}; {REMEDY}") from None
    if document.get("format") != FORMAT:
        raise LesaError(f"{path}: not a catalogue of format {FORMAT}; {REMEDY}")
    listed = document.get("trajectories")
    if not isinstance(listed, dict):
        raise LesaError(f"{path}: trajectories must be a mapping; {REMEDY}")
    differences = {
        "not in the store": listed.keys() - records.keys(),
        "not in the catalogue": records.keys() - listed.keys(),
        "with other digests": {key for key in listed.keys() & records.keys() if listed[key] != records[key]["digests"]},
    }
    problems = [
        f"{len(keys)} {what}, e.g. {', '.join(sorted(keys)[:SHOWN])}" for what, keys in differences.items() if keys
    ]
    if problems:
        raise LesaError(f"{path}: the store has changed since it was recorded: {'; '.join(problems)}; {REMEDY}")
