"""Turns a request into its call site: the part of a program's text that many calls share, fitted over the whole corpus.

Three kinds of site. A system prompt that says what to do is a site by its template and tools (cluster/signature.py). An
opening such as "You are Researcher." that stands before the same instructions as other openings is a slot of one larger
template, and its value names the site whatever follows. Where the system prompt is absent or says nothing ("You are a
helpful assistant."), the template is in the first user message, and the site is its anchor: the opening lines that
recur, else the closing lines with the JSON keys asked for, else the first line that recurs. An opening whose closings all
cover more messages than it does is an input that several templates were given, and names nothing. A message of several
lines in which nothing recurs is a template seen once, and a site by its own opening. Line templates follow Drain (He et
al., ICWS 2017). A site's id is made of its own words alone, so that other traffic does not move it.
Only hashes of text are kept. Knows nothing of answers.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cluster.signature import WILDCARD, abstract_text, message_text, signature_of, surface_of, system_text

_GENERIC_WORDS = frozenset(
    "a act ai always an and answer answers are as assist assistant be bot chat chatbot chatgpt concise concisely friendly"
    " general good gpt harmless help helpful honest in is kind language large llm model of polite please purpose question"
    " questions respond smart system that the to useful user users who with you your".split()
)
"""A system prompt of these words alone, or none, says nothing of the task; a short one of others may say all of it."""
_MIN_ANCHOR_WORDS = 6
_MAX_ANCHOR_LINES = 3
_MIN_LINE_WORDS = 5
_MAX_ANCHOR_CHARS = 200_000
_MIN_ANCHORED_SHARE = 0.5
"""Share of a signature's distinct messages that must have an anchor; below it they are written by people."""
_MIN_FAMILY = 3
_MIN_TEMPLATE_LINES = 3
"""Lines from which a message beside recurring templates is a program's too; shorter ones people may have written."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
_WORD = re.compile(r"\w+")
_JSON_KEY = re.compile(r'^\s*"([A-Za-z_][\w .-]{0,60})"\s*:', re.MULTILINE)


class CallSite(NamedTuple):
    """Where a call comes from."""

    site: str
    """Hash of what names the call site."""
    variant: str
    """Hash of the site with the tools and the response format of this call; a task never spans two without evidence."""


class SiteMap:
    """What recurs in one corpus. Immutable; the empty map makes every signature a site."""

    def __init__(self, roles: Iterable[str] = (), anchors: Mapping[str, Iterable[str]] | None = None) -> None:
        """`roles` are hashes of openings that name a site; `anchors` maps a signature to the hashes that recur in it."""
        self.roles = frozenset(roles)
        self.anchors = {signature: frozenset(found) for signature, found in (anchors or {}).items()}

    def site_of(self, request: dict[str, Any], signature: str | None = None) -> CallSite:
        """About 0.05 ms where the prompt was seen before; a template in a user message costs its abstraction once more."""
        signature = signature or signature_of(request)
        known = self.anchors.get(signature)
        if known is not None:
            text = _first_user_text(request)
            found = _anchors(text)
            anchor = next((a for a in found if a in known), None)
            if anchor is None and found and sum(map(bool, map(str.strip, text.splitlines()))) >= _MIN_TEMPLATE_LINES:
                anchor = found[0]
            if anchor is None:
                return CallSite(signature, signature)
            site = _hash("anchor", signature, anchor)
            return CallSite(site, site)
        if self.roles:
            role = _hash("role", _opening(system_text(request)))
            if role in self.roles:
                return CallSite(role, _hash(role, surface_of(request)))
        return CallSite(signature, signature)

    def to_json(self) -> dict[str, Any]:
        return {"roles": sorted(self.roles), "anchors": {s: sorted(found) for s, found in sorted(self.anchors.items())}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SiteMap:
        return cls(value["roles"], value["anchors"])


def fit_sites(requests: Iterable[dict[str, Any]]) -> SiteMap:
    """Find what recurs. The order of the requests does not matter."""
    systems: set[str] = set()
    messages: dict[str, Counter[str]] = defaultdict(Counter)
    for request in requests:
        system = system_text(request)
        if _is_generic(system):
            messages[signature_of(request)][_first_user_text(request)] += 1
        else:
            systems.add(system)
    anchors = {signature: found for signature, texts in messages.items() if (found := _recurring(texts))}
    return SiteMap(_roles(systems), anchors)


def _is_generic(system: str) -> bool:
    return all(word.casefold() in _GENERIC_WORDS for word in _WORD.findall(system))


def _roles(systems: Iterable[str]) -> set[str]:
    """Openings that stand before the same line as at least two others: values of a template's first slot."""
    openings_of: dict[str, set[str]] = defaultdict(set)
    for system in systems:
        opening, *rest = _sentences(system)
        for line in rest:
            if len(_WORD.findall(line)) >= _MIN_LINE_WORDS:
                openings_of[line].add(opening)
    families = [openings for openings in openings_of.values() if len(openings) >= _MIN_FAMILY]
    return {_hash("role", opening) for openings in families for opening in openings}


