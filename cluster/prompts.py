"""AgentCall <-> the exact token ids a specialist sees and the text it says: one rendering for training and serving.

Two formats. `chat` is the base model's own chat template over the whole request. `compact` is for bases trained
from scratch: sentences and lines that every prompt of the task repeats are left out (the weights know the task), and every word
of the remaining text is followed by a copy token, so that an answer can point at words instead of spelling them:
`{"order_id":"` copy-5 `"}`. Copy token i stands for word i; two in a row, i then j, for the text from word i
through word j. What a fresh value looks like then does not matter, only where it stands.

Knows nothing of how a model is trained or served. Special tokens in the text of a request are plain text here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from cluster.answers import to_message
from cluster.errors import InputError
from cluster.records import AnswerKind, Record

RENDERING_VERSION = 1
"""Part of every engine fingerprint: raise it when the same request would give other token ids."""

NUM_COPY_TOKENS = 256
ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "developer", "user", "assistant", "tool", "function")}
ANSWER_TOKEN, END_TOKEN, PAD_TOKEN = "<|answer|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (
    PAD_TOKEN,
    END_TOKEN,
    ANSWER_TOKEN,
    *ROLE_TOKENS.values(),
    *(f"<|copy{i}|>" for i in range(NUM_COPY_TOKENS)),
)

_UNIT_END = re.compile(r"((?<=[.!?])\s+|\s*\n\s*)")
_WORD = re.compile(r"\w+(?:[-_./:@'+]\w+)*")
_JSON_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|-?\d+(?:\.\d+)?')
_LONGEST_JSON_WORD = 64
"""Characters; a longer JSON string is prose and is split into its words."""


class PromptFormat(Record):
    """How one specialist reads requests; stored with it and part of what its gate holds for."""

    kind: Literal["chat", "compact"]
    answer_kind: AnswerKind
    static_lines: tuple[str, ...] = ()
    """Left out of a compact prompt."""
    max_prompt_tokens: int
    """A longer prompt is not for this specialist: the call goes to the LLM."""


class Word(NamedTuple):
    """A piece of prompt text that an answer can point at: `text[begin:end]`."""

    text: str
    begin: int
    end: int


class Prompt(NamedTuple):
    """Token ids of a rendered request, and the words its copy tokens stand for."""

    ids: list[int]
    words: list[Word]


def render_prompt(request: dict[str, Any], prompt_format: PromptFormat, tokenizer: Any) -> Prompt:
    """Render a chat.completions request.

    Args:
        tokenizer: a Hugging Face fast tokenizer; compact prompts need one with our SPECIAL_TOKENS.

    Raises:
        InputError: more tokens than `max_prompt_tokens`, or content that is not text.
    """
    is_chat = prompt_format.kind == "chat"
    prompt = _render_chat(request, tokenizer) if is_chat else _render_compact(request, prompt_format, tokenizer)
    if len(prompt.ids) > prompt_format.max_prompt_tokens:
        raise InputError(
            f"prompt: {len(prompt.ids)} tokens; allowed: {prompt_format.max_prompt_tokens}; this call goes to the LLM"
        )
    return prompt


def read_answer(
    ids: Sequence[int], prompt: Prompt, prompt_format: PromptFormat, tokenizer: Any
) -> tuple[str, dict | None]:
    """Turn generated token ids into the answer's text and its assistant message.

    Returns:
        (text, message); message is None where the text is no answer of the task's kind or points at no word.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True) if prompt_format.kind == "chat" else None
    if text is None:
        text = _read_compact(ids, prompt, prompt_format, tokenizer)
    return (text or ""), (None if text is None else to_message(text, prompt_format.answer_kind))


def encode_answer(pieces: Sequence[str | int], tokenizer: Any) -> list[int]:
    """Token ids of a compact answer given as text pieces and word numbers, with the end token."""
    first = copy_token_id(tokenizer)
    ids: list[int] = []
    for piece in pieces:
        ids += [first + piece] if isinstance(piece, int) else _encode(piece, tokenizer)
    return [*ids, tokenizer.convert_tokens_to_ids(END_TOKEN)]


def copy_token_id(tokenizer: Any) -> int:
    """Id of copy token 0; the others follow it."""
    return tokenizer.convert_tokens_to_ids("<|copy0|>")


