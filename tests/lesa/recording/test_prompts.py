"""Prompt sets: read exactly, disjoint, every problem named."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from lesa.recording.prompts import (
    PromptError,
    normalised,
    prompt_digests,
    prompts_digest,
    read_prompts,
    read_splits,
    refuse_overlap,
)

ROOT = Path(__file__).parents[3]


def write(folder: Path, **splits: str | bytes) -> Path:
    for split, text in splits.items():
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_lines_come_in_file_order_and_exactly(tmp_path: Path) -> None:
    write(
        tmp_path, train="b cat\na dog \n\N{ARABIC LETTER ALEF} right to left\nÅ", validation="x\n", test="y\n"
    )
    splits = read_splits(tmp_path)
    assert splits["train"] == ["b cat", "a dog ", "\N{ARABIC LETTER ALEF} right to left", "Å"]
    assert splits["validation"] == ["x"] and splits["test"] == ["y"]


def test_the_models_own_prompts_are_read_where_it_has_them_and_are_no_others(tmp_path: Path) -> None:
    write(tmp_path, base="a cat\na dog\n", train="b\n", validation="c\n", test="d\n")
    assert read_splits(tmp_path)["base"] == ["a cat", "a dog"]
    write(tmp_path, train="b\nA  Cat\n")
    with pytest.raises(PromptError, match="1 in both base and train, e.g. 'A  Cat'"):
        read_splits(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no prompt in it"),
        ("a\n\nb\n", "line 2 is empty"),
        ("a\n \t\n", "line 2 is empty"),
        ("a\nb\na\n", "line 3 repeats line 1: 'a'"),
        ("a cat\nb\n A  Cat\n", "line 3 repeats line 1: ' A  Cat'"),
        ("a\x00b\n", r"line 1 has control characters: 'a\\x00b'"),
        ("a\x1b[31mb\n", "line 1 has control characters"),
        ("a\x9b31mb\n", "line 1 has control characters"),
        ("a\r\nb\r\n", "line 1 has control characters"),
        ("\N{ZERO WIDTH NO-BREAK SPACE}a\n", "line 1 has control characters"),
        ("x" * 100_000 + "\n", "line 1 has 100000 characters, at most 4000"),
        (b"a\n\xff\n", "not UTF-8 \\(byte 2\\)"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: str | bytes, words: str) -> None:
    write(tmp_path, train=content)
    with pytest.raises(PromptError, match=words):
        read_prompts(tmp_path, "train")


def test_every_problem_of_every_file_is_listed(tmp_path: Path) -> None:
    write(tmp_path, train="a\n\na\n", validation="b\x07\n")
    with pytest.raises(PromptError) as caught:
        read_splits(tmp_path)
    text = str(caught.value)
    for words in (
        "line 2 is empty",
        "line 3 repeats line 1",
        "control characters",
        "test.txt does not exist",
    ):
        assert words in text
    assert "a set needs train.txt, validation.txt, test.txt" in text


@pytest.mark.parametrize("same", ["a cat", "A Cat", "a  cat", " a cat"])
def test_a_prompt_in_two_splits_is_refused(tmp_path: Path, same: str) -> None:
    write(tmp_path, train="a cat\na dog\n", validation="x\n", test=f"{same}\n")
    with pytest.raises(PromptError, match="1 in both train and test") as caught:
        read_splits(tmp_path)
    assert repr(same) in str(caught.value)


def test_all_overlaps_are_named() -> None:
    with pytest.raises(PromptError, match="2 in both a and b.*1 in both a and c"):
        refuse_overlap({"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["3"]}, where="here")
    refuse_overlap({"a": ["1"], "b": []}, where="here")


def test_digests() -> None:
    assert prompts_digest(["b", "a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert prompt_digests(["b", "a", "b"]) == sorted(hashlib.sha256(t).hexdigest()[:16] for t in (b"a", b"b"))


@pytest.mark.parametrize(
    ("name", "counts"),
    [("flux-digits", None), ("flux-photos", None), ("general", (400, 60, 120)), ("motion", (200, 40, 60))],
)
def test_the_repositorys_sets_are_sound(name: str, counts: tuple[int, int, int] | None) -> None:
    splits = read_splits(ROOT / "data/prompts" / name)
    assert sum(map(len, splits.values())) >= 300
    if counts is not None:
        assert tuple(map(len, splits.values())) == counts


def test_written_prompts_are_no_variants_of_each_other() -> None:
    prompts = [
        line
        for name in ("general", "motion")
        for lines in read_splits(ROOT / "data/prompts" / name).values()
        for line in lines
    ]
    assert len({normalised(prompt) for prompt in prompts}) == len(prompts)
    words = [frozenset(re.findall(r"[a-z]{4,}", prompt.lower())) for prompt in prompts]
    for index, first in enumerate(words):
        for other, second in enumerate(words[:index]):
            if len(first | second) > 3:
                alike = len(first & second) / len(first | second)
                assert alike < 0.6, (prompts[index], prompts[other])


def test_written_prompts_vary_in_length() -> None:
    lengths = [len(prompt.split()) for prompt in read_prompts(ROOT / "data/prompts/general", "train")]
    assert min(lengths) <= 2 and max(lengths) >= 25
    assert sum(length <= 6 for length in lengths) >= 40 and sum(length >= 12 for length in lengths) >= 30
