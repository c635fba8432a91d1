"""AgentCall <-> the exact token ids a specialist sees and the text it says: one rendering for training and serving.

Two formats. `chat` is the base model's own chat template over the whole request. `compact` is for bases trained
from scratch: a task token stands for the sentences and lines that every prompt of the task repeats, and every word that
an answer could need is followed by a copy token, so that an answer can point at words instead of spelling them:
`{"order_id":"` copy-181 `"}`. Copy tokens count the words of one class, so that one token means "the first id of this
shape" in every prompt; two in a row stand for the text from one word through another. Ids, dates and addresses are
shown by their shape (AB-48213 as XX-dddd), because a fresh value is like none that was seen: only its shape and its
place say what it is.

Knows nothing of how a model is trained or served. A request's text never becomes a control token: compact prompts take
special tokens in it as plain text, and a chat prompt that holds one is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from cluster.acceptance import AnswerForm
from cluster.answers import strings_in, to_message
from cluster.errors import InputError
from cluster.records import AnswerKind, Record

_NUM_SHAPE_CLASSES = 8
_COPY_BLOCKS = {
    **{"lower": 64, "title": 64, "upper": 16, "number": 16, "other": 16, "address": 16},
    **{f"shape{i}": 8 for i in range(_NUM_SHAPE_CLASSES)},
}
"""Word class -> how many copy tokens it has. Shapes are classed by their length."""
NUM_COPY_TOKENS = sum(_COPY_BLOCKS.values())
_FIRST_OF_BLOCK = dict(zip(_COPY_BLOCKS, itertools.accumulate([0, *_COPY_BLOCKS.values()]), strict=False))
NUM_TASK_TOKENS = 64
ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "developer", "user", "assistant", "tool", "function")}
ANSWER_TOKEN, END_TOKEN, PAD_TOKEN = "<|answer|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (
    PAD_TOKEN,
    END_TOKEN,
    ANSWER_TOKEN,
    *ROLE_TOKENS.values(),
    *(f"<|task{i}|>" for i in range(NUM_TASK_TOKENS)),
    *(f"<|copy{i}|>" for i in range(NUM_COPY_TOKENS)),
)

_UNIT_END = re.compile(r"((?<=[.!?])\s+|\s*\n\s*)")
_WORD = re.compile(r"\w+(?:[-_./:@'+]\w+)*")
_JSON_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|-?\d+(?:\.\d+)?')
_MIN_SHAPED_DIGITS = 3
_LONGEST_SHAPE_RUN = 4
_SHAPE_RUN = re.compile(r"[^\W\d_]+|\d+")
_LONGEST_JSON_WORD = 64
"""Characters; a longer JSON string is prose and is split into its words."""


class PromptFormat(Record):
    """How one specialist reads requests; stored with it and part of what its gate holds for."""

    kind: Literal["chat", "compact"]
    answer_kind: AnswerKind
    static_lines: tuple[str, ...] = ()
    """Left out of a compact prompt."""
    task_number: int = 0
    """Which task token begins a compact prompt; numbers repeat after NUM_TASK_TOKENS."""
    plain_words: tuple[str, ...] = ()
    """Keys (`word_key`) of the words that get no copy token, because no answer ever needs them."""
    max_prompt_tokens: int
    """A longer prompt is not for this specialist: the call goes to the LLM."""
    answer_form: AnswerForm | None = None
    """What its train answers look like; an answer of another form is not kept."""


class Word(NamedTuple):
    """A piece of prompt text that an answer can point at: `text[begin:end]`."""

    text: str
    begin: int
    end: int
    message: int = 0
    """Which of the prompt's texts it stands in; equal texts are told apart by it."""


class Prompt(NamedTuple):
    """Token ids of a rendered request, and the words its copy tokens stand for."""

    ids: list[int]
    words: dict[int, Word]
    """Copy number -> word, in reading order."""


