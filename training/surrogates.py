"""A personal value -> a made-up one of the same shape, the same for the same key, scope and value.

Digits stay digits and letters letters, separators stay, cards keep a valid Luhn number (ISO/IEC 7812), IBANs valid
check digits (ISO 13616), names come from Faker's lists and keep their case. Nothing is remembered: a surrogate follows
from an HMAC alone, so it cannot be computed or undone without the key. Knows nothing of where values are found.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import hmac
import re
from collections.abc import Iterable

from training.findings import Finding, Kind, is_name

MAX_TRIES = 50
"""A surrogate that stands for something else already is made anew at most so often; only tiny values come near it."""


class SurrogateMaker:
    """Makes the surrogates of one scope."""

    def __init__(self, key: bytes, scope: str) -> None:
        """
        Args:
            scope: inside one scope a value has one surrogate; between scopes surrogates tell nothing.
        """
        self._key = hmac.digest(key, b"scope:" + scope.encode(errors="surrogatepass"), "sha256")

    def make(self, findings: Iterable[Finding], text: str = "") -> dict[str, str]:
        """Surrogate of every value, names by their casefolded form and in lower case.

        No surrogate equals a value that is itself replaced, two values share one only where they are two spellings of one
        number, and none occurs in `text`, so that each can be traced back by who holds the table.

        Args:
            text: everything that is said in the scope.
        """
        # E-mail addresses last: they may hold an id.
        values = sorted(set(findings), key=lambda f: (f.kind == "EMAIL_ADDRESS", f.kind, f.value))
        names = {finding.value.casefold(): finding.kind for finding in reversed(values) if is_name(finding.kind)}
        said = text.casefold()
        surrogates: dict[str, str] = {}
        for name in sorted(names):
            surrogates[name] = self._name(name, names[name], {*names, *surrogates.values()}, said)
        owners = {surrogate: name for name, surrogate in surrogates.items()}
        for value, kind, _ in values:
            if not is_name(kind) and value not in surrogates:
                surrogates[value] = made = self._unused(value, kind, surrogates, owners, said)
                owners[made] = _bare(value)
        return surrogates

    def _unused(self, value: str, kind: Kind, surrogates: dict[str, str], owners: dict[str, str], said: str) -> str:
        made = value
        for attempt in range(MAX_TRIES):
            made = self._value(value, kind, surrogates, attempt)
            if owners.get(made, _bare(value)) == _bare(value) and made.casefold() not in said and made != value:
                break
        return made

    def _name(self, name: str, kind: Kind, taken: set[str], said: str) -> str:
        pool = _name_pool(kind)
        stream = self._stream("name", name)
        start = stream.below(len(pool))
        for candidate in (*pool[start:], *pool[:start]):
            if candidate not in taken and candidate not in said:
                return candidate
        # More people than Faker knows.
        made = name
        while made in taken or made in said:
            made = _scramble("x" * 8, stream)
        return made

    def _value(self, value: str, kind: Kind, surrogates: dict[str, str], attempt: int) -> str:
        # Spellings of one number get one surrogate: "555-1234" and "5551234".
        stream = self._stream(f"{kind}{attempt or ''}", _bare(value))
        match kind:
            case "EMAIL_ADDRESS":
                return _email(value, stream, surrogates)
            case "ID_NUMBER":
                return _identifier(value, stream, surrogates)
            case "STREET_ADDRESS":
                return self._street(value, stream, attempt)
            case "ADDRESS_PLACE":
                return _place(value, stream)
            case "DATE_OF_BIRTH":
                return self._date(value, stream)
            case "PHONE_NUMBER":
                return _phone(value, stream)
            case "CREDIT_CARD":
                return _with_luhn(value[0] + _scramble(value[1:], stream))
            case "IBAN_CODE":
                return _with_iban_check(value[:4] + _scramble(value[4:], stream))
            case "IP_ADDRESS" if "." in value and ":" not in value:
                return ".".join(_octet(part, stream) for part in value.split("."))
            case "IP_ADDRESS":
                return "".join(f"{stream.below(16):x}" if c in "0123456789abcdefABCDEF" else c for c in value)
            case _:
                return _scramble(value, stream)

    def _street(self, value: str, stream: _Stream, attempt: int) -> str:
        """House number and street name are changed, the name by its words, so that it is the same with another number."""
        pool = _name_pool("LAST_NAME")

        def replace(match: re.Match[str]) -> str:
            word = match[0]
            if word[0].isdigit():
                digits = re.match(r"[0-9]*", word)
                return _scramble(word[: digits.end()], stream) + word[digits.end() :] if digits else word
            if word.casefold() in _STREET_WORDS or len(word) == 1:
                return word
            kind = _STREET_ENDING.search(word)
            index = self._stream(f"street{attempt or ''}", word.casefold()).below(len(pool))
            return match_case(pool[index], word) + (kind[0] if kind else "")

        return re.sub(r"\d\w*|[^\W\d_]+(?:'[^\W\d_]+)?", replace, value)

    def _date(self, value: str, stream: _Stream) -> str:
        """Another valid date of the same form. ISO dates of a scope all move by the same days, so they keep their order."""
        try:
            day = datetime.date.fromisoformat(value)
        except ValueError:
            return _other_date(value, stream)
        shift = self._stream("shift", "dates")
        days = (200 + shift.below(1200)) * (1 if shift.below(2) else -1)
        return (day + datetime.timedelta(days)).isoformat()

    def _stream(self, kind: str, value: str) -> _Stream:
        return _Stream(hmac.digest(self._key, f"{kind}:{value}".encode(errors="surrogatepass"), "sha256"))


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

    from training.word_lists import AMBIGUOUS_NAMES

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


def _bare(value: str) -> str:
    return re.sub(r"[\W_]", "", value).casefold() or value


def _email(value: str, stream: _Stream, names: dict[str, str]) -> str:
    """Names and ids inside the local part as elsewhere in the scope; the domain is one reserved by RFC 2606."""
    local, _, _ = value.partition("@")
    domain = "@example." + ("com", "org", "net")[stream.below(3)]
    if local in names:
        return names[local] + domain

    def replace(match: re.Match[str]) -> str:
        word = match[0]
        return match_case(names[word.casefold()], word) if word.casefold() in names else _scramble(word, stream)

    return re.sub(r"[^\W\d_]+|\d+", replace, local) + domain


def _identifier(value: str, stream: _Stream, names: dict[str, str]) -> str:
    """Names inside as elsewhere in the scope; the words that say what it is, as in credit_card_1234567, stay."""

    def replace(match: re.Match[str]) -> str:
        word = match[0]
        if word.casefold() in names:
            return match_case(names[word.casefold()], word)
        return word if word.isalpha() and "_" in value else _scramble(word, stream)

    return re.sub(r"[^\W\d_]+|\d+", replace, value)


def _place(value: str, stream: _Stream) -> str:
    """Another city, and another state where one is named; separators and the country stay."""
    from faker.providers.address import en_US

    from training.word_lists import us_cities

    cities, states = us_cities(), en_US.Provider.states_abbr
    parts = re.split(
        r"([\s,;-]*[,;\n][\s,;-]*|\s+(?=(?:[A-Z]{2,3}|USA|U\.S\.A\.|United States.*)$))", value, maxsplit=1
    )
    parts[0] = match_case(cities[stream.below(len(cities))].casefold(), parts[0])
    if len(parts) == 3 and parts[2] in states:
        parts[2] = states[stream.below(len(states))]
    return "".join(parts)


def _other_date(value: str, stream: _Stream) -> str:
    """Day, month and a year within a few years of the true one; names of months stay."""

    def replace(match: re.Match[str]) -> str:
        number, ordinal = match[1], match[2]
        if len(number) == 4:
            return str(int(number) - 4 + stream.below(9)).zfill(4)
        if ordinal:
            return f"{4 + stream.below(17)}th"
        # Day or month: 1 to 12 is valid for both, whatever the order.
        return str(stream.below(9) + 1 if len(number) == 1 else stream.below(12) + 1).zfill(len(number))

    return re.sub(r"(\d+)(st|nd|rd|th)?", replace, value, flags=re.I)


def _phone(value: str, stream: _Stream) -> str:
    """The country's code stays; area code and exchange keep their place in the numbering plan of North America."""
    code = re.match(r"\+\d{1,3}(?=\D)", value)
    head = code[0] if code else ""
    made = list(head + _scramble(value[len(head) :], stream))
    places = [index for index, c in enumerate(value) if c.isdigit()][-10:]
    if len(places) == 10:
        for index in (places[0], places[3]):
            if value[index] in "23456789" and made[index] in "01":
                made[index] = "23456789"[stream.below(8)]
    return "".join(made)


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
    parkway pkwy highway hwy circle cir trail suite apt unit north south east west ne nw se sw apartment ste flat floor
    fl room building bldg crescent close grove gardens row walk alley loop plaza mews hill rise path box po post office
    rue de la du des le les avenida calle via viale piazza corso rua paseo carrer stra\u00dfe strasse str weg platz allee
    gasse am an der auf dem im zum zur den el los las del di da do dos postfach nd rd th
    """.split()
)
_STREET_ENDING = re.compile(
    r"(?:stra\u00dfe|strasse|str|weg|platz|gasse|allee|damm|ufer|straat|laan|plein|gracht|gatan|v\u00e4gen|vej)$"
)
