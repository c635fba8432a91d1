"""A personal value -> a made-up one of the same shape, the same for the same key, scope and value.

Digits stay digits and letters letters, separators stay, cards keep a valid Luhn number (ISO/IEC 7812), IBANs valid
check digits (ISO 13616), names come from Faker's lists and keep their case. Nothing is remembered: a surrogate follows
from an HMAC alone, so it cannot be computed or undone without the key. Knows nothing of where values are found.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
from collections.abc import Iterable

from training.recognisers import Finding, Kind


class SurrogateMaker:
    """Makes the surrogates of one scope."""

    def __init__(self, key: bytes, scope: str) -> None:
        """
        Args:
            scope: inside one scope a value has one surrogate; between scopes surrogates tell nothing.
        """
        self._key = hmac.digest(key, b"scope:" + scope.encode(errors="surrogatepass"), "sha256")

    def make(self, findings: Iterable[Finding]) -> dict[str, str]:
        """Surrogate of every value, names by their casefolded form and in lower case.

        No surrogate equals a name that is itself replaced, and two names never share one.
        """
        values = sorted(set(findings), key=lambda finding: (finding.kind, finding.value))
        names = {finding.value.casefold(): finding.kind for finding in reversed(values) if is_name(finding.kind)}
        surrogates: dict[str, str] = {}
        for name in sorted(names):
            surrogates[name] = self._name(name, names[name], {*names, *surrogates.values()})
        for value, kind, _ in values:
            if not is_name(kind):
                surrogates[value] = self._value(value, kind, surrogates)
        return surrogates

    def _name(self, name: str, kind: Kind, taken: set[str]) -> str:
        pool = _name_pool(kind)
        start = self._stream("name", name).below(len(pool))
        return next(
            pool[(start + i) % len(pool)] for i in range(len(pool)) if pool[(start + i) % len(pool)] not in taken
        )

    def _value(self, value: str, kind: Kind, names: dict[str, str]) -> str:
        # Spellings of one number get one surrogate: "555-1234" and "5551234".
        stream = self._stream(kind, re.sub(r"[\W_]", "", value).casefold() or value)
        if kind == "EMAIL_ADDRESS":
            return _email(value, stream, names)
        if kind == "STREET_ADDRESS":
            return _street(value, stream)
        if kind == "DATE_OF_BIRTH":
            return _date(value, stream)
        if kind == "CREDIT_CARD":
            return _with_luhn(value[0] + _scramble(value[1:], stream))
        if kind == "IBAN_CODE":
            return _with_iban_check(value[:4] + _scramble(value[4:], stream))
        if kind == "IP_ADDRESS" and "." in value:
            return ".".join(_octet(part, stream) for part in value.split("."))
        if kind == "IP_ADDRESS":
            return "".join(f"{stream.below(16):x}" if c in "0123456789abcdefABCDEF" else c for c in value)
        return _scramble(value, stream)

    def _stream(self, kind: str, value: str) -> _Stream:
        return _Stream(hmac.digest(self._key, f"{kind}:{value}".encode(errors="surrogatepass"), "sha256"))


def is_name(kind: Kind) -> bool:
    """Whether a kind of value is a word of a person's name."""
    return kind in ("FIRST_NAME", "LAST_NAME")


def is_luhn_valid(number: str) -> bool:
    """Whether the digits of `number` end in their Luhn check digit.

    Example:
        >>> is_luhn_valid("4539 5787 6362 1486")
        True
    """
    digits = [int(c) for c in reversed(number) if c.isdigit()]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0


class _Stream:
    """Endless choices that follow from one seed."""

    def __init__(self, seed: bytes) -> None:
        self._seed, self._count, self._bytes = seed, 0, b""

    def below(self, bound: int) -> int:
        """A number in [0, bound); bound at most 10,000, so that the remainder's bias stays below 1e-5."""
        if len(self._bytes) < 4:
            self._bytes += hashlib.blake2b(self._count.to_bytes(8, "big"), key=self._seed).digest()
            self._count += 1
        number, self._bytes = int.from_bytes(self._bytes[:4], "big"), self._bytes[4:]
        return number % bound


