"""The tokenizers know every word, and a saved pipeline's read the same."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lesa.reference import DATA_SETS, DataSet
from lesa.reference.tokenizers import build_clip_tokenizer, build_t5_tokenizer


@pytest.fixture(params=DATA_SETS.values(), ids=DATA_SETS)
def data_set(request: pytest.FixtureRequest) -> DataSet:
    return request.param


def test_a_word_is_a_token(data_set: DataSet) -> None:
    clip, t5 = build_clip_tokenizer(data_set), build_t5_tokenizer(data_set)
    for word in data_set.language.vocabulary():
        assert len(clip(word).input_ids) == 3, word  # start, word, end
        if word != ",":
            assert len(t5(word).input_ids) == 2, word  # word, end
    prompts = {
        "flux-digits": "a thin slanted seven, top left, white on black",
        "flux-photos": "a close view of the temple, second row, far left, mirrored, warm",
    }
    ids = clip(prompts[data_set.name]).input_ids
    assert len(ids) == {"flux-digits": 13, "flux-photos": 18}[data_set.name]
    assert ids.count(clip.eos_token_id) == 1 and ids[-1] == clip.eos_token_id


def test_prompts_fit_and_differ(data_set: DataSet) -> None:
    prompts = data_set.language.all_prompts()
    clip, t5 = build_clip_tokenizer(data_set), build_t5_tokenizer(data_set)
    for tokenizer, length in ((clip, data_set.clip_length), (t5, data_set.t5_length)):
        ids = tokenizer(prompts).input_ids
        assert max(map(len, ids)) <= length
        assert len({tuple(row) for row in ids}) == len(prompts)
        assert tokenizer.model_max_length == length
    assert max(map(len, t5(prompts).input_ids)) == data_set.t5_length


def test_words_outside_the_language_are_no_end_of_text(data_set: DataSet) -> None:
    clip, t5 = build_clip_tokenizer(data_set), build_t5_tokenizer(data_set)
    assert clip("a purple dog").input_ids.count(clip.eos_token_id) == 1
    assert t5.unk_token_id in t5("a purple dog").input_ids


def test_saving_and_loading_changes_nothing(data_set: DataSet, tmp_path: Path) -> None:
    prompts = data_set.language.all_prompts()[::37]
    texts = [*prompts, data_set.language.shorten(prompts[0]), "", "a purple dog"]
    clip, t5 = build_clip_tokenizer(data_set), build_t5_tokenizer(data_set)
    for name, tokenizer in (("clip", clip), ("t5", t5)):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        options = {"padding": "max_length", "truncation": True, "max_length": 12}
        assert loaded(texts, **options).input_ids == tokenizer(texts, **options).input_ids
