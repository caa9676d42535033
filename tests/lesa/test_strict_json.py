"""JSON with one meaning: what is refused in any document; tests/attacks has the same inside bundles."""

from __future__ import annotations

import json

import pytest

from lesa.strict_json import MAX_DEPTH, MAX_STRING, StrictJsonError, parse


def refusal(data: bytes, **settings: bool) -> str:
    with pytest.raises(StrictJsonError) as caught:
        parse(data, max_bytes=1 << 20, **settings)
    return str(caught.value)


def test_values_come_back_as_they_were_written():
    value = {"a": [1, -2.5, 1e300, True, None, "ü"], "b": {"c": {}}, "d": 2**53 - 1, "e": -0.0}
    assert parse(json.dumps(value).encode(), max_bytes=1 << 20) == value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "number 1e999 is not finite"),
        (b'{"a": 9007199254740992}', "outside what JSON readers agree on"),
        (b'{"a": -0}', "-0 is not an integer"),
        (b"[1]", "must be an object, got list"),
        (b'{"a": ', "not JSON at line 1"),
        (b'{"a": "\xff"}', "not UTF-8 at byte"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested deeper than 12 at a"),
        (b'{"a": "' + b"x" * (MAX_STRING + 1) + b'"}', "text of 4097 characters at a"),
        (b" " * (1 << 20) + b"{}", "1048578 bytes, at most 1048576 are read"),
    ],
)
@pytest.mark.parametrize("printable", [True, False])
def test_what_has_no_single_meaning_is_refused(data, words, printable):
    assert words in refusal(data, printable=printable)


@pytest.mark.parametrize("character", ["\u001b", "\u200d", "\u202e", "\n"])
def test_characters_that_rewrite_a_terminal_are_refused_where_they_could_be_shown(character):
    for value in ({"a": {"b": f"x{character}"}}, {f"x{character}": 1}, {"a": [f"x{character}"]}):
        data = json.dumps(value).encode()
        assert "control characters" in refusal(data)
        assert parse(data, max_bytes=1 << 20, printable=False) == value


def test_half_a_surrogate_pair_is_no_text():
    assert "control characters" in refusal(b'{"a": "\\ud800"}', printable=False)
