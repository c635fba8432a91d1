"""Names tasks in their own words, and finds the lines that every prompt of a task repeats.

Names are read from the redacted train requests and from words most of them share, so that a name holds nothing
personal. Knows nothing of how tasks are found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from cluster.answers import json_value
from cluster.prompts import split_units
from cluster.records import AnswerKind, Example, Record
from cluster.signature import WILDCARD, message_text, system_text, tool_names, variable_text

_PROMPT_ROLES = ("system", "developer", "user")
_MIN_STATIC_REQUESTS = 10
_MIN_STATIC_SHARE = 0.99
_MAX_NAME_WORDS = 3
_MAX_NAME_SAMPLE = 200
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_MAX_WORD_CHARS = 20
_STOP_WORDS = frozenset(
    "about all among and any answer are ask call can content each exactly for from give given has have its keys may must"
    " not none null one only other return role should that the them then there these this tool tools type use user value"
    " when which with you your".split()
)


class Slot(Record):
    """A place of a template where calls differ."""

    after: str
    """The template line before it; empty at the beginning."""
    num_calls: int
    """Of a sample of train requests, those that say something there."""
    num_distinct: int
    median_characters: int


class Nameable(NamedTuple):
    """What a task's name is made of."""

    kind: AnswerKind
    examples: list[Example]
    has_topics: bool
    """The user's words tell it from its neighbours, not the system prompt."""


def name_tasks(tasks: Sequence[Nameable]) -> list[str]:
    """At most three lower-case words each: of tools or JSON keys, else of the prompts."""
    samples = [[e for e in task.examples if e.split == "train"][:_MAX_NAME_SAMPLE] for task in tasks]
    surfaces = [_surface_name(task, sample) for task, sample in zip(tasks, samples, strict=True)]
    spoken = [_shared_words(s, with_user=task.has_topics) for task, s in zip(tasks, samples, strict=True)]
    num_tasks = Counter(word for words in spoken for word in words)
    names = []
    for task, surface, words in zip(tasks, surfaces, spoken, strict=True):
        distinct = sorted(words, key=lambda word: num_tasks[word])[:_MAX_NAME_WORDS]
        is_telling = surface and surfaces.count(surface) == 1
        names.append(surface if is_telling else " ".join(distinct) or surface or task.kind.replace("_", " "))
    return names


def find_static_lines(examples: list[Example]) -> tuple[str, ...]:
    """Sentences and lines that one role says in nearly every train request, in order of first appearance.

    Empty where there are too few train requests to tell.
    """
    requests = [e.request for e in examples if e.split == "train"]
    if len(requests) < _MIN_STATIC_REQUESTS:
        return ()
    counts: Counter[tuple[str, str]] = Counter()
    for request in requests:
        said = (m for m in request["messages"] if m["role"] in _PROMPT_ROLES)
        lines = ((m["role"], unit.strip()) for m in said for unit, _ in split_units(message_text(m)))
        counts.update(list(dict.fromkeys(lines)))
    static = (line for (_, line), n in counts.items() if line and n >= _MIN_STATIC_SHARE * len(requests))
    return tuple(dict.fromkeys(static))


def find_template(examples: list[Example], static_lines: Sequence[str]) -> tuple[str, ...]:
    """The static lines as they stand in the first train request, with a wildcard for what varies between them."""
    request = next((e.request for e in examples if e.split == "train"), None)
    if request is None or not static_lines:
        return ()
    static = set(static_lines)
    said = [m for m in request["messages"] if m["role"] in _PROMPT_ROLES]
    units = [unit.strip() for m in said for unit, _ in split_units(message_text(m)) if unit.strip()]
    shown = [unit if unit in static else WILDCARD for unit in units]
    return tuple(line for line, before in zip(shown, ["", *shown], strict=False) if (line, before) != (WILDCARD,) * 2)


def find_slots(examples: list[Example], static_lines: Sequence[str]) -> tuple[Slot, ...]:
    """What stands where the template has a wildcard, counted over train requests: numbers alone, no content."""
    static = set(static_lines)
    values: dict[str, list[str]] = {}
    for request in [e.request for e in examples if e.split == "train"][:_MAX_NAME_SAMPLE]:
        after, filling = "", []
        said = [m for m in request["messages"] if m["role"] in _PROMPT_ROLES]
        units = [unit.strip() for m in said for unit, _ in split_units(message_text(m)) if unit.strip()]
        for unit in [*units, None]:
            if unit is not None and unit not in static:
                filling.append(unit)
                continue
            if filling:
                values.setdefault(after, []).append("\n".join(filling))
            after, filling = unit or "", []
    return tuple(
        Slot(after=after, num_calls=len(own), num_distinct=len(set(own)), median_characters=int(median(map(len, own))))
        for after, own in values.items()
        if static
    )


def json_keys(example: Example) -> tuple[str, ...]:
    """Sorted keys of an answer that is a JSON object; empty for any other answer."""
    value = json_value(message_text(example.target))
    return tuple(sorted(value)) if isinstance(value, dict) else ()


def _surface_name(task: Nameable, sample: list[Example]) -> str:
    """The tools on offer or the JSON keys of the answers, where three words can hold them all."""
    if task.kind == "tool_call":
        parts = list(tool_names(task.examples[0].request))
    elif task.kind == "json":
        counts = Counter(key for e in sample for key in json_keys(e))
        parts = [key for key, n in counts.most_common() if 2 * n >= len(sample)]
    else:
        return ""
    words = [word for part in parts for word in _words(part)]
    return " ".join(dict.fromkeys(words)) if len(words) <= _MAX_NAME_WORDS else ""


def _shared_words(sample: list[Example], *, with_user: bool) -> list[str]:
    """Words that most of the prompts share, in order of first appearance."""
    texts = (f"{variable_text(e.request) if with_user else ''}\n{system_text(e.request)}" for e in sample)
    counts = Counter(word for text in texts for word in dict.fromkeys(_words(text)))
    return [w for w, n in counts.items() if 2 * n > len(sample) and len(w) > 2 and w not in _STOP_WORDS]


def _words(text: str) -> list[str]:
    return [word.lower()[:_MAX_WORD_CHARS] for word in _WORD.findall(text)]