@functools.cache
def _name_pool(kind: Kind) -> tuple[str, ...]:
    from faker.providers.person import en_US

    from training.recognisers import AMBIGUOUS_NAMES

    names = en_US.Provider.first_names if kind == "FIRST_NAME" else en_US.Provider.last_names
    return tuple(sorted({n.casefold() for n in names if n.isascii() and n.isalpha()} - AMBIGUOUS_NAMES))


def _scramble(value: str, stream: _Stream) -> str:
    """Digits to digits and letters to letters; a leading digit that is not 0 stays so, for JSON numbers."""
    result = []
    for index, c in enumerate(value):
        if c.isdigit():
            is_leading = index == 0 and c != "0"
            result.append(str(stream.below(9) + 1 if is_leading else stream.below(10)))
        elif c.isalpha():
            letter = chr(ord("a") + stream.below(26))
            result.append(letter.upper() if c.isupper() else letter)
        else:
            result.append(c)
    return "".join(result)


def _email(value: str, stream: _Stream, names: dict[str, str]) -> str:
    """Names inside the local part as elsewhere in the scope; the domain is one reserved by RFC 2606."""
    local, _, _ = value.partition("@")

    def replace(match: re.Match[str]) -> str:
        word = match[0]
        return match_case(names[word.casefold()], word) if word.casefold() in names else _scramble(word, stream)

    return re.sub(r"[^\W\d_]+|\d+", replace, local) + "@example." + ("com", "org", "net")[stream.below(3)]


def _street(value: str, stream: _Stream) -> str:
    """House number and street name are changed; the kind of street and words such as Suite stay."""
    pool = _name_pool("LAST_NAME")

    def replace(match: re.Match[str]) -> str:
        word = match[0]
        if word[0].isdigit():
            return _scramble(word, stream)
        is_kept = word.casefold() in _STREET_WORDS or len(word) == 1
        return word if is_kept else match_case(pool[stream.below(len(pool))], word)

    return re.sub(r"\d\w*|[^\W\d_]+(?:'[^\W\d_]+)?", replace, value)


def _date(value: str, stream: _Stream) -> str:
    """Another valid date of the same form, the year within a few years of the true one."""
    parts = re.split(r"([/.-])", value)
    for index in range(0, len(parts), 2):
        width = len(parts[index])
        if width == 4:
            parts[index] = str(int(parts[index]) - 4 + stream.below(9)).zfill(4)
        else:
            # Day or month: 1 to 12 is valid for both, whatever the order.
            number = stream.below(9) + 1 if width == 1 else stream.below(12) + 1
            parts[index] = str(number).zfill(width)
    return "".join(parts)


def _with_luhn(number: str) -> str:
    """`number` with its last digit set so that the Luhn sum holds."""
    last = max(index for index, c in enumerate(number) if c.isdigit())
    return next(t for d in "0123456789" if is_luhn_valid(t := number[:last] + d + number[last + 1 :]))


def _with_iban_check(iban: str) -> str:
    compact = re.sub(r"\s", "", iban).upper()
    number = int("".join(str(int(c, 36)) for c in compact[4:] + compact[:2] + "00"))
    return f"{iban[:2]}{98 - number % 97:02d}{iban[4:]}"


def _octet(part: str, stream: _Stream) -> str:
    low, size = {1: (1, 9), 2: (10, 90), 3: (100, 155)}.get(len(part), (0, 10))
    return str(low + stream.below(size))


def match_case(word: str, like: str) -> str:
    """`word` in the case of `like`: lower, upper, or with a capital.

    Example:
        >>> match_case("fox", "LI")
        'FOX'
    """
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word if like.islower() else word.capitalize()


_STREET_WORDS = frozenset(
    """street st avenue ave road rd drive dr lane ln boulevard blvd court ct way place pl terrace square sq
    parkway pkwy highway hwy circle cir trail suite apt unit north south east west
    """.split()
)
