"""The prompt languages and their committed splits."""

from pathlib import Path

import pytest

from lesa.base_models.data_sets import DATA_SETS, DataSet
from lesa.base_models.digits import LANGUAGE as DIGITS
from lesa.base_models.moving import LANGUAGE as MOVING
from lesa.base_models.numbers import LANGUAGE as NUMBERS
from lesa.base_models.photos import LANGUAGE as PHOTOS
from lesa.recording.prompts import read_splits

COMMITTED = Path(__file__).parents[3] / "data" / "prompts"
SIZES = {"flux-digits": 1620, "flux-photos": 2304, "qwen-digits": 1296, "hunyuan-moving-digits": 900}


@pytest.fixture(params=DATA_SETS.values(), ids=DATA_SETS)
def data_set(request: pytest.FixtureRequest) -> DataSet:
    return request.param


def test_every_prompt_survives_parsing_and_formatting(data_set: DataSet) -> None:
    language = data_set.language
    prompts = language.all_prompts()
    assert len(prompts) == len(set(prompts)) == SIZES[data_set.name]
    assert [language.format(language.parse(prompt)) for prompt in prompts] == prompts


def test_prompts_read_as_documented() -> None:
    assert "a thin slanted seven, top left, white on black" in DIGITS.all_prompts()
    assert "a close view of the temple, second row, far left, mirrored, warm" in PHOTOS.all_prompts()
    assert "a thin slanted forty two, white on black" in NUMBERS.all_prompts()
    assert "a thin slanted seven, moving left, white on black" in MOVING.all_prompts()


def test_short_prompts_mean_the_same(data_set: DataSet) -> None:
    language = data_set.language
    short = {prompt: language.shorten(prompt) for prompt in language.all_prompts()}
    assert len(set(short.values())) == len(short)
    assert all(language.parse(short[prompt]) == language.parse(prompt) for prompt in short)
    assert all(len(short[prompt]) <= len(prompt) for prompt in short)


def test_short_prompts_leave_defaults_out() -> None:
    assert DIGITS.shorten("a thin upright seven, centre, white on black") == "a thin seven"
    assert DIGITS.shorten("a two") == "a two"
    full = "a medium view of the flower, top row, left, unmirrored, dim"
    assert PHOTOS.shorten(full) == "a view of the flower, top row, left, dim"


def test_attributes_left_out_are_the_defaults() -> None:
    assert DIGITS.parse("a thin seven") == {
        "digit": "seven",
        "thickness": "thin",
        "slant": "upright",
        "position": "centre",
        "polarity": "white on black",
    }
    assert DIGITS.parse("Nine,  black  on white") == DIGITS.parse("a nine, black on white")
    assert DIGITS.indices("a bold nine, bottom right") == [9, 2, 0, 4, 0]
    assert PHOTOS.indices("a view of the flower, bottom row, left") == [1, 1, 3, 1, 0, 0]
    assert PHOTOS.indices("flower, cold, left, bottom row", ("tone", "column")) == [2, 1]


def test_a_bad_prompt_is_refused_with_every_problem_named() -> None:
    with pytest.raises(ValueError) as caught:
        DIGITS.parse("a thin purple bold seven, upstairs")
    message = str(caught.value)
    assert "unknown word 'purple'" in message and "unknown phrase 'upstairs'" in message
    assert "thickness given twice ('thin' and 'bold')" in message
    with pytest.raises(ValueError, match="no digit"):
        DIGITS.parse("")
    with pytest.raises(ValueError, match=r"no photo .*; no row .*; no column "):
        PHOTOS.parse("a close view")


def test_bad_attributes_are_refused_with_every_problem_named() -> None:
    with pytest.raises(ValueError, match=r"no thickness.*unknown attribute 'size'.*digit 'ten'.*position 'middle'"):
        DIGITS.format(
            {"digit": "ten", "slant": "upright", "position": "middle", "polarity": "black on white", "size": "big"}
        )


def test_splits_are_disjoint_and_each_has_every_value(data_set: DataSet) -> None:
    language = data_set.language
    splits = language.split_prompts()
    assert {name: len(prompts) for name, prompts in splits.items()} == language.split_sizes
    together = [prompt for prompts in splits.values() for prompt in prompts]
    assert len(set(together)) == len(together) == SIZES[data_set.name]
    for prompts in splits.values():
        for name, values in language.values.items():
            assert {language.parse(prompt)[name] for prompt in prompts} == set(values)


def test_every_place_of_the_photographs_is_trained_and_tested() -> None:
    """What a test prompt asks for in a new combination was seen in others."""
    splits = PHOTOS.split_prompts()
    places = {
        name: {tuple(PHOTOS.indices(prompt, ("photo", "zoom", "row", "column"))) for prompt in prompts}
        for name, prompts in splits.items()
    }
    assert len(places["base"]) == 2 * 3 * 4 * 6
    assert places["test"] <= places["base"]
    assert 2 * len(splits["test"]) >= 512  # pairs with two seeds each


def test_committed_files_are_the_split(data_set: DataSet) -> None:
    committed = COMMITTED / data_set.name
    for name, prompts in data_set.language.split_prompts().items():
        assert (committed / f"{name}.txt").read_text() == "\n".join(prompts) + "\n"
    assert read_splits(committed) == data_set.language.split_prompts()
