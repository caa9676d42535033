"""What is known of a store's trajectories without reading them: which were found whole, and what recording them took.

A file beside the store, `<store>.ledger`. A trajectory whose files are as they were when every byte of it was last read
is not read again; any other is, so that losing the file costs one reading of the store and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa import atomic, strict_json
from lesa.errors import LesaError
from lesa.recording.store import TrajectoryStore
from lesa.validation import build

FORMAT = 1
MAX_BYTES = 512 << 20  # of a file: a million trajectories


def ledger_of(store: Path) -> Path:
    """Where a store's ledger lies: beside it, so that it is no part of the store's hash."""
    return store.with_name(store.name + ".ledger")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A trajectory when it was last verified."""

    state: str  # `TrajectoryStore.state_of` before it was read
    content: str  # SHA-256 of its commit record, the digests of its arrays in it
    digests: dict[str, Any]  # of its arrays, by name
    seconds: float | None = None  # its share of the recording's wall clock; None: not known


class Ledger:
    """The ledger of one store; `save` writes it. Under the store's writer lock."""

    def __init__(self, store: TrajectoryStore) -> None:
        self._store, self._entries = store, _read(ledger_of(store.path))

    def unread(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` whose files are new here, or were touched since every byte of them was last read."""

        def is_known(key: str) -> bool:
            return key in self._entries and self._entries[key].state == self._store.state_of(key)

        return [key for key in keys if not is_known(key)]

    def verify(self, keys: Iterable[str], seconds: Mapping[str, float] | None = None) -> dict[str, str]:
        """Read trajectories: what is wrong with each damaged one, by key; the others are known as good from now on.

        Args:
            keys: of committed trajectories.
            seconds: what recording them took, of those that were recorded just now.
        """
        damaged = {}
        for key in keys:
            state, known = self._store.state_of(key), self._entries.pop(key, None)
            problems = self._store.problems(key)
            if not problems:
                record = self._store.record(key)
                took = (seconds or {}).get(key, known.seconds if known is not None else None)
                entry = Entry(state=state, content=_content(record), digests=record["digests"], seconds=took)
                problems = _contradictions(key, known, entry)
                self._entries[key] = entry
            if problems:
                damaged[key] = "; ".join(problems)
        self.forget(damaged)
        return damaged

    def seconds(self, keys: Iterable[str]) -> float:
        """What recording these took, as far as it is known."""
        known = (self._entries[key].seconds for key in keys if key in self._entries)
        return sum(seconds for seconds in known if seconds is not None)

    def keep_only(self, keys: Iterable[str]) -> None:
        """Drop what is known of all other trajectories."""
        self._entries = {key: self._entries[key] for key in set(keys) & self._entries.keys()}

    def forget(self, keys: Iterable[str]) -> None:
        """Read these again next time, whatever their files look like."""
        self.keep_only(self._entries.keys() - set(keys))

    def save(self) -> None:
        entries = {key: dataclasses.asdict(entry) for key, entry in self._entries.items()}
        atomic.write_json(ledger_of(self._store.path), {"format": FORMAT, "trajectories": entries})


def _content(record: Mapping[str, Any]) -> str:
    said = {name: value for name, value in record.items() if name != "format"}  # the same one in an older format
    return atomic.sha256_bytes(atomic.canonical_json(said))


def _contradictions(key: str, known: Entry | None, found: Entry) -> list[str]:
    """No digest covers a record's noise levels: where its arrays are those it had, the rest must be too.

    Another recording of the same key (another machine's, checked out by DVC) has other arrays.
    """
    if known is None or known.digests != found.digests or known.content == found.content:
        return []
    return [f"trajectory {key}: its record is not the one that was committed with these arrays; record it again"]


def _read(path: Path) -> dict[str, Entry]:
    """Nothing where there is no ledger, or none that can be used: every trajectory is then read once."""
    problems: list[str] = []
    try:
        document = strict_json.parse(path.read_bytes(), max_bytes=MAX_BYTES)
    except (OSError, LesaError):
        return {}
    if document.get("format") != FORMAT:
        return {}
    entries: dict[str, Entry] = build(dict[str, Entry], document.get("trajectories"), "trajectories", problems)
    return {} if problems else entries
