"""Conversations -> the same conversations with personal values replaced by made-up ones of the same shape.

What is found anywhere in a session is replaced everywhere in it: across turns, inside JSON however deep, in tool
arguments and in the answer to learn. So tool calls still parse, JSON keeps its layout, and what a model must copy stays
copyable. System prompts and tool definitions are the agent's own text: they are not searched, but a value that is
found elsewhere in the session is replaced in the system prompt too. Each distinct string is searched once.
Surrogates cannot be undone without the key.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.config import Config
from training.recognisers import AMBIGUOUS_NAMES, Finding, build_analyzer, find_keyed, find_values
from training.surrogates import SurrogateMaker, is_name, match_case

Turn = tuple[dict[str, Any], dict[str, Any]]
"""A request and the assistant message that answers it."""

MAX_CACHED_STRINGS = 200_000
MAX_DEPTH = 20
"""JSON in strings in JSON is followed to this depth."""
_STRUCTURE = frozenset({"role", "type", "id", "tool_call_id", "name", "image_url", "input_audio", "file"})
"""Fields of a message that carry no text of the conversation."""


class RedactConfig(Config):
    """How personal values are found."""

    spacy_model: str | None = None
    """Installed spaCy model whose person names are added to those found by list, key and context; None: no model."""


class Redactor:
    """Replaces personal values. Not for several threads; memory grows with distinct strings up to a bound."""

    def __init__(self, config: RedactConfig, key: bytes) -> None:
        """
        Args:
            key: secret; equal keys give equal surrogates.

        Raises:
            ConfigError: the spaCy model is not installed.
        """
        self._key = key
        self._analyze = build_analyzer(config.spacy_model)
        self._cache: dict[str, frozenset[Finding]] = {}

    def redact_session(self, turns: Sequence[Turn], scope: str) -> tuple[list[Turn], Counter[str]]:
        """All calls of one session, so that what one call reveals is replaced in the others too.

        Args:
            scope: client and session; the same value has the same surrogate inside it and unrelated ones elsewhere.

        Returns:
            The turns with new messages (unchanged objects where nothing was found), and distinct values by kind.
        """
        messages = [m for request, answer in turns for m in (*request.get("messages", ()), answer)]
        texts = {id(m): m for m in messages if m.get("role") not in ("system", "developer")}
        findings = {finding for message in texts.values() for finding in self._find_in_message(message)}
        if not findings:
            return list(turns), Counter()
        replace = _build_replacer(findings, SurrogateMaker(self._key, scope))
        done: dict[str, str] = {}

        def replace_once(text: str) -> str:
            if text not in done:
                done[text] = _replace_in_string(text, replace)
            return done[text]

        redacted = [
            (
                {**request, "messages": [_map_strings(m, replace_once) for m in request.get("messages", ())]},
                _map_strings(answer, replace_once),
            )
            for request, answer in turns
        ]
        kinds = {(finding.value, "PERSON" if is_name(finding.kind) else finding.kind) for finding in findings}
        return redacted, Counter(kind for _, kind in kinds)

    def _find_in_message(self, message: dict[str, Any]) -> Iterator[Finding]:
        for text in _strings_of(message):
            known = self._cache.get(text)
            if known is None:
                if len(self._cache) >= MAX_CACHED_STRINGS:
                    self._cache.clear()
                known = self._cache[text] = frozenset(self._find_in_string(text, 0))
            yield from known

    def _find_in_string(self, text: str, depth: int) -> Iterator[Finding]:
        value = _parse_container(text) if depth < MAX_DEPTH else None
        if value is None:
            yield from find_values(text, self._analyze)
        else:
            for key, leaf in _leaves_of(value):
                yield from find_keyed(key, leaf)
                # A text this short holds no pattern; names need their key.
                if isinstance(leaf, str) and len(leaf) >= 6:
                    yield from self._find_in_string(leaf, depth + 1)


def _leaves_of(value: Any) -> Iterator[tuple[str, str | int]]:
    """Strings and integers of a JSON value with the field they stand in; a list's items stand in the list's field."""
    todo = [("", value)]
    while todo:
        key, item = todo.pop()
        if isinstance(item, dict):
            todo.extend(item.items())
        elif isinstance(item, list):
            todo.extend((key, part) for part in item)
        elif isinstance(item, str | int) and not isinstance(item, bool):
            yield key, item


def _parse_container(text: str) -> dict[str, Any] | list[Any] | None:
    """The object or array that `text` is as a whole, or None."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _strings_of(value: Any) -> Iterator[str]:
    """The text of a message: contents, parts and arguments, not its structure."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _STRUCTURE:
                yield from _strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings_of(item)


def _map_strings(value: Any, replace: Callable[[str], str]) -> Any:
    """A message with `replace` applied to what `_strings_of` yields."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {key: item if key in _STRUCTURE else _map_strings(item, replace) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, replace) for item in value]
    return value


def _build_replacer(findings: set[Finding], maker: SurrogateMaker) -> Callable[[str], str]:
    """A function that replaces every found value in plain text, the longest first."""
    surrogates = maker.make(findings)
    names = {(f.value, f.is_sure and f.value.casefold() not in AMBIGUOUS_NAMES) for f in findings if is_name(f.kind)}
    values = {finding.value for finding in findings if not is_name(finding.kind)}
    patterns = [rf"(?<![^\W_]){re.escape(value)}(?![^\W_])" for value in sorted(values, key=lambda v: (-len(v), v))]
    patterns += sorted({_name_pattern(name, is_any_case) for name, is_any_case in names}, key=lambda p: (-len(p), p))
    pattern = re.compile("|".join(patterns))

    def replace(match: re.Match[str]) -> str:
        found = match[0]
        return surrogates[found] if found in values else match_case(surrogates[found.casefold()], found)

    return lambda text: pattern.sub(replace, text)


def _name_pattern(name: str, is_any_case: bool) -> str:
    """Whole word, also as a part of an identifier; a name that may be a word too only as it was written.

    Short names are left alone in capitals, where they are codes more often than names, such as the airport MIA.
    """
    forms = {name, name.lower(), name.capitalize()} | ({name.upper()} if len(name) > 4 else set())
    if len(name) <= 2 or not is_any_case:
        low = re.escape(name.lower())
        return rf"(?<![^\W_]){re.escape(name)}(?![^\W_])|(?<=_){low}(?![^\W_])|(?<![^\W_]){low}(?=_)"
    return rf"(?<![^\W_])(?:{'|'.join(sorted(map(re.escape, forms)))})(?![^\W_])"


_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|-?\d+(?![\d.eE])')


def _replace_in_string(text: str, replace: Callable[[str], str], depth: int = 0) -> str:
    """Like `replace`, but JSON is changed value by value, so that its layout stays and it still parses."""
    if depth >= MAX_DEPTH or _parse_container(text) is None:
        return replace(text)

    def replace_token(match: re.Match[str]) -> str:
        token = match[0]
        if not token.startswith('"'):
            return replace(token)
        if match[1] and not _is_data_key(token):
            return token
        end = len(token) - len(match[1] or "")
        value = json.loads(token[:end])
        changed = _replace_in_string(value, replace, depth + 1)
        if changed == value:
            return token
        # An escaped half of a surrogate pair has no other form.
        is_ascii = token.isascii() or bool(_SURROGATE.search(changed))
        return json.dumps(changed, ensure_ascii=is_ascii) + token[end:]

    return _JSON_TOKEN.sub(replace_token, text)


def _is_data_key(token: str) -> bool:
    """Whether an object's key is data, such as an id or an address, and no field name."""
    return any(c.isdigit() or c == "@" for c in token)
