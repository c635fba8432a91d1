"""Signs in an answer's own text that it must not be kept, whatever its confidence: a loop, length, another language.

What is normal is learned from the task's train answers (`AnswerForm`, stored in the prompt format), so that a task that
translates, repeats or writes long keeps its answers. Heuristics on purpose, and only ever a reason to ask the LLM: a gate
is certified with them, so one that errs costs coverage and never the promise. Knows nothing of schemas, tools or
confidence; reasons never quote an answer, because they are logged.

- Loop: eight or more copies of up to 64 characters in a row, 64 characters in all, with a letter among them, that stand
  neither in the request nor in such a form in a train answer.
- Length: more than twice the characters of the longest train answer. A copy token can stand for a whole message, so
  the limit in tokens does not bound characters.
- Script: letters of a writing system that neither the request nor any train answer holds.
- Language: the answer's is not that of the last user message, where the train answers' are. By writing system; among
  those in Latin letters by function words of six languages. Where either is not clear, nothing is said.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cluster.answers import strings_in
from cluster.records import Record

_MIN_LOOP_CHARS, _MIN_COPIES, _MAX_UNIT_CHARS = 64, 8, 64
_ANCHOR_CHARS = 16
"""A loop is found by pieces of this length that come again a unit further on; one piece in as many characters is tried,
and every loop of 64 characters and eight copies has such a piece."""
_LENGTH_SLACK = 2
_SCRIPTS = frozenset(
    "LATIN CYRILLIC GREEK ARABIC HEBREW DEVANAGARI BENGALI TAMIL TELUGU THAI HANGUL CJK HIRAGANA KATAKANA GEORGIAN "
    "ARMENIAN ETHIOPIC KHMER MYANMAR".split()
)
_MIN_LETTERS = 12
"""Fewer tell no language, but in Chinese."""
_CLEAR_SHARE = 0.6
"""Share of an answer's letters that its writing system must have to be called its language."""
_MIN_FUNCTION_WORDS = 3
_MIN_PAIRS, _FOLLOWS_SHARE = 20, 0.98
"""Train examples with a clear language on both sides, and how many of them must agree, before the language counts."""
_FUNCTION_WORDS = {
    "en": "the and is of to in that it you for with this have not are was your be from my".split(),
    "de": "der die das und ist nicht ein eine ich sie mit für auf den dem wir es zu bitte auch".split(),
    "fr": "le les des est et une pas je vous nous pour dans avec sur votre du ce qui au mais".split(),
    "es": "el los las es y una por para con su que del se está pero como más mi usted al".split(),
    "it": "il gli che è e una per con non sono della di mi si questo ha anche nel sua ma".split(),
    "pt": "o os as e uma não para com você que do da em por seu é mais meu foi ao".split(),
}
_LANGUAGES_OF = {
    word: tuple(name for name, words in _FUNCTION_WORDS.items() if word in words)
    for word in itertools.chain(*_FUNCTION_WORDS.values())
}
_WORD = re.compile(r"[^\W\d_]+")


class AnswerForm(Record):
    """What a task's train answers look like, as far as an answer can be told by it to be none of the task's."""

    max_chars: int
    """A longer answer is not kept."""
    scripts: tuple[str, ...]
    """Writing systems in some train answer, by their Unicode names."""
    follows_language: bool
    """Whether answers are in the language of the last user message."""
    repeats: bool
    """Whether a train answer repeats itself as a loop does."""


def learn_form(answered: Iterable[tuple[Mapping[str, Any], str]]) -> AnswerForm | None:
    """The form of a task's train answers; None where there is none to learn from.

    Args:
        answered: request and the answer's text, as `cluster.answers.to_text` writes it.
    """
    texts, scripts, same = [], set(), []
    repeats = False
    for request, text in answered:
        texts.append(text)
        scripts |= _scripts_of(text).keys()
        repeats = repeats or _has_loop(text, request)
        asked, said = language_of(_asked_text(request)), language_of(text)
        if asked and said:
            same.append(asked == said)
    if not texts:
        return None
    follows = len(same) >= _MIN_PAIRS and sum(same) >= _FOLLOWS_SHARE * len(same)
    return AnswerForm(
        max_chars=_LENGTH_SLACK * max(map(len, texts)),
        scripts=tuple(sorted(scripts)),
        follows_language=follows,
        repeats=repeats,
    )


