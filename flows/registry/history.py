"""Which version was made champion when: a list that only grows, whose next place only one publisher can take.

Through an MLflow server the last writer of an alias wins, and clients see no database to lock. What MLflow does promise
everywhere is that a registered model's name exists once. So each entry is a registered model of its own,
`<name>.promotion-<number>`, created together with its tags: of publishers that judged against the same champion one
gets the next number, and the others learn that they were late. The last entry is the champion; aliases follow it
and are set anew from it where a publisher died between the two. No lock, nothing that expires.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lesa.errors import LesaError

Kind = Literal["promoted", "rolled back", "lifted"]
_FIELDS = ("kind", "version", "before", "reason")
_DIGITS = 6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One decision about the champion."""

    number: int  # from 1, without gaps
    kind: Kind
    version: str  # that became champion; of "lifted": that may become champion again
    before: str  # the champion until then, "" where there was none
    reason: str = ""
    is_applied: bool = False  # the aliases were seen to follow it


class PromotionHistory:
    """The entries of one registered model."""

    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name
        self._prefix = f"{name}.promotion-"

    def entries(self) -> list[Entry]:
        """All of them, the oldest first.

        Raises:
            LesaError: one in the middle is missing: somebody deleted it.
        """
        found: list[Entry] = []
        token = None
        while True:
            page = self.client.search_registered_models(
                filter_string=f"name LIKE '{self._prefix}%'", max_results=500, page_token=token
            )
            for model in page:
                number = model.name.removeprefix(self._prefix)
                if model.name.startswith(self._prefix) and number.isdecimal():
                    tags = {key: model.tags.get(key, "") for key in _FIELDS}
                    found.append(Entry(number=int(number), is_applied="applied" in model.tags, **tags))
            token = page.token
            if not token:
                break
        found.sort(key=lambda entry: entry.number)
        if [entry.number for entry in found] != list(range(1, len(found) + 1)):
            raise LesaError(
                f"{self._prefix}*: entries {[entry.number for entry in found][-5:]} have gaps; restore the registered "
                "models that were deleted: they are the record of promotions"
            )
        return found

    def append(self, entry: Entry) -> bool:
        """Adds the entry if its number is still free; False where somebody else was first."""
        from mlflow.exceptions import MlflowException

        name = self._entry_name(entry.number)
        tags = {key: str(getattr(entry, key)) for key in _FIELDS}
        try:
            self.client.create_registered_model(name, tags=tags)
        except MlflowException as error:
            found = next((known for known in self.entries() if known.number == entry.number), None)
            if found is None:
                raise error
            # After an answer that was lost it is there and ours: it says what it was to say.
            return dataclasses.replace(found, is_applied=False) == entry
        return True

    def mark_applied(self, entry: Entry) -> None:
        """Notes that the aliases follow the entry. Of publishers that do so at once a database lets one through, and an
        answer may be lost: what is read back counts."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.set_registered_model_tag(self._entry_name(entry.number), "applied", "true")
        except MlflowException:
            if not any(known.number == entry.number and known.is_applied for known in self.entries()):
                raise

    def _entry_name(self, number: int) -> str:
        return f"{self._prefix}{number:0{_DIGITS}d}"


def barred(entries: list[Entry]) -> dict[str, str]:
    """Versions that were rolled back and not lifted since, with the reasons."""
    result: dict[str, str] = {}
    for entry in entries:
        if entry.kind == "rolled back":
            result[entry.before] = entry.reason
        elif entry.kind == "lifted":
            result.pop(entry.version, None)
    return result


def last_promotion(entries: list[Entry]) -> Entry | None:
    """The entry that says who is champion."""
    return next((entry for entry in reversed(entries) if entry.kind != "lifted"), None)
