"""The log-probabilities that captured answers carry, as the provider gave them -> targets in the tokens of a base.

A provider that was asked for `logprobs` and `top_logprobs` tells of each token of its answer which ones were likeliest there
(OpenAI chat.completions, https://platform.openai.com/docs/api-reference/chat/object, choices[].logprobs.content). A base
can learn from them where its tokenizer cuts the same text into the same bytes. Elsewhere nothing is guessed: the caller
is told, and the answer is learned as it is. Of the likeliest tokens those that the base does not have are left out.
Tokens are compared as bytes, so a tokenizer must be byte-level (GPT-2, Llama 3, Qwen, SmolLM), or no answer fits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Target(NamedTuple):
    """What was likeliest at one token's place; both empty where nothing is known."""

    ids: list[int]
    logprobs: list[float]


NO_TARGET = Target([], [])
Stored = list[tuple[str, list[tuple[str, float]]]]
"""Tokens of an answer as hex bytes, each with (hex bytes, natural log-probability) of the likeliest at its place."""


def read_logprobs(content: Any) -> Stored | None:
    """Read `choices[].logprobs.content`; the token that was said counts among the likeliest.

    Returns:
        None where it is not of OpenAI's shape, or names no alternatives.
    """
    if not isinstance(content, list) or not content:
        return None
    stored: Stored = []
    for token in content:
        said = _read_token(token)
        others = token.get("top_logprobs") if said else None
        if not said or not isinstance(others, list) or not others:
            return None
        top = dict([said])
        for other in map(_read_token, others):
            if other is None:
                return None
            top.setdefault(*other)
        stored.append((said[0], list(top.items())))
    return stored


class Vocabulary:
    """The tokens of a byte-level tokenizer as bytes."""

    def __init__(self, tokenizer: Any) -> None:
        decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
        kinds = {decoder.get("type"), *(one.get("type") for one in decoder.get("decoders", []))}
        self._bytes: dict[int, bytes] = {}
        if "ByteLevel" not in kinds:
            return
        byte_of = {char: byte for byte, char in _byte_chars().items()}
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        for text, number in tokenizer.get_vocab().items():
            if number in added:
                self._bytes[number] = added[number].encode()
            elif all(char in byte_of for char in text):
                self._bytes[number] = bytes(byte_of[char] for char in text)
        # Of tokens that say the same the first one; what is said must be an ordinary token where there is one.
        order = sorted(self._bytes, key=lambda number: (number in added, number))
        self._numbers: dict[bytes, int] = {}
        for number in order:
            self._numbers.setdefault(self._bytes[number], number)

    def map_answer(self, stored: Stored, ids: Sequence[int]) -> list[Target] | None:
        """Targets for an answer's tokens.

        Args:
            ids: with the end token, which a provider may leave out; its target is empty then.

        Returns:
            One for each of `ids`, or None where the tokens are others.
        """
        own = [self._bytes.get(number) for number in ids]
        said = [bytes.fromhex(text) for text, _ in stored]
        if None in own or said not in (own, own[:-1]):
            return None
        targets = [self._target(top) for _, top in stored]
        return [*targets, *[NO_TARGET] * (len(ids) - len(targets))]

    def _target(self, top: list[tuple[str, float]]) -> Target:
        found = {self._numbers[data]: value for text, value in top if (data := bytes.fromhex(text)) in self._numbers}
        return Target(list(found), list(found.values()))


def _read_token(token: Any) -> tuple[str, float] | None:
    """(bytes as hex, log-probability)."""
    if not isinstance(token, dict) or not isinstance(token.get("token"), str):
        return None
    value, data = token.get("logprob"), token.get("bytes")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if data is None:
        return token["token"].encode(errors="surrogatepass").hex(), float(value)
    is_bytes = isinstance(data, list) and all(isinstance(one, int) and 0 <= one < 256 for one in data)
    return (bytes(data).hex(), float(value)) if is_bytes else None


def _byte_chars() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary: itself where it is printable in Latin-1, the
    others in order from U+0100 (GPT-2's encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    chars = {byte: chr(byte) for byte in printable}
    rest = (byte for byte in range(256) if byte not in chars)
    return chars | {byte: chr(0x100 + number) for number, byte in enumerate(rest)}