def render_prompt(request: dict[str, Any], prompt_format: PromptFormat, tokenizer: Any) -> Prompt:
    """Render a chat.completions request.

    Args:
        tokenizer: a Hugging Face fast tokenizer; compact prompts need one with our SPECIAL_TOKENS.

    Raises:
        InputError: more tokens than `max_prompt_tokens`, content that is not text, a role that is unknown, or a special
            token in a chat's text.
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
        InputError: a part that is not text, or tool calls that cannot be read.
    """
    content, calls = _content_of(message), message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError("messages: tool calls that are no list of objects; this call goes to the LLM")
    functions = [call.get("function", {}) for call in calls]
    if not all(isinstance(function, dict) for function in functions):
        raise InputError("messages: a tool call whose function is no object; this call goes to the LLM")
    spoken = [f"{function.get('name', '')}({function.get('arguments', '')})" for function in functions]
    return "\n".join([content, *spoken]) if spoken else content


def split_units(text: str) -> list[tuple[str, str]]:
    """Split text into (sentence or line, white space behind it); joined again they are the text."""
    parts = [*_UNIT_END.split(text), ""]
    return list(zip(parts[::2], parts[1::2], strict=True))


def variable_text(message: dict[str, Any], static_lines: frozenset[str]) -> str:
    """The message's text without the sentences and lines that every prompt of the task repeats."""
    kept = [(unit, space) for unit, space in split_units(text_of(message)) if unit.strip() not in static_lines]
    return "".join(unit + space for unit, space in kept).strip()


def find_words(text: str, message: int = 0) -> list[Word]:
    """Split the text of a message into what copy tokens stand for: words, or the values where the text is JSON."""
    if not _is_json(text):
        return [Word(text, m.start(), m.end(), message) for m in _WORD.finditer(text)]
    words: list[Word] = []
    for match in _JSON_TOKEN.finditer(text):
        is_string = match.group(1) is not None
        if match.group(2) or (is_string and not match.group(1)):
            continue
        begin, end = match.span(1) if is_string else match.span()
        if end - begin <= _LONGEST_JSON_WORD:
            words.append(Word(text, begin, end, message))
        else:
            words += [Word(text, begin + m.start(), begin + m.end(), message) for m in _WORD.finditer(match.group(1))]
    return words


def shape_of(word: str) -> str:
    """A word as a compact prompt shows it: ids, long numbers and addresses by their shape, others as they are.

    Example:
        >>> shape_of("AB-48213"), shape_of("mara.lind@example.com"), shape_of("tent"), shape_of("12")
        ('XX-dddd', 'x.x@x.x', 'tent', '12')
    """
    if "@" not in word and sum(map(str.isdigit, word)) < _MIN_SHAPED_DIGITS:
        return word
    return _SHAPE_RUN.sub(_shape_of_run, word)


def word_key(word: str) -> str:
    """What `PromptFormat.plain_words` knows a word by."""
    return shape_of(word).casefold()


def shown_text(text: str) -> str:
    """The text as a compact prompt shows it, without copy tokens."""
    at, parts = 0, []
    for word in find_words(text):
        parts += [text[at : word.begin], shape_of(text[word.begin : word.end])]
        at = word.end
    return "".join([*parts, text[at:]])


def prompt_texts(request: dict[str, Any], static_lines: Sequence[str]) -> list[tuple[str, str]]:
    """(role, text) of every message that says more than the static lines."""
    static = frozenset(static_lines)
    texts = [(str(message.get("role")), variable_text(message, static)) for message in request["messages"]]
    return [(role, text) for role, text in texts if text]


def _content_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    is_text = (isinstance(part, dict) and part.get("type") == "text" for part in parts)
    if not all(is_text) or not all(isinstance(part.get("text"), str) for part in parts):
        raise InputError("messages: a part that is not text; this call goes to the LLM")
    return "".join(part["text"] for part in parts)


