"""cluster/json_text.py: the fast way reads and writes what the standard library does, and what it refuses is read by it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.json_text import read_json, write_json

SEEDS = (
    b'{"a":1,"b":[1.5e3,-0,0.0,true,false,null],"c":"x\\u00e9\\n\\"\\\\/ \xc3\xa9","d":{"e":{}}}',
    b'{"messages":[{"role":"user","content":"hi\\ud83d\\ude00"}],"n":12345678901234567890123,"t":1e-7}',
    b'{"a":NaN,"b":[-Infinity,1e999],"c":"\\ud800","a":2}',
)
PIECES = st.one_of(
    st.binary(max_size=2), st.sampled_from([b"NaN", b"\\ud800", b"\xed\xa0\x80", b'"', b"1.", b"0", b"{"])
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def refuse(name: str) -> Any:
    raise ValueError(name)


def outcome(read: Any) -> str:
    try:
        return json.dumps(read(), sort_keys=True)
    except ValueError:
        return "refused"


@given(st.sampled_from(SEEDS), st.integers(0, 120), st.integers(0, 3), PIECES)
def test_bytes_are_read_as_the_standard_library_reads_them(seed: bytes, at: int, num_cut: int, piece: bytes) -> None:
    raw = seed[:at] + piece + seed[at + num_cut :]
    assert outcome(lambda: read_json(raw, is_strict=False)) == outcome(lambda: json.loads(raw))
    strictly = outcome(lambda: json.loads(raw.decode(), parse_constant=refuse))
    assert outcome(lambda: read_json(raw, is_strict=True)) == strictly


@given(VALUES)
def test_values_come_back_as_they_were_written(value: Any) -> None:
    written = write_json(value)
    assert json.dumps(json.loads(written.decode())) == json.dumps(value)


def test_halves_of_surrogate_pairs_and_deep_nesting_are_left_to_the_standard_library() -> None:
    assert write_json({"a": "\ud800"}) == b'{"a":"\\ud800"}' and read_json(b'"\\ud800"', is_strict=True) == "\ud800"
    deep = b"[" * 400 + b"]" * 400
    assert read_json(deep, is_strict=True) == json.loads(deep)
    with pytest.raises(RecursionError):
        read_json(b"[" * 100_000, is_strict=False)