def deformed_reason(text: str, request: Mapping[str, Any], form: AnswerForm | None) -> str | None:
    """Why an answer with this text is none of the task's, or None.

    Args:
        form: None where nothing was learned; then only loops are told.
    """
    if not (form and form.repeats) and _has_loop(text, request):
        return "the answer repeats itself"
    if form is None:
        return None
    if len(text) > form.max_chars:
        return "the answer is far longer than the task's answers"
    foreign = _scripts_of(text).keys() - set(form.scripts)
    if foreign and foreign - {script for part in strings_in(dict(request)) for script in _scripts_of(part)}:
        return "the answer is in a script that neither the request nor the task's answers have"
    if form.follows_language:
        asked, said = language_of(_asked_text(request)), language_of(text)
        if asked and said and asked != said:
            return "the answer is in another language than the request"
    return None


def language_of(text: str) -> str | None:
    """A short name of the text's language or writing system; None where it is not clear.

    Example:
        >>> language_of("Where is the order that you sent to me?"), language_of("Где находится мой заказ?")
        ('en', 'CYRILLIC')
    """
    scripts = _scripts_of(text)
    if scripts.total() < _MIN_LETTERS and "CJK" not in scripts:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"]:
        scripts = Counter({"HIRAGANA": scripts.total() - scripts["LATIN"], "LATIN": scripts["LATIN"]})
    script, count = scripts.most_common(1)[0]
    if count < _CLEAR_SHARE * scripts.total():
        return None
    return _latin_language(text) if script == "LATIN" else script


def _latin_language(text: str) -> str | None:
    """The language whose function words are at least three and twice as many as any other's."""
    counts = Counter(name for word in _WORD.findall(text.casefold()) for name in _LANGUAGES_OF.get(word, ()))
    (first, number), (_, next_number) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    return first if number >= max(_MIN_FUNCTION_WORDS, 2 * next_number) else None


def _scripts_of(text: str) -> Counter[str]:
    """Letters of each writing system; those whose Unicode name begins with none of _SCRIPTS (as in ª or µ) are left out."""
    found: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        script = _script_of(letter)
        if script:
            found[script] += count
    return found


@functools.lru_cache(maxsize=4096)
def _script_of(letter: str) -> str | None:
    script = unicodedata.name(letter, "").split(" ")[0]
    return script if letter.isalpha() and script in _SCRIPTS else None


def _has_loop(text: str, request: Mapping[str, Any]) -> bool:
    """Whether the text repeats itself in a way that the request does not."""
    return any(not any(loop in part for part in strings_in(dict(request))) for loop in _loops(text))


def _loops(text: str) -> Iterator[str]:
    """The stretches of a text that are copies of one unit with a letter in it, one behind the other."""
    begin = 0
    while begin + _ANCHOR_CHARS < len(text):
        low, high = _longest_run(text, begin)
        if high - low < _MIN_LOOP_CHARS:
            begin += _ANCHOR_CHARS
            continue
        if any(map(str.isalpha, text[low:high])):
            yield text[low:high]
        begin = max(high, begin + 1)


def _longest_run(text: str, begin: int) -> tuple[int, int]:
    """Where the longest run of copies around the piece at `begin` is; (begin, begin) where they are too few."""
    anchor, best = text[begin : begin + _ANCHOR_CHARS], (begin, begin)
    limit = begin + _MAX_UNIT_CHARS + _ANCHOR_CHARS
    at = text.find(anchor, begin + 1, limit)
    while at >= 0:
        unit = at - begin
        low, high = begin, at + _ANCHOR_CHARS
        while low > 0 and text[low - 1] == text[low - 1 + unit]:
            low -= 1
        while high < len(text) and text[high] == text[high - unit]:
            high += 1
        if high - low >= _MIN_COPIES * unit and high - low > best[1] - best[0]:
            best = (low, high)
        # Multiples of a unit give the same run.
        at = -1 if best[1] > best[0] else text.find(anchor, at + 1, limit)
    return best


def _asked_text(request: Mapping[str, Any]) -> str:
    """What the last user message says; "" where none does."""
    for message in reversed(request["messages"]):
        if message.get("role") == "user":
            return "\n".join(strings_in(message.get("content") or ""))
    return ""
