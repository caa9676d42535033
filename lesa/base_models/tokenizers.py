"""CLIP, T5, Llama and Qwen tokenizers whose vocabulary is a data set's prompt language, one token a word.

They are transformers' own classes, so that a saved pipeline needs nothing of ours to read a prompt. The last two know
the words of a pipeline's template as well: it is cut off by its number of tokens, which is the real tokenizers'.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from string import ascii_letters, ascii_lowercase, digits

from transformers import CLIPTokenizer, LlamaTokenizerFast, Qwen2Tokenizer, T5Tokenizer

from lesa.base_models.data_sets import DataSet

_QWEN_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_LLAMA_SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_MARKS = ",.:;()'!?-"


def build_clip_tokenizer(data_set: DataSet, length: int) -> CLIPTokenizer:
    """A byte-pair tokenizer whose merges spell out exactly the vocabulary's words.

    Letters stay in it, so a word outside the language is spelt, as a real CLIP tokenizer would.
    """
    merges = _learn_merges([[*word[:-1], f"{word[-1]}</w>"] for word in data_set.language.vocabulary()])
    tokens = [letter + end for end in ("", "</w>") for letter in (*ascii_lowercase, ",")]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def build_t5_tokenizer(data_set: DataSet) -> T5Tokenizer:
    """A unigram tokenizer with one piece a word; letters are not in it, so unknown words are `<unk>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("," if word == "," else f"▁{word}", -1.0) for word in data_set.language.vocabulary()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=data_set.text_length)


def build_qwen_tokenizer(data_set: DataSet, template: str) -> Qwen2Tokenizer:
    """Byte pairs that make every word of the language and of the pipeline's template one token."""
    words = _words(data_set, template)
    merges = _learn_merges([[*start, *word] for word in words for start in ("", "Ġ")])
    letters = [*ascii_letters, *digits, *_MARKS, "Ġ", "Ċ"]
    tokens = ["<|endoftext|>", *_QWEN_SPECIAL, *letters, *(first + second for first, second in merges)]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        additional_special_tokens=list(_QWEN_SPECIAL),
    )


def build_llama_tokenizer(data_set: DataSet, template: str) -> LlamaTokenizerFast:
    """Byte pairs that make every word of the language and of the pipeline's template one token."""
    words = _words(data_set, template)
    merges = _learn_merges([[*start, *word] for word in words for start in ("", "▁")])
    letters = [*ascii_letters, *digits, *_MARKS, "▁", "\n"]
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *_LLAMA_SPECIAL, *letters]
    tokens += [first + second for first, second in merges]
    return LlamaTokenizerFast(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        pad_token="<pad>",
        padding_side="right",
        additional_special_tokens=list(_LLAMA_SPECIAL),
        add_prefix_space=False,
    )


def _words(data_set: DataSet, template: str) -> list[str]:
    known = {*data_set.language.vocabulary(), *re.findall(r"[A-Za-z]+", template)}
    return sorted(word for word in known if word != ",")


def _learn_merges(spelt: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges in order of rank, most frequent pair first, until every word, given as its symbols, is one."""
    # The tokenizers library's own trainer numbers tokens in hash order, which differs between processes.
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for symbols in spelt for pair in pairwise(symbols))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelt = [_merge(symbols, best) for symbols in spelt]


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
