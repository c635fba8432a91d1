"""Chunks of one streamed answer, as they come -> the chat.completion that the unary call would have given.

Reading is lenient: servers leave out indexes, repeat ids, split surrogate pairs and add fields of their own. Knows
nothing of bytes, clients or upstreams. Source: OpenAI API reference, the chat completion chunk object.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_NOT_OF_UNARY = frozenset({"object", "choices", "obfuscation"})
"""Fields of a chunk that a whole completion has not, or has otherwise."""
_CHOICE_FIELDS = frozenset({"index", "delta", "message", "finish_reason", "logprobs"})


class _Pieces(list[str]):
    """A text that is still coming."""


class Reassembler:
    """Puts one answer together. A cut stream gives what arrived: a choice without its end has finish_reason None."""

    def __init__(self, num_choices: int = 1) -> None:
        """Take how many choices the request asks for."""
        self.has_error = False
        """Whether the LLM reported an error within the stream."""
        self._num_choices = num_choices
        self._fields: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    @property
    def is_finished(self) -> bool:
        """Whether every choice that was asked for has its end; counts and `[DONE]` may still come."""
        num_ended = sum(choice["finish_reason"] is not None for choice in self._choices.values())
        return num_ended >= self._num_choices

    @property
    def has_end(self) -> bool:
        """Whether some choice has its end."""
        return any(choice["finish_reason"] is not None for choice in self._choices.values())

    def add(self, chunk: dict[str, Any]) -> None:
        """Take the next chunk."""
        for key, value in chunk.items():
            if key not in _NOT_OF_UNARY and (value is not None or key not in self._fields):
                self._fields[key] = value
        self.has_error = self.has_error or chunk.get("error") is not None
        for part in _dicts(chunk.get("choices")):
            index = part.get("index") if isinstance(part.get("index"), int) else 0
            choice = self._choices.get(index)
            if choice is None:
                choice = {"index": index, "message": {}, "finish_reason": None, "tool_calls": _ToolCalls()}
                self._choices[index] = choice
            if not _has_appended(choice, part):
                _merge_choice(choice, part)

    def body(self) -> dict[str, Any] | None:
        """The completion so far; None where nothing has come."""
        if not self._fields and not self._choices:
            return None
        choices = [_finish_choice(self._choices[index]) for index in sorted(self._choices)]
        return {"object": "chat.completion", **self._fields, "choices": choices}


def reassemble(chunks: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The completion of all chunks of one stream; None where there are none."""
    parts = Reassembler()
    for chunk in chunks:
        parts.add(chunk)
    return parts.body()


