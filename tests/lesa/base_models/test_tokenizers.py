"""The tokenizers know every word, and a saved pipeline's read the same."""

from pathlib import Path

import pytest
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import AutoTokenizer

from lesa.base_models.architectures import architecture_of
from lesa.base_models.data_sets import DATA_SETS, DataSet
from lesa.base_models.tokenizers import build_clip_tokenizer, build_t5_tokenizer

FLUX = {name: data_set for name, data_set in DATA_SETS.items() if data_set.family == "flux"}
# The tokenizer whose pipeline wraps a prompt in a template, and the first and last words that the transformer is given.
WRAPPED = {
    "qwen-digits": ("a bold forty two", ["a", "\u0120bold", "\u0120forty", "\u0120two"], "<|im_end|>"),
    "hunyuan-moving-digits": ("a bold two", ["\n", "a", "\u2581bold", "\u2581two"], "<|eot_id|>"),
}


@pytest.fixture(params=FLUX.values(), ids=FLUX)
def data_set(request: pytest.FixtureRequest) -> DataSet:
    return request.param


@pytest.mark.parametrize("name", WRAPPED)
def test_a_template_is_cut_off_where_the_prompt_begins(name: str) -> None:
    """A token more or fewer than the real tokenizer makes of the template, and the prompt's head would be lost."""
    prompt, begins, ends = WRAPPED[name]
    pipeline = architecture_of(DATA_SETS[name]).build(DATA_SETS[name])
    tokenizer = pipeline.tokenizer
    if name == "qwen-digits":
        ids = tokenizer(pipeline.prompt_template_encode.format(prompt)).input_ids
        given = ids[pipeline.prompt_template_encode_start_idx :]
    else:
        ids = tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(prompt)).input_ids
        given = ids[DEFAULT_PROMPT_TEMPLATE["crop_start"] :]
    words = tokenizer.convert_ids_to_tokens(given)
    assert words[: len(begins) + 1] == [*begins, ends]


@pytest.mark.parametrize("name", WRAPPED)
def test_every_prompt_fits_the_transformers_text(name: str) -> None:
    data_set = DATA_SETS[name]
    architecture = architecture_of(data_set)
    pipeline = architecture.build(data_set)
    prompts = data_set.language.all_prompts()[::7]
    read = architecture.read(pipeline, data_set, prompts)
    mask = next(value for key, value in read.items() if key.endswith("_mask"))
    assert mask.shape[1] == data_set.text_length and int(mask.sum(dim=1).max()) == data_set.text_length
    tokens = read["encoder_hidden_states"]
    assert all((tokens[0] - other).abs().max() > 1e-4 for other in tokens[1:])


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapping_tokenizer_survives_saving(name: str, tmp_path: Path) -> None:
    tokenizer = architecture_of(DATA_SETS[name]).build(DATA_SETS[name]).tokenizer
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    texts = [*DATA_SETS[name].language.all_prompts()[::97], "", "a purple dog"]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids


def test_a_word_is_a_token(data_set: DataSet) -> None:
    clip, t5 = build_clip_tokenizer(data_set, data_set.clip_length), build_t5_tokenizer(data_set)
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
    clip, t5 = build_clip_tokenizer(data_set, data_set.clip_length), build_t5_tokenizer(data_set)
    for tokenizer, length in ((clip, data_set.clip_length), (t5, data_set.text_length)):
        ids = tokenizer(prompts).input_ids
        assert max(map(len, ids)) <= length
        assert len({tuple(row) for row in ids}) == len(prompts)
        assert tokenizer.model_max_length == length
    assert max(map(len, t5(prompts).input_ids)) == data_set.text_length


def test_words_outside_the_language_are_no_end_of_text(data_set: DataSet) -> None:
    clip, t5 = build_clip_tokenizer(data_set, data_set.clip_length), build_t5_tokenizer(data_set)
    assert clip("a purple dog").input_ids.count(clip.eos_token_id) == 1
    assert t5.unk_token_id in t5("a purple dog").input_ids


def test_saving_and_loading_changes_nothing(data_set: DataSet, tmp_path: Path) -> None:
    prompts = data_set.language.all_prompts()[::37]
    texts = [*prompts, data_set.language.shorten(prompts[0]), "", "a purple dog"]
    clip, t5 = build_clip_tokenizer(data_set, data_set.clip_length), build_t5_tokenizer(data_set)
    for name, tokenizer in (("clip", clip), ("t5", t5)):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        options = {"padding": "max_length", "truncation": True, "max_length": 12}
        assert loaded(texts, **options).input_ids == tokenizer(texts, **options).input_ids
