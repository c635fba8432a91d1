"""Plain text -> numbers and addresses that identify: e-mail, telephone, card, IBAN, social security number, IP, ids.

One cheap expression finds runs of digits; only what could be such a value reaches the recognisers of Presidio, which
check it (Luhn, IBAN check digits by country, numbering plans). They are called one by one, without Presidio's engine,
and are imported at the first candidate. Source: presidio-analyzer 2.2 predefined recognisers.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

from training.findings import Finding, Kind

ISO_TIME = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?(?!\d)")
_DIGIT = re.compile("[0-9]")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+%'-]{1,64}@(?:[\w-]{1,63}\.){1,6}[A-Za-z]{2,24}(?![\w@-])")
_RUN = re.compile(r"(?<![\w@])(?<!\w[-_])(?:\+|\(\+?)?\d(?:[ \t().\u2010-\u2015/-]{0,3}\d){6,30}(?![\w@])")
_DOTTED = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_COLONS = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|\d{1,3}(?:\.\d{1,3}){3})?(?![\w:])")
_IBAN = re.compile(r"(?<![^\W_])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{1,4}){3,8}(?!\w)")
_SSN = re.compile(r"\d{3}([- .])\d{2}\1\d{4}")
_PHONE_SHAPE = re.compile(r"\(?[2-9]\d{2}\)?[ .-]{1,2}\d{3}[ .-]\d{4}|[2-9]\d{2}[ .-]\d{4}")
_TRUNK = re.compile(r"0\d{1,4}[ )/.-]")
_PHONE_CONTEXT = re.compile(
    r"phone|\bcall|\btel\b|mobile|\bcell|\bfax\b|\btext(?:ed)? me|reach|\bsms\b|contact|dial|(?:my|his|her|their|our) number is|whatsapp|ring me",
    re.I,
)
_SSN_CONTEXT = re.compile(r"\bssn\b|social security|social insurance|tax ?id", re.I)
_CONTEXT_CHARS = 40
_OPAQUE_ID = re.compile(
    r"(?<![^\W_])(?:[a-z]{2,20}_)*(?:card|account|acct|payment|certificate|customer|client|patient|member|user|profile)"
    r"_(?:id_)?\d{5,}(?!\w)"
)


def find_identifiers(text: str) -> Iterator[Finding]:
    """Identifying numbers in plain text of at most some thousand characters."""
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if not match[0].startswith("git@"):
                yield Finding(match[0].lstrip("'"), "EMAIL_ADDRESS")
    if _DIGIT.search(text) is None:
        return
    for match in _RUN.finditer(text):
        yield from _judge_digits(text, match.start(), match.end())
    for match in _DOTTED.finditer(text):
        if _is_ip(match[0]):
            yield Finding(match[0], "IP_ADDRESS")
    if text.count(":") >= 2:
        for match in _COLONS.finditer(text):
            if len(match[0]) > 4 and _is_ip(match[0]):
                yield Finding(match[0], "IP_ADDRESS")
    for match in _IBAN.finditer(text):
        yield from _check("IBAN_CODE", match[0])
    if "_" in text:
        for match in _OPAQUE_ID.finditer(text):
            yield Finding(match[0], "ID_NUMBER")


def _judge_digits(text: str, start: int, end: int) -> Iterator[Finding]:
    """What a run of digits and separators holds: dates are stepped over."""
    time = ISO_TIME.match(text, start)
    if time is not None:
        rest = _RUN.search(text, min(time.end() + 1, end), end)
        if rest is not None:
            yield from _judge_digits(text, rest.start(), rest.end())
        return
    run = text[start:end]
    num_digits = sum(c.isdigit() for c in run)
    before = text[max(0, start - _CONTEXT_CHARS) : start]
    if _SSN.fullmatch(run) or (num_digits == 9 and run.isdigit() and _SSN_CONTEXT.search(before)):
        yield from _check("US_SSN", run) if not run.isdigit() else [Finding(run, "US_SSN")]
        return
    if num_digits >= 12:
        cards = list(_check("CREDIT_CARD", run))
        yield from cards
        if cards:
            return
    if num_digits <= 18:
        yield from _judge_phone(run, before)


def _judge_phone(run: str, before: str) -> Iterator[Finding]:
    """A bare run of digits is a telephone number only near a word that says so: most are ids."""
    if run.lstrip("(").startswith("+"):
        yield Finding(run, "PHONE_NUMBER")
    elif _DOTTED.fullmatch(run) or ISO_TIME.match(run):
        return
    elif (
        (shaped := _PHONE_SHAPE.search(run))
        and len(shaped[0]) >= len(run) - 3
        and (len(shaped[0]) > 8 or _said(before))
    ):
        yield Finding(run, "PHONE_NUMBER")
    elif _said(before) or _TRUNK.match(run.lstrip("(")):
        is_certain = _said(before) and 7 <= sum(c.isdigit() for c in run) <= 15
        yield from [Finding(run, "PHONE_NUMBER")] if is_certain else _check("PHONE_NUMBER", run)


def _said(before: str) -> bool:
    return _PHONE_CONTEXT.search(before) is not None


def _is_ip(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=10_000)
def _check(kind: Kind, value: str) -> tuple[Finding, ...]:
    """What Presidio's recogniser of that kind confirms in `value`."""
    results = _recognizers()[kind].analyze(value, [kind], None) or []
    found = sorted(
        (r for r in results if r.score >= 0.4 or kind == "US_SSN"), key=lambda r: (-r.score, r.start - r.end)
    )
    return tuple(Finding(value[r.start : r.end].strip(), kind) for r in found[:1])


def import_presidio() -> types.ModuleType:
    """Presidio without its engine for transformers' models, which nothing here uses.

    That engine is optional and imports all of transformers as soon as Presidio is imported: half of its seconds, and
    memory in every worker that redacts. A module that is None in `sys.modules` counts as not installed.
    """
    is_loaded = "transformers" in sys.modules
    if not is_loaded:
        sys.modules["transformers"] = None  # type: ignore[assignment]
    try:
        import presidio_analyzer
    finally:
        if not is_loaded:
            del sys.modules["transformers"]
    return presidio_analyzer


@functools.cache
def _recognizers() -> dict[Kind, Any]:
    known = import_presidio().predefined_recognizers

    return {
        "CREDIT_CARD": known.CreditCardRecognizer(),
        "IBAN_CODE": known.IbanRecognizer(),
        "US_SSN": known.UsSsnRecognizer(),
        "PHONE_NUMBER": known.PhoneRecognizer(),
    }
