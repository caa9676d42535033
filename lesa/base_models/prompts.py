"""A prompt language: a closed set of attributes, each with its words, and the sentence that states them.

A language is given by its form, for example "a {thickness} {slant} {digit}, {position}, {polarity}". The form's
first phrase is the head: fixed words and attributes of one word each, in any order when read. Every further
phrase is one attribute. Attributes that have a default may be left unsaid.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from lesa.errors import LesaError

# What the model itself is trained on, and then what a predictor is trained, chosen and judged on.
Split = Literal["base", "train", "validation", "test"]
Attributes = dict[str, str]  # a value for every attribute of a language


@dataclass(frozen=True, kw_only=True)
class Language:
    """Every prompt that one data set understands.

    A value belongs to one attribute only, so a prompt can be read without knowing the order it was said in.
    """

    form: str  # the full prompt, attributes in braces
    values: Mapping[str, tuple[str, ...]]  # what each attribute may be, in the order of `indices`
    defaults: Mapping[str, str]  # of the attributes that may be left unsaid
    split_sizes: Mapping[Split, int]  # together all prompts

    def __post_init__(self) -> None:
        named = re.findall(r"{(\w+)}", self.form)
        words = [value for values in self.values.values() for value in values]
        assert sorted(named) == sorted(self.values), "the form names every attribute once"
        assert len(set(words)) == len(words), "a value belongs to one attribute"
        assert all(value in self.values[name] for name, value in self.defaults.items())
        assert all(" " not in value for name in self.head for value in self.values[name])

    @cached_property
    def phrases(self) -> tuple[str, ...]:
        """The parts of the form between commas; the first is the head."""
        return tuple(self.form.split(", "))

    @cached_property
    def head(self) -> tuple[str, ...]:
        """Attributes said in the first phrase."""
        return tuple(re.findall(r"{(\w+)}", self.phrases[0]))

    def format(self, attributes: Mapping[str, str]) -> str:
        """The full prompt for these attributes; `parse` is its inverse.

        Raises ValueError naming every attribute that is missing, unknown or of an unknown value.
        """
        problems = [f"no {name}" for name in self.values if name not in attributes]
        problems += [f"unknown attribute {name!r}" for name in attributes if name not in self.values]
        problems += [
            f"unknown {name} {attributes[name]!r} (known: {', '.join(known)})"
            for name, known in self.values.items()
            if name in attributes and attributes[name] not in known
        ]
        if problems:
            raise LesaError("prompt attributes: " + "; ".join(problems))
        return self.form.format(**attributes)

    def shorten(self, prompt: str) -> str:
        """The shortest prompt that means the same as `prompt`: attributes at their defaults are left out."""
        attributes = self.parse(prompt)
        kept = {name: "" if self.defaults.get(name) == value else value for name, value in attributes.items()}
        phrases = [" ".join(phrase.format(**kept).split()) for phrase in self.phrases]
        return ", ".join(phrase for phrase in phrases if phrase)

    def parse(self, prompt: str) -> Attributes:
        """The value of every attribute, those that `prompt` leaves out at their defaults.

        Raises ValueError naming every word or phrase that the language does not know, an attribute that is
        given twice, and one that is missing.
        """
        problems: list[str] = []
        attributes: Attributes = {}
        fillers = set(re.sub(r"{\w+}", "", self.phrases[0]).split()) | {"an"}
        tail = tuple(name for name in self.values if name not in self.head)
        head, *phrases = [" ".join(part.split()) for part in prompt.lower().split(",")]
        parts = [(word, "word", self.head) for word in head.split() if word not in fillers]
        parts += [(phrase, "phrase", tail) for phrase in phrases]
        for text, what, names in parts:
            name = next((n for n in names if text in self.values[n]), None)
            if name is None:
                known = ", ".join(value for n in names for value in self.values[n])
                problems.append(f"unknown {what} {text!r} (known: {known})")
            elif name in attributes:
                problems.append(f"{name} given twice ({attributes[name]!r} and {text!r})")
            else:
                attributes[name] = text
        for name, values in self.values.items():
            if name not in attributes and name not in self.defaults:
                problems.append(f"no {name} (say one of: {', '.join(values)})")
        if problems:
            raise LesaError(f"prompt {prompt!r}: " + "; ".join(problems))
        return {name: attributes.get(name) or self.defaults[name] for name in self.values}

    def indices(self, prompt: str, attributes: Sequence[str] | None = None) -> list[int]:
        """Positions in `values` of what the prompt says of `attributes`, by default all of them in order."""
        values = self.parse(prompt)
        return [self.values[name].index(values[name]) for name in attributes or self.values]

    def all_prompts(self) -> list[str]:
        """All full prompts, in the order of `values`."""
        return [
            self.format(dict(zip(self.values, chosen, strict=True))) for chosen in product(*self.values.values())
        ]

    def vocabulary(self) -> list[str]:
        """The words of the full prompts, and the comma, sorted."""
        return sorted({token for prompt in self.all_prompts() for token in re.findall(r"\w+|,", prompt)})

    @cached_property
    def num_words(self) -> int:
        """Words and commas of the longest prompt."""
        return max(len(re.findall(r"\w+|,", prompt)) for prompt in self.all_prompts())

    def split_prompts(self) -> dict[Split, list[str]]:
        """The fixed partition of `all_prompts`: ordered by SHA-256, so independent of any generator's version."""
        ordered = sorted(self.all_prompts(), key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())
        assert sum(self.split_sizes.values()) == len(ordered)
        splits: dict[Split, list[str]] = {}
        start = 0
        for name, size in self.split_sizes.items():
            splits[name] = ordered[start : start + size]
            start += size
        return splits
