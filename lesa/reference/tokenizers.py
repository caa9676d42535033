"""CLIP and T5 tokenizers whose vocabulary is a data set's prompt language, one token a word.

They are transformers' own classes, so that a saved pipeline needs nothing of ours to read a prompt.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from string import ascii_lowercase

from transformers import CLIPTokenizer, T5Tokenizer

from lesa.reference.data_sets import DataSet


def build_clip_tokenizer(data_set: DataSet) -> CLIPTokenizer:
    """A byte-pair tokenizer whose merges spell out exactly the vocabulary's words.

    Letters stay in it, so a word outside the language is spelt, as a real CLIP tokenizer would.
    """
    merges = _learn_merges(data_set.language.vocabulary())
    tokens = [letter + end for end in ("", "</w>") for letter in (*ascii_lowercase, ",")]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=data_set.clip_length)


def build_t5_tokenizer(data_set: DataSet) -> T5Tokenizer:
    """A unigram tokenizer with one piece a word; letters are not in it, so unknown words are `<unk>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("," if word == "," else f"▁{word}", -1.0) for word in data_set.language.vocabulary()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=data_set.t5_length)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges in order of rank, most frequent pair first, until every word is one token."""
    # The tokenizers library's own trainer numbers tokens in hash order, which differs between processes.
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
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