class _ToolCalls:
    """The tool calls of one choice; parts of several may come interleaved."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, dict[str, Any]]] = []
        """(index, call) in order of arrival."""

    def add(self, part: dict[str, Any]) -> None:
        index, call = self._call_of(part)
        if call is None:
            call = {}
            self._calls.append((index, call))
        for key, value in part.items():
            if isinstance(value, dict):
                # `function` or `custom`: its name comes whole, its arguments in pieces.
                nested = call.setdefault(key, {})
                if isinstance(nested, dict):
                    _merge_texts(nested, value, ("name",))
            elif key != "index":
                _merge_texts(call, {key: value}, (key,))

    def finished(self) -> list[dict[str, Any]]:
        ordered = sorted(self._calls, key=lambda pair: pair[0])
        return [{"type": "function", **_joined(call)} for _, call in ordered]

    def _call_of(self, part: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """The call that a part goes on with, or None and the index of a new one.

        Some servers number every call 0 and some leave the number out: then another id, or a second name, begins a
        call, and anything else continues the last one.
        """
        index, call_id = part.get("index"), part.get("id")
        if isinstance(index, int):
            known = [call for number, call in self._calls if number == index]
            is_other = bool(known and call_id and known[-1].get("id") and known[-1]["id"] != call_id)
            return index, None if is_other or not known else known[-1]
        last_index, last = self._calls[-1] if self._calls else (-1, None)
        if call_id:
            same = [pair for pair in self._calls if pair[1].get("id") == call_id]
            return same[-1] if same else (self._next_index(), None)
        begins = last is None or (bool(_name_of(part)) and bool(_name_of(last)))
        return (self._next_index(), None) if begins else (last_index, last)

    def _next_index(self) -> int:
        return max((index for index, _ in self._calls), default=-1) + 1


def _has_appended(choice: dict[str, Any], part: dict[str, Any]) -> bool:
    """Append what nearly all parts are, more of a text and nothing else; False leaves it to `_merge_choice`."""
    delta = part.get("delta")
    if type(delta) is not dict or len(delta) != 1 or part.get("finish_reason") or part.get("logprobs"):
        return False
    text, begun = delta.get("content"), choice["message"].get("content")
    if type(text) is not str or type(begun) is not _Pieces or not part.keys() <= _CHOICE_FIELDS:
        return False
    if "logprobs" in part:
        choice.setdefault("logprobs", None)
    begun.append(text)
    return True


def _merge_choice(choice: dict[str, Any], part: dict[str, Any]) -> None:
    if part.get("finish_reason"):
        choice["finish_reason"] = part["finish_reason"]
    if "logprobs" in part:
        _merge_logprobs(choice, part["logprobs"])
    for key, value in part.items():
        if key not in _CHOICE_FIELDS and key != "tool_calls" and (value is not None or key not in choice):
            choice[key] = value
    delta = part.get("delta")
    for key, value in (delta if isinstance(delta, dict) else {}).items():
        if key == "tool_calls":
            for call in _dicts(value):
                choice["tool_calls"].add(call)
        elif key == "function_call" and isinstance(value, dict):
            called = choice["message"].get(key)
            if not isinstance(called, dict):
                called = choice["message"][key] = {}
            _merge_texts(called, value, ("name",))
        else:
            _merge_texts(choice["message"], {key: value}, ("role",))


def _merge_logprobs(choice: dict[str, Any], part: Any) -> None:
    joined = choice.setdefault("logprobs", None)
    if not isinstance(part, dict):
        return
    if joined is None:
        joined = choice["logprobs"] = {}
    for key, items in part.items():
        if isinstance(items, list) and isinstance(joined.get(key), list):
            joined[key] += items
        elif items is not None or key not in joined:
            joined[key] = list(items) if isinstance(items, list) else items


def _merge_texts(target: dict[str, Any], part: dict[str, Any], whole: tuple[str, ...]) -> None:
    """Append texts and lists; values under the keys in `whole`, and of other types, replace the earlier ones."""
    for key, value in part.items():
        old = target.get(key)
        if isinstance(value, str) and key not in whole:
            if isinstance(old, _Pieces):
                old.append(value)
            else:
                target[key] = _Pieces([value])
        elif isinstance(value, list):
            target[key] = [*old, *value] if type(old) is list else list(value)
        elif value is not None or key not in target:
            target[key] = value


def _finish_choice(choice: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": None, **_joined(choice["message"])}
    if calls := choice["tool_calls"].finished():
        message["tool_calls"] = calls
    if calls or message.get("refusal") or message.get("function_call"):
        # A stream opens with an empty text whatever follows; a whole answer has none beside these.
        message["content"] = message["content"] or None
    return {**{key: value for key, value in choice.items() if key != "tool_calls"}, "message": message}


def _joined(value: dict[str, Any]) -> dict[str, Any]:
    """A copy with the texts that came in pieces."""
    joined: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, _Pieces):
            item = _text("".join(item))
        joined[key] = _joined(item) if isinstance(item, dict) else item
    return joined


def _text(text: str) -> str:
    """Put halves of surrogate pairs together that came in two chunks, as servers with UTF-16 strings cut them."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _name_of(call: dict[str, Any]) -> Any:
    function = call.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