def _sentences(system: str) -> list[str]:
    """Abstracted sentences and lines; the first is the opening."""
    return [_opening(system), *filter(None, map(abstract_text, _SENTENCE_END.split(system)[1:]))]


def _opening(system: str) -> str:
    return abstract_text(_SENTENCE_END.split(system, maxsplit=1)[0])


def _recurring(texts: Counter[str]) -> set[str]:
    """Anchors that at least two calls share and that are no input; none where too few messages have one."""
    anchors = {text: _anchors(text) for text in texts}
    counts: Counter[str] = Counter()
    for text, found in anchors.items():
        counts.update(dict.fromkeys(found, texts[text]))
    known = {anchor for anchor, n in counts.items() if n >= 2}
    num_anchored = sum(any(anchor in known for anchor in found) for found in anchors.values())
    return known - _inputs(texts) if num_anchored >= _MIN_ANCHORED_SHARE * len(texts) else set()


def _inputs(texts: Iterable[str]) -> set[str]:
    """Openings whose recurring closings each cover more messages than the opening does: what was asked about, not how."""
    ends = [_ends(text) for text in texts]
    counts = Counter(anchor for pair in ends for anchor in pair if anchor)
    closings_of: dict[str, set[str]] = defaultdict(set)
    for opening, closing in ends:
        if opening and closing and counts[closing] >= 2:
            closings_of[opening].add(closing)
    return {o for o, closings in closings_of.items() if counts[o] < min(counts[c] for c in closings)}


def _anchors(text: str) -> list[str]:
    """Hashes of what may name a template, the most telling first: opening, closing with JSON keys, then single lines."""
    found = [anchor for anchor in _ends(text) if anchor]
    return found + [_hash("line", line) for line in _worded_lines(text) if len(_WORD.findall(line)) >= _MIN_LINE_WORDS]


def _ends(text: str) -> tuple[str, str]:
    """Hashes of the opening and of the closing with its JSON keys; empty where there are too few words."""
    lines = _worded_lines(text)
    opening, closing = _block(lines), _block(lines[::-1])
    keys = sorted(set(_JSON_KEY.findall(text[:_MAX_ANCHOR_CHARS])))
    return (_hash("opening", opening) if opening else "", _hash("closing", closing, *keys) if closing else "")


def _worded_lines(text: str) -> list[str]:
    lines = abstract_text(text[:_MAX_ANCHOR_CHARS]).splitlines()
    return [line for line in lines if _WORD.search(line.replace(WILDCARD, ""))]


def _block(lines: list[str]) -> str:
    """The first lines that together have enough words to be no chance; empty where there are too few."""
    taken, num_words = [], 0
    for line in lines[:_MAX_ANCHOR_LINES]:
        taken.append(line)
        num_words += len(_WORD.findall(line))
        if num_words >= _MIN_ANCHOR_WORDS:
            return "\n".join(taken)
    return ""


def _first_user_text(request: dict[str, Any]) -> str:
    messages = request.get("messages") or [{}]
    return message_text(next((m for m in messages if m.get("role") == "user"), messages[-1]))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
