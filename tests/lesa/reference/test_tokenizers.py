"""The tokenizers know every word, and a saved pipeline's read the same."""

from pathlib import Path

from transformers import AutoTokenizer

from lesa.reference.prompts import all_prompts
from lesa.reference.tokenizers import (
    CLIP_LENGTH,
    T5_LENGTH,
    build_clip_tokenizer,
    build_t5_tokenizer,
    vocabulary,
)


def test_a_word_is_a_token() -> None:
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    for word in vocabulary():
        assert len(clip(word).input_ids) == 3, word  # start, word, end
        if word != ",":
            assert len(t5(word).input_ids) == 2, word  # word, end
    ids = clip("a thin slanted seven, top left, white on black").input_ids
    assert len(ids) == 13 and ids.count(clip.eos_token_id) == 1 and ids[-1] == clip.eos_token_id


def test_prompts_fit_and_differ() -> None:
    prompts = all_prompts()
    for tokenizer, length in ((build_clip_tokenizer(), CLIP_LENGTH), (build_t5_tokenizer(), T5_LENGTH)):
        ids = tokenizer(prompts).input_ids
        assert max(map(len, ids)) <= length
        assert len({tuple(row) for row in ids}) == len(prompts)
        assert tokenizer.model_max_length == length
    assert max(map(len, build_t5_tokenizer()(prompts).input_ids)) == T5_LENGTH


def test_words_outside_the_language_are_no_end_of_text() -> None:
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    assert clip("a purple dog").input_ids.count(clip.eos_token_id) == 1
    assert t5.unk_token_id in t5("a purple dog").input_ids


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    texts = [*all_prompts()[::37], "a thin seven", "", "a purple dog"]
    for name, tokenizer in (("clip", build_clip_tokenizer()), ("t5", build_t5_tokenizer())):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        options = {"padding": "max_length", "truncation": True, "max_length": 12}
        assert loaded(texts, **options).input_ids == tokenizer(texts, **options).input_ids
