"""Prompt sets: a folder with train.txt, validation.txt and test.txt, a prompt a line, disjoint.

A set whose model is trained here has base.txt too, that model's own prompts. None of them trains a predictor: what it
learns from must be as new to the model as what it will serve, or it learns features that are easier than those.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from lesa.errors import LesaError

SPLITS = ("train", "validation", "test")
BASE_SPLIT = "base"  # only where the model is trained here
MAX_PROMPT_CHARACTERS = 4000  # far beyond what any text encoder reads


class PromptError(LesaError):
    """A prompt set that cannot be used; the message lists every problem."""


def read_prompts(folder: Path, split: str) -> list[str]:
    """The prompts of one split in file order.

    Raises:
        PromptError: missing file, not UTF-8, empty, duplicate, control characters or overlong lines, all listed.
    """
    path = Path(folder) / f"{split}.txt"
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise PromptError(f"prompts: {path} does not exist; a set needs train.txt, validation.txt, test.txt") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"prompts: {path} is not UTF-8 (byte {error.start})") from None
    prompts = text.split("\n")
    if prompts and prompts[-1] == "":
        prompts.pop()
    problems, seen = [], dict[str, int]()
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            problems.append(f"line {number} is empty")
        elif len(prompt) > MAX_PROMPT_CHARACTERS:
            problems.append(f"line {number} has {len(prompt)} characters, at most {MAX_PROMPT_CHARACTERS}")
        elif any(unicodedata.category(character) == "Cc" for character in prompt) or "\ufeff" in prompt:
            problems.append(f"line {number} has control characters: {prompt[:60]!r}")
        elif (same := normalised(prompt)) in seen:
            problems.append(f"line {number} repeats line {seen[same]}: {prompt[:60]!r}")
        else:
            seen[same] = number
    if not prompts:
        problems.append("no prompt in it")
    if problems:
        raise PromptError(f"prompts: {path}: " + "; ".join(problems))
    return prompts


def read_splits(folder: Path) -> dict[str, list[str]]:
    """All three splits, and the model's own prompts where base.txt lies beside them, checked to be disjoint.

    Raises:
        PromptError: any problem of a file, or prompts that stand in two splits.
    """
    splits, problems = {}, []
    has_base = (Path(folder) / f"{BASE_SPLIT}.txt").exists()
    for split in (*((BASE_SPLIT,) if has_base else ()), *SPLITS):
        try:
            splits[split] = read_prompts(folder, split)
        except PromptError as error:
            problems.append(str(error))
    if problems:
        raise PromptError("; ".join(problems))
    refuse_overlap(splits, where=str(folder))
    return splits


def refuse_overlap(sets: Mapping[str, Iterable[str]], *, where: str) -> None:
    """`PromptError` naming prompts that stand in two of the sets: training on what is judged proves nothing.

    Case and spacing make no other prompt: text encoders read past them.
    """
    names = list(sets)
    spelt = {name: {normalised(prompt): prompt for prompt in sets[name]} for name in names}
    problems = []
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            shared = sorted(spelt[first].keys() & spelt[second].keys())
            if shared:
                example = spelt[second][shared[0]][:60]
                problems.append(f"{len(shared)} in both {first} and {second}, e.g. {example!r}")
    if problems:
        raise PromptError(f"prompts of {where} overlap: " + "; ".join(problems))


def prompts_digest(prompts: Iterable[str]) -> str:
    """SHA-256 over the sorted distinct prompts; what a manifest states of a set."""
    return hashlib.sha256("\n".join(sorted(set(prompts))).encode()).hexdigest()


def normalised(prompt: str) -> str:
    """What makes two prompts the same one: spacing and case do not tell them apart."""
    return " ".join(prompt.split()).casefold()


def prompt_digests(prompts: Iterable[str]) -> list[str]:
    """First 16 hex digits of the SHA-256 of every distinct prompt, normalised, sorted.

    Overlap can be told without the prompts, and a change of spacing or case hides none.
    """
    return sorted({hashlib.sha256(normalised(prompt).encode()).hexdigest()[:16] for prompt in prompts})
