"""Decide, from the train split, which parts of an answer are copied from the prompt, and write them as copy tokens.

A JSON field (or tool argument) is copied where most of its values stand verbatim in the prompt; a word of a text
answer is copied where it hardly ever appears in an answer without standing in the prompt. Prompt words that recur and
that no answer copies need no copy token, which halves a prompt and leaves the model fewer places to choose from. The
rule is needed in training only: reading copy tokens back needs none (cluster/prompts.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.answers import json_value, read_calls, to_text
from cluster.prompts import Prompt, Word, find_words, word_key
from cluster.records import AnswerKind, Record

_MIN_COPIED_SHARE = 0.7
_MIN_COPIED_WORD_SHARE = 0.95
_MIN_PLAIN_PROMPTS = 8
"""A word that no answer copied in this many prompts needs no copy token."""
_LONGEST_RUN = 8
"""Words; the longest run a text answer copies at once."""
_MARK = re.compile('"\ue000([0-9]+),([0-9]+)n\ue001"|\ue000([0-9]+),([0-9]+)\ue001')
"""Private-use characters hold a copied leaf's place while JSON is written."""


class CopyRule(Record):
    """Which fields (JSON, tool calls) or words (text) of a task's answers are copied."""

    kind: AnswerKind
    fields: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()
    """Words of text answers that are NOT copied: seen in answers whose prompt does not hold them."""


def fit_copy_rule(kind: AnswerKind, pairs: Iterable[tuple[Prompt, dict[str, Any]]]) -> CopyRule:
    """Fit on (rendered prompt, target message) pairs of the train split."""
    seen: Counter[str] = Counter()
    copied: Counter[str] = Counter()
    for prompt, target in pairs:
        spans = _Spans(prompt.words)
        if kind in ("json", "tool_call"):
            # An absent value says nothing of where the present ones come from.
            found = [(path, spans.find(_plain(leaf))) for path, leaf in _leaves(_value(target)) if _plain(leaf)]
        elif kind == "text":
            found = _copied_words(to_text(target), spans)
        else:
            found = []
        seen.update({name for name, _ in found})
        copied.update({name for name, span in found if span})
    if kind == "text":
        return CopyRule(kind=kind, words=frozenset(w for w in seen if copied[w] < _MIN_COPIED_WORD_SHARE * seen[w]))
    return CopyRule(kind=kind, fields=frozenset(f for f in seen if copied[f] >= _MIN_COPIED_SHARE * seen[f]))


def point(target: dict[str, Any], prompt: Prompt, rule: CopyRule) -> list[str | int]:
    """The target's text as pieces: strings to spell and word numbers to point at (one, or first and last)."""
    spans = _Spans(prompt.words)
    if rule.kind == "text":
        return [piece for piece in _point_text(to_text(target), spans, rule) if piece != ""]
    is_plain = rule.kind == "label" or not rule.fields or _value(target) is None
    # An answer that says a mark itself would be cut there.
    if is_plain or "\ue000" in to_text(target):
        return [to_text(target)]
    return _split_marks(to_text(_message_of(_mark(_value(target), "", spans, rule), target)))


def fit_plain_words(pairs: Iterable[tuple[Prompt, dict[str, Any]]], rule: CopyRule) -> tuple[str, ...]:
    """Keys of the words that recur in the prompts and that no answer copies, sorted.

    Args:
        pairs: as in `fit_copy_rule`, rendered without plain words.
    """
    seen: Counter[str] = Counter()
    needed: set[str] = set()
    for prompt, target in pairs:
        keys = {number: word_key(w.text[w.begin : w.end]) for number, w in prompt.words.items()}
        seen.update(set(keys.values()))
        numbers = [piece for piece in point(target, prompt, rule) if isinstance(piece, int)]
        needed.update(keys[number] for number in numbers)
    return tuple(sorted(key for key, n in seen.items() if n >= _MIN_PLAIN_PROMPTS and key not in needed))


