"""Found values -> a function over strings that puts their surrogates in place, JSON value by JSON value.

JSON keeps its layout and still parses: a value is decoded, changed and encoded as it was. The same walk says which
characters of a string would change. Knows neither messages nor how values are found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from training.findings import Finding, Kind, is_name
from training.surrogates import match_case
from training.word_lists import AMBIGUOUS_NAMES

MAX_DEPTH = 20
"""JSON in strings in JSON is followed to this depth."""

_HALF_OF_PAIR = re.compile("[\ud800-\udfff]")
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|-?\d+(?![\d.eE])')
_DATA_CHAR = re.compile("[0-9@]")
_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|[^\\]", re.S)
_LEFT, _RIGHT = r"(?:(?<![^\W_])|(?<=\\[nrt]))", r"(?![^\W_])"


class Span(NamedTuple):
    """Characters that are replaced, as offsets into the string they stand in."""

    start: int
    end: int
    kind: Kind


class Replacer:
    """Replaces the values of one session, the longest first."""

    def __init__(self, findings: Iterable[Finding], surrogates: Mapping[str, str]) -> None:
        """
        Args:
            surrogates: of every value; of names by their casefolded form.
        """
        kinds: dict[str, Kind] = {}
        names: set[tuple[str, bool]] = set()
        for finding in sorted(findings):
            if is_name(finding.kind):
                names.add((finding.value, finding.is_sure and finding.value.casefold() not in AMBIGUOUS_NAMES))
            else:
                kinds[finding.value] = finding.kind
        self._kinds, self._surrogates = kinds, surrogates
        patterns = [rf"{_LEFT}{re.escape(value)}{_RIGHT}" for value in sorted(kinds, key=lambda v: (-len(v), v))]
        patterns += sorted({_name_pattern(name, is_any) for name, is_any in names}, key=lambda p: (-len(p), p))
        self._pattern = re.compile("|".join(patterns)) if patterns else None
        self.restored: dict[str, str] = {}
        """Surrogates as they were written -> the values they stand for."""

    def replace(self, text: str) -> str:
        """`text` with every value replaced; JSON is changed value by value."""
        pattern = self._pattern
        if pattern is None or pattern.search(text) is None and "\\" not in text:
            return text
        return map_json(text, lambda plain: pattern.sub(self._surrogate_of, plain))

    def find_spans(self, text: str) -> list[Span]:
        """Which characters of `text` would be replaced."""
        return sorted(self._spans_in(text, 0))

    def _surrogate_of(self, match: re.Match[str]) -> str:
        value = match[0]
        if value in self._kinds:
            made = self._surrogates[value]
        else:
            made = match_case(self._surrogates[value.casefold()], value)
        self.restored[made] = value
        return made

    def _spans_in(self, text: str, depth: int) -> Iterator[Span]:
        if self._pattern is None:
            return
        if depth >= MAX_DEPTH or parse_container(text) is None:
            for match in self._pattern.finditer(text):
                yield Span(match.start(), match.end(), self._kinds.get(match[0], "FIRST_NAME"))
            return
        for token in _JSON_TOKEN.finditer(text):
            if not token[0].startswith('"'):
                yield from (
                    s._replace(start=s.start + token.start(), end=s.end + token.start())
                    for s in self._spans_in(token[0], depth)
                )
            elif not token[1] or is_data_key(token[0]):
                value, offsets = _decode(token[0][: len(token[0]) - len(token[1] or "")])
                for span in self._spans_in(value, depth + 1):
                    yield Span(token.start() + offsets[span.start], token.start() + offsets[span.end], span.kind)


def restore_text(text: str, mapping: Mapping[str, str]) -> str:
    """Undo `Replacer.replace` with the mapping it kept (surrogate as written -> value)."""
    if not mapping:
        return text
    values = "|".join(re.escape(made) for made in sorted(mapping, key=lambda v: (-len(v), v)))
    pattern = re.compile(rf"{_LEFT}(?:{values}){_RIGHT}")
    return map_json(text, lambda plain: pattern.sub(lambda match: mapping[match[0]], plain))


def map_json(text: str, change: Callable[[str], str], depth: int = 0) -> str:
    """`change` over plain text; JSON is changed value by value, so that its layout stays and it still parses."""
    if depth >= MAX_DEPTH or parse_container(text) is None:
        return change(text)

    def change_token(match: re.Match[str]) -> str:
        token = match[0]
        if not token.startswith('"'):
            return change(token)
        if match[1] and not is_data_key(token):
            return token
        end = len(token) - len(match[1] or "")
        value = json.loads(token[:end])
        changed = map_json(value, change, depth + 1)
        if changed == value:
            return token
        # An escaped half of a surrogate pair has no other form.
        is_ascii = token.isascii() or bool(_HALF_OF_PAIR.search(changed))
        return json.dumps(changed, ensure_ascii=is_ascii) + token[end:]

    return _JSON_TOKEN.sub(change_token, text)


def parse_container(text: str) -> dict[str, Any] | list[Any] | None:
    """The object or array that `text` is as a whole, or None."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def is_data_key(token: str) -> bool:
    """Whether an object's key is data, such as an id or an address, and no field name."""
    return _DATA_CHAR.search(token) is not None


def _decode(token: str) -> tuple[str, list[int]]:
    """A JSON string's value, and where each of its characters (and its end) stands in the token."""
    offsets: list[int] = []
    for match in _ESCAPE.finditer(token, 1, len(token) - 1):
        offsets.append(match.start())
    return json.loads(token), [*offsets, len(token) - 1]


def _name_pattern(name: str, is_any_case: bool) -> str:
    """Whole word, also as a part of an identifier; a name that may be a word too only as it was written.

    Short names are left alone in capitals, where they are codes more often than names, such as the airport MIA.
    """
    forms = {name, name.lower(), name.capitalize()} | ({name.upper()} if len(name) > 4 else set())
    if len(name) <= 2 or not is_any_case:
        low = re.escape(name.lower())
        return rf"{_LEFT}{re.escape(name)}{_RIGHT}|(?<=_){low}{_RIGHT}|(?<![^\W_]){low}(?=_)"
    return rf"{_LEFT}(?:{'|'.join(sorted(map(re.escape, forms)))}){_RIGHT}"
