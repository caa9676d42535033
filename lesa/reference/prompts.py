"""The prompt language of the default workload: five attributes of one handwritten digit.

A full prompt reads "a thin slanted seven, top left, white on black". Every attribute is stated by
`format_prompt`; `parse_prompt` also understands shorter ones ("a thin seven"), and takes the defaults of
`Attributes` for the rest.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THICKNESSES = ("thin", "plain", "bold")
SLANTS = ("upright", "slanted", "backslanted")
POSITIONS = ("centre", "top left", "top right", "bottom left", "bottom right")
POLARITIES = ("white on black", "black on white")

Split = Literal["train", "validation", "test"]
SPLIT_SIZES: dict[Split, int] = {"train": 540, "validation": 160, "test": 200}


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a prompt asks for; each field is one of the tuples of words above."""

    digit: str
    thickness: str = "plain"
    slant: str = "upright"
    position: str = "centre"
    polarity: str = "white on black"

    def __post_init__(self) -> None:
        problems = [
            f"{name} {value!r} (known: {', '.join(VALUES[name])})"
            for name, value in asdict(self).items()
            if value not in VALUES[name]
        ]
        if problems:
            raise ValueError("unknown prompt attributes: " + "; ".join(problems))


VALUES: dict[str, tuple[str, ...]] = {
    "digit": DIGITS,
    "thickness": THICKNESSES,
    "slant": SLANTS,
    "position": POSITIONS,
    "polarity": POLARITIES,
}


def format_prompt(attributes: Attributes) -> str:
    """The full prompt for these attributes; `parse_prompt` is its inverse."""
    a = attributes
    return f"a {a.thickness} {a.slant} {a.digit}, {a.position}, {a.polarity}"


def short_prompt(attributes: Attributes) -> str:
    """The shortest prompt that means the same: attributes at their defaults are left out."""
    a, default = attributes, Attributes(digit=attributes.digit)
    words = [w for w, d in ((a.thickness, default.thickness), (a.slant, default.slant)) if w != d]
    phrases = [p for p, d in ((a.position, default.position), (a.polarity, default.polarity)) if p != d]
    return ", ".join([" ".join(["a", *words, a.digit]), *phrases])


def parse_prompt(prompt: str) -> Attributes:
    """What `prompt` asks for, attributes it leaves out taking their defaults.

    Raises ValueError naming every word or phrase that the language does not know, an attribute that is
    given twice, and a digit that is missing.
    """
    problems: list[str] = []
    found: dict[str, str] = {}

    def give(name: str, value: str) -> None:
        if name in found:
            problems.append(f"{name} given twice ({found[name]!r} and {value!r})")
        found[name] = value

    head, *phrases = [" ".join(part.split()) for part in prompt.lower().split(",")]
    words = head.split()
    if words[:1] in (["a"], ["an"]):
        words = words[1:]
    for word in words:
        name = next((n for n in ("digit", "thickness", "slant") if word in VALUES[n]), None)
        if name is None:
            known = ", ".join((*THICKNESSES, *SLANTS, *DIGITS))
            problems.append(f"unknown word {word!r} (known: {known})")
        else:
            give(name, word)
    for phrase in phrases:
        name = next((n for n in ("position", "polarity") if phrase in VALUES[n]), None)
        if name is None:
            problems.append(f"unknown phrase {phrase!r} (known: {', '.join((*POSITIONS, *POLARITIES))})")
        else:
            give(name, phrase)
    if "digit" not in found:
        problems.append(f"no digit (say one of: {', '.join(DIGITS)})")
    if problems:
        raise ValueError(f"prompt {prompt!r}: " + "; ".join(problems))
    return Attributes(**found)


def attribute_indices(prompt: str) -> list[int]:
    """Positions of the prompt's five values in VALUES, in its order."""
    given = asdict(parse_prompt(prompt))
    return [VALUES[name].index(given[name]) for name in VALUES]


def all_prompts() -> list[str]:
    """All 900 full prompts, in the order of VALUES."""
    return [format_prompt(Attributes(**dict(zip(VALUES, v, strict=True)))) for v in product(*VALUES.values())]


def split_prompts() -> dict[Split, list[str]]:
    """The fixed partition of `all_prompts`: ordered by SHA-256, so independent of any generator's version."""
    ordered = sorted(all_prompts(), key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())
    splits: dict[Split, list[str]] = {}
    start = 0
    for name, size in SPLIT_SIZES.items():
        splits[name] = ordered[start : start + size]
        start += size
    return splits


def write_splits(folder: Path) -> None:
    """Write `<split>.txt`, one prompt a line, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in split_prompts().items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