class _Spans:
    """Looks up which words of a prompt spell a given text, later messages and earlier places first."""

    def __init__(self, words: dict[int, Word]) -> None:
        self._segments: dict[int, tuple[str, dict[int, int], dict[int, int]]] = {}
        for number, word in words.items():
            _, begins, ends = self._segments.setdefault(word.message, (word.text, {}, {}))
            begins[word.begin], ends[word.end] = number, number

    def find(self, value: str) -> tuple[int, int] | None:
        if not value:
            return None
        for text, begins, ends in reversed(list(self._segments.values())):
            at = text.find(value)
            while at >= 0:
                if at in begins and at + len(value) in ends:
                    return begins[at], ends[at + len(value)]
                at = text.find(value, at + 1)
        return None


def _value(target: dict[str, Any]) -> Any:
    """The structure whose leaves may be copied: parsed arguments by tool name, or the parsed JSON content."""
    calls = read_calls(target)
    if not calls:
        return json_value(to_text(target))
    return [{call["name"]: call["arguments"]} for call in calls]


def _message_of(value: Any, target: dict[str, Any]) -> dict[str, Any]:
    if not target.get("tool_calls"):
        return {"role": "assistant", "content": json.dumps(value, ensure_ascii=False)}
    calls = [
        {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        for call in value
        for name, arguments in call.items()
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, f"{path}[]")
    else:
        yield path, value


def _mark(value: Any, path: str, spans: _Spans, rule: CopyRule) -> Any:
    if isinstance(value, dict):
        return {key: _mark(inner, f"{path}.{key}", spans, rule) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mark(inner, f"{path}[]", spans, rule) for inner in value]
    span = spans.find(_plain(value)) if path in rule.fields else None
    if span is None:
        return value
    return f"\ue000{span[0]},{span[1]}{'' if isinstance(value, str) else 'n'}\ue001"


def _plain(leaf: Any) -> str:
    return leaf if isinstance(leaf, str) else json.dumps(leaf) if isinstance(leaf, int | float) else ""


def _split_marks(text: str) -> list[str | int]:
    """Cut text at its marks; a number's mark also takes the quotes that stand around it."""
    pieces: list[str | int] = []
    at = 0
    for match in _MARK.finditer(text):
        begin, end = match.group(1, 2) if match[1] else match.group(3, 4)
        pieces += [text[at : match.start()], *_span_pieces(int(begin), int(end))]
        at = match.end()
    return [piece for piece in [*pieces, text[at:]] if piece != ""]


def _span_pieces(begin: int, end: int) -> list[int]:
    return [begin] if begin == end else [begin, end]


def _runs(text: str, spans: _Spans, closed: frozenset[str]) -> Iterator[tuple[Word, Word, tuple[int, int] | None]]:
    """Walk the words of `text`: at each, the longest run that stands together in the prompt, as (first, last, span)."""
    words = find_words(text)
    k = 0
    while k < len(words):
        span, stop = None, k
        for end in range(k, min(k + _LONGEST_RUN, len(words))):
            if text[words[end].begin : words[end].end] in closed:
                break
            found = spans.find(text[words[k].begin : words[end].end])
            span, stop = (found, end) if found else (span, stop)
        yield words[k], words[stop], span
        k = stop + 1


def _copied_words(text: str, spans: _Spans) -> list[tuple[str, tuple[int, int] | None]]:
    found = []
    for first, last, span in _runs(text, spans, frozenset()):
        found += [
            (text[w.begin : w.end], span) for w in find_words(text) if first.begin <= w.begin and w.end <= last.end
        ]
    return found


def _point_text(text: str, spans: _Spans, rule: CopyRule) -> Iterator[str | int]:
    at = 0
    for first, last, span in _runs(text, spans, rule.words):
        if span is not None:
            yield text[at : first.begin]
            yield from _span_pieces(*span)
            at = last.end
    yield text[at:]
