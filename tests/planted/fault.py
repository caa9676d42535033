"""One fault that a programmer could have made, as a replacement of text in a copy of the product's code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Fault:
    """What is planted, and who ought to notice."""

    name: str  # says what goes wrong
    file: str  # from the repository's root
    old: str  # occurs exactly once in the file
    new: str
    tests: tuple[str, ...]  # files whose quick tests ought to fail, the likeliest first
    equivalent: str = ""  # why nothing observable changes; such a fault is not counted

    def planted_in(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the old text does not occur exactly once, or nothing would change.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {found} times in {self.file}, expected once")
        if self.old == self.new:
            raise ValueError(f"{self.name}: changes nothing")
        return text.replace(self.old, self.new)

    def plant(self, tree: Path) -> None:
        """Writes the fault into a copy of the repository."""
        path = tree / self.file
        path.write_text(self.planted_in(path.read_text()))
