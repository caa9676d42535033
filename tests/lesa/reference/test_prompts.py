"""The prompt language and its committed splits."""

from dataclasses import asdict
from pathlib import Path

import pytest

from lesa.reference.prompts import (
    SPLIT_SIZES,
    VALUES,
    Attributes,
    all_prompts,
    attribute_indices,
    format_prompt,
    parse_prompt,
    short_prompt,
    split_prompts,
    write_splits,
)

COMMITTED = Path(__file__).parents[3] / "data" / "prompts" / "flux-digits"


def test_every_prompt_survives_parsing_and_formatting() -> None:
    prompts = all_prompts()
    assert len(prompts) == len(set(prompts)) == 900
    assert [format_prompt(parse_prompt(prompt)) for prompt in prompts] == prompts
    assert "a thin slanted seven, top left, white on black" in prompts


def test_short_prompts_mean_the_same() -> None:
    assert short_prompt(Attributes(digit="seven", thickness="thin")) == "a thin seven"
    assert short_prompt(Attributes(digit="two")) == "a two"
    assert all(
        parse_prompt(short_prompt(parse_prompt(prompt))) == parse_prompt(prompt) for prompt in all_prompts()
    )


def test_attributes_left_out_are_the_defaults() -> None:
    assert parse_prompt("a thin seven") == Attributes(digit="seven", thickness="thin")
    assert parse_prompt("Nine,  black  on white") == Attributes(digit="nine", polarity="black on white")
    assert attribute_indices("a bold nine, bottom right") == [9, 2, 0, 4, 0]


def test_a_bad_prompt_is_refused_with_every_problem_named() -> None:
    with pytest.raises(ValueError) as caught:
        parse_prompt("a thin purple bold seven, upstairs")
    message = str(caught.value)
    assert "'purple'" in message and "'upstairs'" in message
    assert "thickness given twice ('thin' and 'bold')" in message
    with pytest.raises(ValueError, match="no digit"):
        parse_prompt("")
    with pytest.raises(ValueError, match=r"digit 'ten'.*position 'left'"):
        Attributes(digit="ten", position="left")


def test_splits_are_disjoint_and_each_has_every_value() -> None:
    splits = split_prompts()
    assert {name: len(prompts) for name, prompts in splits.items()} == SPLIT_SIZES
    together = [prompt for prompts in splits.values() for prompt in prompts]
    assert len(set(together)) == len(together) == 900
    for prompts in splits.values():
        for name, values in VALUES.items():
            assert {asdict(parse_prompt(prompt))[name] for prompt in prompts} == set(values)


def test_committed_files_are_the_split(tmp_path: Path) -> None:
    write_splits(tmp_path)
    for name in SPLIT_SIZES:
        assert (COMMITTED / f"{name}.txt").read_bytes() == (tmp_path / f"{name}.txt").read_bytes()