def _shape_of_run(match: re.Match[str]) -> str:
    run = match[0]
    if run[0].isdigit():
        return "d" * min(len(run), _LONGEST_SHAPE_RUN)
    return "X" * min(len(run), _LONGEST_SHAPE_RUN) if run.isupper() else "x"


def _render_chat(request: dict[str, Any], tokenizer: Any) -> Prompt:
    import jinja2

    messages = [{**message, "content": _content_of(message)} for message in request["messages"]]
    if "developer" not in str(tokenizer.chat_template):
        # OpenAI's newer name of the role; a template that does not know it would leave the message out.
        messages = [{**one, "role": "system"} if one.get("role") == "developer" else one for one in messages]
    tools = request.get("tools") or None
    special = {
        *tokenizer.all_special_tokens,
        *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
    }
    if any(token in text for text in strings_in([messages, tools]) for token in special):
        raise InputError("messages: a special token of the base model in their text; this call goes to the LLM")
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise InputError(f"messages: not what the base model's chat template takes ({type(error).__name__})") from None
    return Prompt(tokenizer.encode(text, add_special_tokens=False), {})


def _render_compact(request: dict[str, Any], prompt_format: PromptFormat, tokenizer: Any) -> Prompt:
    texts = prompt_texts(request, prompt_format.static_lines)
    plain_words = frozenset(prompt_format.plain_words)
    found = [word for message, (_, text) in enumerate(texts) for word in find_words(text, message)]
    words = _number_words([w for w in found if word_key(w.text[w.begin : w.end]) not in plain_words])
    first = copy_token_id(tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(f"<|task{prompt_format.task_number % NUM_TASK_TOKENS}|>")]
    for message, (role, text) in enumerate(texts):
        if role not in ROLE_TOKENS:
            raise InputError(f"messages: an unknown role; allowed: {', '.join(ROLE_TOKENS)}; this call goes to the LLM")
        ids.append(tokenizer.convert_tokens_to_ids(ROLE_TOKENS[role]))
        at = 0
        for number, word in words.items():
            if word.message != message:
                continue
            shown = shown_text(text[at : word.begin]) + shape_of(text[word.begin : word.end])
            ids += [*_encode(shown, tokenizer), first + number]
            at = word.end
        ids += _encode(shown_text(text[at:]), tokenizer)
    return Prompt([*ids, tokenizer.convert_tokens_to_ids(ANSWER_TOKEN)], words)


def _number_words(words: list[Word]) -> dict[int, Word]:
    """Count the words of each class; the last ones of a class are those an answer is about, where there are too many."""
    classes = [_class_of(word.text[word.begin : word.end]) for word in words]
    left_out = {name: n - _COPY_BLOCKS[name] for name, n in Counter(classes).items()}
    seen: Counter[str] = Counter()
    numbered = {}
    for name, word in zip(classes, words, strict=True):
        place = seen[name] - max(0, left_out[name])
        seen[name] += 1
        if place >= 0:
            numbered[_FIRST_OF_BLOCK[name] + place] = word
    return numbered


def _class_of(word: str) -> str:
    shape = shape_of(word)
    if shape != word:
        return "address" if "@" in word else f"shape{len(shape) % _NUM_SHAPE_CLASSES}"
    if word.isdigit():
        return "number"
    if not word.isalpha():
        return "other"
    return "lower" if word.islower() else "upper" if word.isupper() and len(word) > 1 else "title"


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
        copied = _copied_text(prompt.words.get(numbers[at]), prompt.words.get(numbers[stop - 1]))
        if copied is None:
            return None
        parts.append(
            copied if prompt_format.answer_kind in ("text", "label") else json.dumps(copied, ensure_ascii=False)[1:-1]
        )
        at = stop
    return "".join(parts)


def _copied_text(first: Word | None, last: Word | None) -> str | None:
    if first is None or last is None or first.message != last.message or first.begin > last.begin:
        return None
    return first.text[first.begin : last.end]


def _is_json(text: str) -> bool:
    if text[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