def text_of(message: dict[str, Any]) -> str:
    """The text of one request message: content parts joined, tool calls as compact JSON.

    Raises:
        InputError: a part that is not text.
    """
    content = message.get("content") or ""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise InputError("messages: a part that is not text; this call goes to the LLM")
        content = "".join(part["text"] for part in content)
    calls = [call.get("function", {}) for call in message.get("tool_calls") or []]
    spoken = [f"{call.get('name', '')}({call.get('arguments', '')})" for call in calls]
    return "\n".join([content, *spoken]) if spoken else content


def split_units(text: str) -> list[tuple[str, str]]:
    """Split text into (sentence or line, white space behind it); joined again they are the text."""
    parts = [*_UNIT_END.split(text), ""]
    return list(zip(parts[::2], parts[1::2], strict=True))


def variable_text(message: dict[str, Any], static_lines: frozenset[str]) -> str:
    """The message's text without the sentences and lines that every prompt of the task repeats."""
    kept = [(unit, space) for unit, space in split_units(text_of(message)) if unit.strip() not in static_lines]
    return "".join(unit + space for unit, space in kept).strip()


def find_words(text: str) -> list[Word]:
    """Split text into what copy tokens stand for: words, or the values where the text is JSON."""
    if not _is_json(text):
        return [Word(text, m.start(), m.end()) for m in _WORD.finditer(text)]
    words: list[Word] = []
    for match in _JSON_TOKEN.finditer(text):
        is_string = match.group(1) is not None
        if match.group(2) or (is_string and not match.group(1)):
            continue
        begin, end = match.span(1) if is_string else match.span()
        if end - begin <= _LONGEST_JSON_WORD:
            words.append(Word(text, begin, end))
        else:
            words += [Word(text, begin + m.start(), begin + m.end()) for m in _WORD.finditer(match.group(1))]
    return words


def _render_chat(request: dict[str, Any], tokenizer: Any) -> Prompt:
    messages = [{**message, "content": message.get("content") or ""} for message in request["messages"]]
    text = tokenizer.apply_chat_template(
        messages, tools=request.get("tools") or None, add_generation_prompt=True, tokenize=False
    )
    return Prompt(tokenizer.encode(text, add_special_tokens=False), [])


def _render_compact(request: dict[str, Any], prompt_format: PromptFormat, tokenizer: Any) -> Prompt:
    static = frozenset(prompt_format.static_lines)
    texts = [(message["role"], variable_text(message, static)) for message in request["messages"]]
    texts = [(role, text) for role, text in texts if text]
    words = [find_words(text) for _, text in texts]
    # The last words are the ones an answer is about, so they get the copy tokens when there are too few.
    num_plain = max(0, sum(map(len, words)) - NUM_COPY_TOKENS)
    copied: list[Word] = []
    ids: list[int] = []
    first = copy_token_id(tokenizer)
    for (role, text), found in zip(texts, words, strict=True):
        ids.append(tokenizer.convert_tokens_to_ids(ROLE_TOKENS[role]))
        plain, num_plain = found[:num_plain], max(0, num_plain - len(found))
        at = plain[-1].end if plain else 0
        ids += _encode(text[:at], tokenizer)
        for word in found[len(plain) :]:
            ids += [*_encode(text[at : word.end], tokenizer), first + len(copied)]
            copied.append(word)
            at = word.end
        ids += _encode(text[at:], tokenizer)
    return Prompt([*ids, tokenizer.convert_tokens_to_ids(ANSWER_TOKEN)], copied)


def _encode(text: str, tokenizer: Any) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


def _read_compact(ids: Sequence[int], prompt: Prompt, prompt_format: PromptFormat, tokenizer: Any) -> str | None:
    first = copy_token_id(tokenizer)
    numbers = [token - first if first <= token < first + NUM_COPY_TOKENS else None for token in ids]
    parts: list[str] = []
    at = 0
    while at < len(ids):
        if numbers[at] is None:
            stop = next((k for k in range(at, len(ids)) if numbers[k] is not None), len(ids))
            parts.append(tokenizer.decode(ids[at:stop], skip_special_tokens=True))
            at = stop
            continue
        stop = at + 2 if at + 1 < len(ids) and numbers[at + 1] is not None else at + 1
        copied = _copied_text(numbers[at], numbers[stop - 1], prompt.words)
        if copied is None:
            return None
        parts.append(
            copied if prompt_format.answer_kind in ("text", "label") else json.dumps(copied, ensure_ascii=False)[1:-1]
        )
        at = stop
    return "".join(parts)


def _copied_text(begin: int, end: int, words: list[Word]) -> str | None:
    if begin > end or end >= len(words) or words[begin].text is not words[end].text:
        return None
    return words[begin].text[words[begin].begin : words[end].end]


def _is_json(text: str) -> bool:
    if text[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
