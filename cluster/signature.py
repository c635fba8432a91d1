"""Turns a chat.completions request into its call-site signature: what the code that makes the call keeps constant.

Signature = system-prompt template with literals abstracted + tool names and argument schemas + response format.
Also gives the text that varies inside one signature and the lines that betray its template. Training discovers by
it and the router routes by it, so it exists once. It sees prompts only, never answers. Line templates with a
wildcard follow Drain (He et al., ICWS 2017).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import OrderedDict
from typing import Any, NamedTuple

WILDCARD = "<*>"
_NO_SYSTEM = "no system prompt"
_MAX_CACHED = 1024
_MAX_CACHED_LINE = 2000
_MAX_LITERALS = 2000
_MIN_TEMPLATE_WORDS = 3
_MAX_OPENING = 60

# Every pattern starts at a token's first character and never rescans it: linear in the length of the line.
_QUOTED = (
    r'"(?:[^"\\\n]|\\.){0,1000}"'
    "|\u201c[^\u201d\n]{0,1000}\u201d"
    r"|(?<!\w)'(?:[^'\\\n]|\\.|(?<=\w)'(?=\w)){1,1000}'(?!\w)"
)
_WEEKDAY = r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_LITERAL = re.compile(
    "|".join(
        [
            _QUOTED,
            r"\bhttps?://[^\s\"'<>)\]]+|\bwww\.[^\s\"'<>)\]]+",
            r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
            rf"\b{_MONTH}\.?\s+{_DAY}(?:,?\s+\d{{4}})?\b|\b{_DAY}\s+(?:of\s+)?{_MONTH}\b\.?(?:,?\s+\d{{4}})?",
            rf"\b{_MONTH},?\s+\d{{4}}\b",
            _WEEKDAY,
            # Numbers, numeric dates and times, and every word that contains a digit (ids, UUIDs, versions).
            r"(?<![\w-])[\w-]*\d[\w-]*(?:[.,:/+-][\w-]*\d[\w-]*)*"
            r"(?:\s?[ap]\.?m\b\.?)?(?:\s?(?:UTC|GMT|CES?T|[ECMP][SD]T)\b)?",
        ]
    )
)
_RUN = re.compile(r"<\*>(?:[\s,;]*<\*>)+")
_QUOTED_ONLY = re.compile(_QUOTED)


def signature_of(request: dict[str, Any]) -> str:
    """SHA-256 (hex) of what the call site keeps constant.

    Independent of literals in the system prompt, of white space, and of the order of tools and of JSON keys. About
    0.05 ms where the system prompt and the tools were seen before.
    """
    system = system_text(request)
    template = _cached(system, _read_template).sha if system else _NO_SYSTEM
    return _sha(f"{template}\n{surface_of(request)}")


def surface_of(request: dict[str, Any]) -> str:
    """SHA-256 (hex) of the tools on offer and the response format."""
    tools = request.get("tools") or request.get("functions")
    return _cached(_dumps([tools, request.get("response_format")]), _read_surface)


def abstract_line(line: str) -> str:
    """One line with literals replaced by a wildcard and white space folded.

    Example:
        >>> abstract_line("  Today is Monday, May 15, 2024; order A-17 of bob@example.com")
        'Today is <*>; order <*> of <*>'
    """
    return _abstract_cached(line) if len(line) <= _MAX_CACHED_LINE else _abstract(line)


def abstract_text(text: str) -> str:
    """Abstract every line; blank lines are dropped."""
    return "\n".join(filter(None, map(abstract_line, text.splitlines())))


def system_text(request: dict[str, Any]) -> str:
    """Text of the leading system and developer messages; empty where there is none."""
    texts = []
    for message in request.get("messages") or []:
        if message.get("role") not in ("system", "developer"):
            break
        texts.append(message_text(message))
    return "\n".join(texts).strip()


def last_user_text(request: dict[str, Any]) -> str:
    """Text of the last user message, or of the last message where no user speaks."""
    messages = request.get("messages") or [{}]
    spoken = [m for m in messages if m.get("role") == "user"]
    return message_text((spoken or messages)[-1])


def message_text(message: dict[str, Any]) -> str:
    """Content as text; parts that are not text are named by their type."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(p.get("text") or f"[{p.get('type')}]" if isinstance(p, dict) else str(p) for p in content)
    return content if isinstance(content, str) else ""


def variable_text(request: dict[str, Any]) -> str:
    """What may differ between two calls of one signature: quoted words of the system prompt, and the last user message."""
    system = system_text(request)
    literals = _cached(system, _read_template).literals if system else ""
    return f"{literals}\n{last_user_text(request)}"


def template_lines(text: str) -> list[str]:
    """Abstracted lines of three words or more, and the opening words, marked by a leading caret.

    Lines that recur between calls are written by a program. The opening stands for a template whose slot is on its
    first line ("Translate to French: ...").
    """
    lines = abstract_text(text).splitlines()
    if not lines:
        return []
    head, colon, _ = lines[0].partition(":")
    is_label = bool(colon) and len(head) <= _MAX_OPENING
    opening = head if is_label else " ".join(lines[0].split()[:_MIN_TEMPLATE_WORDS])
    return [f"^{opening.lower()}", *(line for line in lines if len(line.split()) >= _MIN_TEMPLATE_WORDS)]


def tool_names(request: dict[str, Any]) -> tuple[str, ...]:
    """Sorted names of the tools on offer."""
    return tuple(
        sorted(str(_function(tool).get("name")) for tool in request.get("tools") or request.get("functions") or [])
    )


class _Template(NamedTuple):
    sha: str
    literals: str


_cache: OrderedDict[tuple[str, bytes], Any] = OrderedDict()


def _cached(raw: str, read: Any) -> Any:
    """`read(raw)`, remembered by the hash of `raw`; oldest entries leave first."""
    key = (read.__name__, hashlib.blake2b(raw.encode("utf-8", "surrogatepass"), digest_size=16).digest())
    value = _cache.get(key)
    if value is None:
        value = _cache[key] = read(raw)
        if len(_cache) > _MAX_CACHED:
            _cache.popitem(last=False)
    return value


def _read_template(system: str) -> _Template:
    literals = " ".join(_QUOTED_ONLY.findall(system))[:_MAX_LITERALS]
    return _Template(_sha(abstract_text(system)), literals)


def _read_surface(raw: str) -> str:
    """Hash of tools and response format, from their JSON."""
    tools, response_format = json.loads(raw)
    signatures = sorted(_dumps(_without_descriptions(_function(tool)), sort_keys=True) for tool in tools or [])
    return _sha(_dumps([signatures, _without_descriptions(response_format)], sort_keys=True))


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """Name and argument schema, from the `tools` form, the older `functions` form, or a tool known by its type."""
    inner = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    return {"name": inner.get("name") or tool.get("type"), "parameters": inner.get("parameters")}


def _without_descriptions(schema: Any, *, is_names: bool = False) -> Any:
    """Drop `description` annotations, but keep an argument that is called description."""
    if isinstance(schema, list):
        return [_without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_descriptions(value, is_names=not is_names and key in ("properties", "$defs", "definitions"))
        for key, value in schema.items()
        if is_names or key != "description"
    }


def _abstract(line: str) -> str:
    folded = " ".join(_LITERAL.sub(WILDCARD, line).split())
    return _RUN.sub(WILDCARD, folded)


_abstract_cached = functools.lru_cache(maxsize=4096)(_abstract)


def _dumps(value: Any, *, sort_keys: bool = False) -> str:
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
