"""Conversations -> the same conversations with personal values replaced by made-up ones of the same shape.

What is found anywhere in a session is replaced everywhere in it: across turns, inside JSON however deep, in tool
arguments and in the answer to learn. So tool calls still parse, JSON keeps its layout, and what a model must copy stays
copyable. System prompts and tool definitions are the agent's own text: only the application's own patterns and deny list
are searched for in prompts, but a value that is found elsewhere in the session is replaced in them too. What a schema
lists as allowed is never replaced. Each distinct string is searched once. Surrogates cannot be undone without the key,
except by the table that a reversible recipe keeps.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cluster.errors import ConfigError
from training.findings import Finding, is_name
from training.paraphrase import Paraphrase, Paraphraser
from training.recognisers import build_ner, find_keyed, find_values
from training.redact_rules import ApplicationRules, RedactConfig
from training.replacing import MAX_DEPTH, Replacer, Span, is_data_key, parse_container
from training.surrogates import SurrogateMaker

Turn = tuple[dict[str, Any], dict[str, Any]]
"""A request and the assistant message that answers it."""

MAX_CACHED_STRINGS = 100_000
"""Distinct strings whose findings are remembered, by hash: about 50 MB at most."""
MIN_LEAF_CHARS = 6
"""A shorter string in JSON holds no pattern; names need their field."""
_STRUCTURE = frozenset({"role", "type", "id", "tool_call_id", "name", "image_url", "input_audio", "file"})
"""Fields of a message that carry no text of the conversation."""
_OWN_ROLES = ("system", "developer")


class Redactor:
    """Replaces personal values. Not for several threads; memory grows with distinct strings up to a bound."""

    def __init__(self, config: RedactConfig, key: bytes, paraphrase: Paraphrase | None = None) -> None:
        """
        Args:
            key: secret; equal keys give equal surrogates.
            paraphrase: a language model that rewords a text; needed where the recipe asks for it, else not used.

        Raises:
            ConfigError: the spaCy model is not installed, or paraphrasing is asked for without a model.
        """
        if config.paraphrase and paraphrase is None:
            raise ConfigError(
                "redact.paraphrase=True: no language model is given here; allowed: false, or a run that names one; next: "
                "redact.paraphrase=false"
            )
        self._key = key
        self._rules = ApplicationRules(config)
        self._ner = build_ner(config.spacy_model)
        self._cache: dict[bytes, frozenset[Finding]] = {}
        self._is_reversible = config.reversible
        self._mappings: dict[str, dict[str, str]] = {}
        is_asked = config.paraphrase and paraphrase is not None
        self._paraphraser = Paraphraser(paraphrase, config.paraphrase_keep_chars) if is_asked and paraphrase else None

    def redact_session(self, turns: Sequence[Turn], scope: str) -> tuple[list[Turn], Counter[str]]:
        """All calls of one session, so that what one call reveals is replaced in the others too.

        Args:
            scope: client and session; the same value has the same surrogate inside it and unrelated ones elsewhere.

        Returns:
            The turns with new messages (unchanged objects where nothing was found), and distinct values by kind.

        Raises:
            ConfigError: one of the recipe's patterns takes too long.
        """
        searched, own = _distinct_strings(turns)
        findings = {finding for text in searched for finding in self.find(text)}
        findings |= {finding for text in own for finding in self._rules.find(text)}
        kept = _schema_values(turns)
        findings = {f for f in findings if f.value not in kept and not self._rules.is_allowed(f)}
        if not findings:
            return list(turns), Counter()
        replacer = self._build_replacer(findings, (*searched, *own), scope)
        redacted = _map_turns(turns, replacer.replace)
        if self._paraphraser is not None:
            redacted = self._paraphraser.reword(redacted, changed={replacer.replace(t) for t in searched} - searched)
        if self._is_reversible:
            self._mappings[scope] = replacer.restored
        kinds = {(finding.value, "PERSON" if is_name(finding.kind) else finding.kind) for finding in findings}
        return redacted, Counter(kind for _, kind in kinds)

    def mapping_of(self, scope: str) -> dict[str, str]:
        """What the surrogates of a session stand for, as written; handed out once and then forgotten.

        Empty unless the recipe is reversible, and for a session in which nothing was found.
        """
        return self._mappings.pop(scope, {})

    @property
    def paraphrased(self) -> Counter[str]:
        """Passages reworded, and kept as they were because the rewording lost what an answer copies."""
        return Counter() if self._paraphraser is None else self._paraphraser.counts

    def find_spans(self, text: str, scope: str = "") -> list[Span]:
        """Which characters of a text that stands alone would be replaced."""
        findings = {finding for finding in self.find(text) if not self._rules.is_allowed(finding)}
        return self._build_replacer(findings, (text,), scope).find_spans(text) if findings else []

    def find(self, text: str) -> frozenset[Finding]:
        """Personal values in the text of a message, whether plain or JSON."""
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        known = self._cache.get(digest)
        if known is None:
            if len(self._cache) >= MAX_CACHED_STRINGS:
                # The oldest: sessions come one after another.
                del self._cache[next(iter(self._cache))]
            known = self._cache[digest] = frozenset(self._find_in_string(text, (), 0))
        return known

    def _build_replacer(self, findings: set[Finding], texts: Iterable[str], scope: str) -> Replacer:
        said = "\n".join(texts)
        findings = _without_shared_places(findings, said)
        return Replacer(findings, SurrogateMaker(self._key, scope).make(findings, said))

    def _find_in_string(self, text: str, path: tuple[str, ...], depth: int) -> Iterator[Finding]:
        value = parse_container(text) if depth < MAX_DEPTH else None
        if value is None:
            yield from self._rules.find(text)
            if depth == 0 or len(text) >= MIN_LEAF_CHARS:
                yield from find_values(text, is_message=depth == 0)
                if self._ner is not None:
                    yield from self._ner(text)
            return
        for steps, leaf in _leaves_of(value):
            yield from find_keyed(next((step for step in reversed(steps) if not step.isdigit()), ""), leaf)
            if self._rules.has_fields:
                yield from self._rules.find_at((*path, *steps), leaf)
            if isinstance(leaf, str):
                yield from self._find_in_string(leaf, (*path, *steps), depth + 1)


def _distinct_strings(turns: Sequence[Turn]) -> tuple[set[str], set[str]]:
    """The conversation's texts, and those of the agent's own prompts. Calls of a session repeat their prefix."""
    searched: set[str] = set()
    own: set[str] = set()
    for request, answer in turns:
        for message in (*request.get("messages", ()), answer):
            (own if message.get("role") in _OWN_ROLES else searched).update(_strings_of(message))
    return searched, own


def _without_shared_places(findings: set[Finding], said: str) -> set[Finding]:
    """A city inside a postal address stays where the session names it elsewhere too: then the task is about it."""
    places = [finding for finding in findings if finding.kind == "ADDRESS_PLACE"]
    if not places:
        return findings
    rest = said
    for finding in places:
        rest = rest.replace(finding.value, " ")
    shared = {f for f in places if re.split(r"[\s,;-]*[,;\n\\]|\s(?=[A-Z]{2,3}$)", f.value)[0] in rest}
    return findings - shared


def _schema_values(turns: Sequence[Turn]) -> set[str]:
    """Strings that a schema of the requests lists as allowed values."""
    values: set[str] = set()
    seen: set[int] = set()
    todo: list[Any] = [part for request, _ in turns for part in (request.get("tools"), request.get("response_format"))]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo.extend(item)
        elif isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))
            listed = item.get("enum")
            values.update(
                v for v in (*(listed if isinstance(listed, list) else ()), item.get("const")) if isinstance(v, str)
            )
            todo.extend(item.values())
    return values


def _leaves_of(value: Any) -> Iterator[tuple[tuple[str, ...], str | int]]:
    """Strings and integers of a JSON value with the fields and numbers that lead to them; keys that are data too."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while todo:
        path, item = todo.pop()
        if isinstance(item, dict):
            todo.extend(((*path, key), part) for key, part in item.items())
            yield from ((path, key) for key in item if is_data_key(key))
        elif isinstance(item, list):
            todo.extend(((*path, str(index)), part) for index, part in enumerate(item))
        elif isinstance(item, str | int) and not isinstance(item, bool):
            yield path, item


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


def _map_turns(turns: Sequence[Turn], change: Callable[[str], str]) -> list[Turn]:
    done: dict[str, str] = {}

    def change_once(text: str) -> str:
        if text not in done:
            done[text] = change(text)
        return done[text]

    return [
        (
            {**request, "messages": [_map_strings(m, change_once) for m in request.get("messages", ())]},
            _map_strings(answer, change_once),
        )
        for request, answer in turns
    ]


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A message with `change` applied to what `_strings_of` yields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key in _STRUCTURE else _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value
