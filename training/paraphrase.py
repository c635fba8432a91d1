"""Redacted passages reworded by a language model, so that style and rare detail go too; nothing an answer copies is lost.

Only free text of users and tools in which a value was replaced is reworded: never JSON, tool arguments or an answer. What
any answer of the session copies from a passage must still stand in it word for word, else the passage stays as it was.
Off unless a recipe asks for it. Knows neither how values are found nor which model answers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from training.replacing import parse_container

Paraphrase = Callable[[str], str]
"""A text -> the same reworded, for instance by the LLM node."""

_REWORDED_ROLES = ("user", "tool")


class Paraphraser:
    """Rewords the passages of sessions and counts what came of it."""

    def __init__(self, paraphrase: Paraphrase, keep_chars: int) -> None:
        """
        Args:
            keep_chars: a span of so many characters that a passage shares with an answer is protected.
        """
        self._paraphrase = paraphrase
        self._keep_chars = keep_chars
        self.counts: Counter[str] = Counter()

    def reword(
        self, turns: Sequence[tuple[dict[str, Any], dict[str, Any]]], changed: set[str]
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The turns with passages reworded, each distinct one once, the same in every call that repeats it.

        Args:
            changed: texts in which a value was replaced.
        """
        answers = _answers_of(turns)
        done: dict[str, str] = {}

        def reword_once(text: str) -> str:
            if text not in changed or parse_container(text) is not None:
                return text
            if text not in done:
                done[text] = self._try(text, answers)
            return done[text]

        return [
            ({**request, "messages": [_reworded(m, reword_once) for m in request.get("messages", ())]}, answer)
            for request, answer in turns
        ]

    def _try(self, text: str, answers: set[str]) -> str:
        changed = self._paraphrase(text)
        if changed.strip() and all(span in changed for span in copied_spans(text, answers, self._keep_chars)):
            self.counts["reworded"] += 1
            return changed
        self.counts["kept"] += 1
        return text


def copied_spans(text: str, answers: set[str], keep_chars: int) -> set[str]:
    """What answers copy from `text`: JSON values of any length, and longest shared spans of at least `keep_chars`."""
    spans: set[str] = set()
    for answer in answers:
        value = parse_container(answer)
        if value is None:
            spans.update(_shared_spans(text, answer, keep_chars))
        else:
            for leaf in _leaves(value):
                spans.update([leaf] if leaf in text else _shared_spans(text, leaf, keep_chars))
    return spans - {""}


def _answers_of(turns: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> set[str]:
    """Texts and arguments of every assistant message."""
    texts: set[str] = set()
    for request, answer in turns:
        for message in (*request.get("messages", ()), answer):
            if message.get("role", "assistant") == "assistant":
                content = message.get("content")
                texts.update([content] if isinstance(content, str) else [])
                calls = [call.get("function") or {} for call in message.get("tool_calls") or ()]
                arguments = [call.get("arguments") for call in (*calls, message.get("function_call") or {})]
                texts.update(value for value in arguments if isinstance(value, str))
    return texts


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        inner = parse_container(value)
        yield from [value] if inner is None else _leaves(inner)
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _shared_spans(text: str, answer: str, keep_chars: int) -> Iterator[str]:
    """Maximal spans of `text` that stand in `answer`, from left to right without overlap."""
    start = 0
    while start + keep_chars <= len(text):
        end = start + keep_chars
        if text[start:end] not in answer:
            start += 1
            continue
        while end < len(text) and text[start : end + 1] in answer:
            end += 1
        yield text[start:end]
        start = end


def _reworded(message: dict[str, Any], reword: Callable[[str], str]) -> dict[str, Any]:
    content = message.get("content")
    if message.get("role") not in _REWORDED_ROLES:
        return message
    if isinstance(content, str):
        return {**message, "content": reword(content)}
    if isinstance(content, list):
        return {**message, "content": [_reworded_part(part, reword) for part in content]}
    return message


def _reworded_part(part: Any, reword: Callable[[str], str]) -> Any:
    is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
    return {**part, "text": reword(part["text"])} if is_text else part
