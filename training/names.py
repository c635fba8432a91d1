"""Plain text -> the words in it that name a person: by what is said about them, by lists, by their place in a run.

Three kinds of evidence, strongest first: a phrase that introduces a name ("my name is", "a table under", "Dr."), a first
name of a list beside a last name or alone, a last name alone. A run of capitalised words is judged as a whole, since
"Wells Fargo" and "Madison Square" hold names too. Lower-case names are found where a phrase expects one, as a pair that
both lists know, and where they are the whole message. Knows neither JSON nor other kinds of values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from training.findings import Finding, Kind
from training.word_lists import (
    AMBIGUOUS_NAMES,
    NO_LAST_NAME,
    PLAIN_WORDS,
    all_names,
    common_words,
    first_names,
    last_names,
    places,
)

MAX_NAME_MESSAGE_CHARS = 60
"""A longer message says more than a name."""

_LETTERS = r"(?:[^\W\d_]|['\u2019-](?=[^\W\d_])){1,24}"
_CAPITAL = rf"[A-Z\u00c0-\u00de\u0150\u015a\u017b\u0130\u015e\u0160\u017d\u010c]{_LETTERS}"
_NAME = rf"[^\W\d_]{_LETTERS}"
_INITIAL = r"(?: [A-Za-z]\.)?"
_CAPITALS = rf"{_CAPITAL}{_INITIAL}(?: {_CAPITAL}){{0,2}}"
_NAMES = rf"{_NAME}{_INITIAL}(?: {_NAME}){{0,2}}"
_NAME_WORD = re.compile(_NAME)
_PARTICLES = frozenset("van von der den de da del di la le bin ibn al el dos du".split())

RUN = re.compile(
    rf"(?<![\w@/-]){_CAPITAL}(?: (?:[A-Z]\.|(?:van|von|de|da|del|der|bin|al) )? ?{_CAPITAL}){{0,5}}(?![\w@/])"
)
_DIGIT = re.compile("[0-9]")
_NAMED_ID = re.compile(r"(?<![^\W_])([a-z]{2,20})[_.]([a-z]{2,20})_?(\d{2,})(?![\w@])")
_WORD_BEFORE = re.compile(
    r"(?:San|Santa|Santo|Sao|Los|Las|El|La|Saint|St|New|Port|Fort|Lake|Mount|Mt|Prince|Princess)$"
)

_IS_EXPLICIT = re.compile(r"\bmy names?\b|\bname(?:'s| is| was)\b|\b(?:mrs?|ms|miss|dr|doctor|prof)\b", re.I)
"""After these, a word of the language is a name as well."""

# Each with a word that must be in the text for the pattern to be tried. Those of _LOWER are tried on the text in lower
# case, which is several times as fast as to ignore case.
_ONE_NAME: tuple[tuple[str, re.Pattern[str], Kind], ...] = (
    ("first name", re.compile(rf"\bfirst name(?: is|'s|:)? ({_NAME})"), "FIRST_NAME"),
    ("given name", re.compile(rf"\bgiven name(?: is|'s|:)? ({_NAME})"), "FIRST_NAME"),
    ("name", re.compile(rf"\b(?:last|family|maiden|middle) name(?: is|'s|:| of)? ({_NAME})"), "LAST_NAME"),
    ("surname", re.compile(rf"\bsurname(?: is|'s|:| of)? ({_NAME})"), "LAST_NAME"),
)
_LOWER = (
    (
        "name",
        re.compile(
            r"\b(?:(?:my|full|his|her|their|our|the|partner's|wife's|husband's|son's|daughter's|guest's|passenger's"
            r"|patient's) name(?: is| was|'s| to be|s|:)?:?|(?:under|in|on|by|with|for|of|same|is) (?:the |my |a )?"
            rf"(?:same )?name(?: of| is|:)?|names? (?:is|are|of)|name on (?:it|file) is) ({_NAMES})"
        ),
    ),
    ("name", re.compile(rf"(?:^|[.!?,] )({_NAMES}) is (?:the|my) name\b")),
    ("mr", re.compile(rf"\bmrs?\.? ({_NAMES})")),
    (
        "under",
        re.compile(
            r"\b(?:reservation|booking|table|booked|reserved|listed|made|be|is|it|it's|people|one|two|\d+) "
            rf"under ({_NAMES})"
        ),
    ),
    ("me ", re.compile(rf"\bcalls? me ({_NAMES})")),
    ("go by", re.compile(rf"\bgo by ({_NAMES})")),
    ("speaking", re.compile(rf"(?:^|it's |this is |[.,!] )({_NAMES}) speaking\b")),
    (" here", re.compile(rf"^(?:hi,? |hello,? |hey,? )?({_NAMES}) here\b")),
    ("standing order to", re.compile(rf"\bstanding order to ({_NAMES})")),
)
_AS_WRITTEN = (
    ("ms", re.compile(rf"\bMs\.? ({_CAPITALS})")),
    ("miss", re.compile(rf"\bMiss ({_CAPITALS})")),
    ("dr", re.compile(rf"\b(?:Dr|DR)\.? ({_CAPITALS})")),
    ("doctor", re.compile(rf"\b[Dd]octor ({_CAPITALS})")),
    ("prof", re.compile(rf"\b[Pp]rof(?:essor|\.)? ({_CAPITALS})")),
    ("behalf of", re.compile(rf"\bbehalf of ({_CAPITALS})")),
)
_PAID = re.compile(
    r"\b(?:(?:transfer|transfers|transferred|sen[dt]|payments?|money|order|debit|wire|wired|made|resend"
    r"|pay|paid|recipient|transaction|transactions|amount|dollars|euros|pounds|[\d.]+ ?[$\u00a3\u20ac]?)(?: (?:it|that|this|them|"
    r"some|should|go|will|[\d.]+ ?[$\u00a3\u20ac]?|[$\u00a3\u20ac][\d.]+)){0,3},? (?:to|from))"
    rf" ({_NAMES})"
)
_PAID_ONE = re.compile(rf"\b(?:pay|paid|owe|owed) ({_NAMES})")
_PAID_CUES = tuple(
    "transfer send sent pay paid owe money order debit wire recipient transaction amount dollar euro pound $ \u00a3 \u20ac".split()
)
_BOOKED = re.compile(
    rf"\b(?:table|reservation|booking|booked|book|reserved|reserve|appointment|check-in|lunch|dinner)\b[^.?!]{{0,60}}?"
    rf" (?:for|with|by|name|under) ({_CAPITALS})"
)
_ADDRESSED = re.compile(
    r"\b(?:I'm|I am|am|[Tt]his is|[Ii]t's|[Ii]t is|[Tt]hank you,?|[Tt]hanks,?|Hi,?|Hello,?|Hey,?|Dear|[Nn]amed|[Cc]alled"
    rf"|[Pp]assengers?:?|[Pp]atient:?|[Gg]uests?:?|[Nn]ame:?\*{{0,2}}:?|with) +({_CAPITALS})"
)
_SAID_BY = re.compile(rf"\b(?:says|said|explains|explained|adds|added|replies|replied|wrote) ({_CAPITALS})")
_SIGNED = re.compile(rf"(?:[Rr]egards|[Ss]incerely|[Cc]heers|[Tt]hanks|[Bb]est),?\s{{1,4}}({_CAPITALS})\s*$")
_NO_PERSON_BEFORE = re.compile(r"(?:\b[Ii]n |\b[Nn]ear |\b[Vv]isit(?:ing)? |['\"\u2018\u201c])$")
"""Before a name alone: then it is a place, or a last name in the title of a work."""
_WORKS = re.compile(
    r"\b(?:[Mm]ovies?|[Ff]ilms?|[Cc]ast|[Aa]ctors?|[Aa]ctress|[Dd]irector|directed|starring|[Ss]ongs?|[Aa]lbums?|[Tt]racks?"
    r"|[Ss]ingers?|[Mm]usicians?|[Mm]usic|[Dd]ramas?|[Cc]omed(?:y|ies)|[Tt]hrillers?|[Nn]ovels?|[Pp]aintings?"
    r"|[Ss]culptures?|[Ss]culptor|playlist|[Cc]oncerts?|[Pp]layers?|stats|footballer|[Pp]residen(?:t|cy)|[Ll]egal case|world rank"
    r"|fan)\b"
)
_CREDITED = re.compile(
    r"\b(?:[Ww]ith|(?:directed|acted|written|produced|performed|composed|sung|made|published|songs?|movies?|films?|music|albums?"
    r"|tracks?|something|anything|sculptures?|paintings?|art|novels?|books?|[A-Z]\w+) by|featur(?:ing|es?)|starring|stars?|actors?|actress|[Dd]irectors?|artists?|singers?|like|cast|has"
    r"|have|having|include|includes|including|sculptor|musician|where|that|player|footballer|athlete|named|stats of|stats for|record of|rating of|rank of|sculptures? of"
    r"|concert of|presidency of|big|[Vv]s\.?)[ '\"]{1,2}$"
)
"""A person named as the maker of a work or one who plays in it is no party to the conversation: the task is about them."""
_MESSAGE = re.compile(rf"\s*({_NAME})(?:,? ({_NAME}))?(?: ({_NAME}))?[.!,]?\s*")


def find_names(text: str) -> Iterator[Finding]:
    """Words of persons' names in plain text of at most some thousand characters."""
    yield from _find_introduced(text)
    for match in RUN.finditer(text):
        if not _known_words().isdisjoint(map(_plain_form, match[0].split())) and not _is_credited(text, match.start()):
            yield from _judge_run(match[0], text, match.start())
    yield from _find_lower_pairs(text)
    if "_" in text or ("." in text and _DIGIT.search(text) is not None):
        for match in _NAMED_ID.finditer(text):
            if match[1] in first_names() and match[2] in last_names():
                yield from words_as(match[1], "FIRST_NAME")
                yield from words_as(match[2], "LAST_NAME")
                if "_" in match[0]:
                    yield Finding(match[0], "ID_NUMBER")


def full_name(words: list[str], *, is_certain: bool) -> Iterator[Finding]:
    """First word as first name, the others as last names; uncertain ones only if a list knows the first name."""
    if not words or len(words) > 4:
        return
    if is_certain:
        yield from words_as(words[0], "FIRST_NAME")
        for word in words[1:]:
            yield from words_as(word, "LAST_NAME")
        return
    head, tail = _plain_form(words[0]), [_plain_form(word) for word in words[1:]]
    if head not in first_names() or head in PLAIN_WORDS or NO_LAST_NAME.intersection((head, *tail)):
        return
    if len(head) <= 4 and words[0].isupper():
        # A code, such as the airport MIA.
        return
    has_last = bool(tail) and tail[-1] in last_names() and tail[-1] not in PLAIN_WORDS
    if _is_doubtful(head) and not has_last:
        return
    if tail and not has_last and (tail[-1] in AMBIGUOUS_NAMES or tail[-1] in common_words() or tail[-1] in places()):
        words = words[:1]
    yield from words_as(words[0], "FIRST_NAME")
    for word in words[1:]:
        yield from words_as(word, "LAST_NAME", is_sure=_plain_form(word) in last_names())


def words_as(text: str, kind: Kind, *, is_sure: bool = True) -> Iterator[Finding]:
    """The words of `text` that can be a name, as findings of one kind."""
    for word in _NAME_WORD.findall(text):
        word = word[:-2] if word.endswith(("'s", "\u2019s")) else word
        if word.casefold() not in PLAIN_WORDS and word.casefold() not in _PARTICLES:
            yield Finding(word, kind, is_sure)


def _is_doubtful(name: str) -> bool:
    """Whether a first name alone proves nothing."""
    return name in AMBIGUOUS_NAMES or name in common_words() or name in places()


def _plain_form(word: str) -> str:
    """Lower case, without the sign of possession. Called for most words, so no expression is used."""
    form = word.casefold()
    if form.endswith(("'s", "\u2019s")):
        return form[:-2]
    return form.rstrip("'\u2019")


def _find_introduced(text: str) -> Iterator[Finding]:
    low = _lower(text)
    for cue, pattern, kind in _ONE_NAME:
        if cue in low:
            for match in pattern.finditer(low):
                word = text[match.start(1) : match.end(1)]
                if _is_expected(word):
                    yield from words_as(word, kind)
    for patterns, subject in ((_LOWER, low), (_AS_WRITTEN, text)):
        for cue, pattern in patterns:
            if cue in low:
                for match in pattern.finditer(subject):
                    words = _leading_names(text[match.start(1) : match.end(1)].split())
                    if not _is_all_common(words) or _IS_EXPLICIT.search(match[0]):
                        yield from full_name(words, is_certain=True)
    if any(cue in low for cue in _PAID_CUES):
        for match in _PAID.finditer(low):
            words = text[match.start(1) : match.end(1)].split()
            yield from full_name(_leading_names(words, is_money=True), is_certain=True)
        for match in _PAID_ONE.finditer(low):
            words = _leading_names(text[match.start(1) : match.end(1)].split(), is_money=True)
            yield from full_name(words, is_certain=any(_plain_form(word) in all_names() for word in words))
    if low[1:] != text[1:]:
        yield from _find_addressed(text, low)


def _find_addressed(text: str, low: str) -> Iterator[Finding]:
    """Capitalised names after a word that a name often follows."""
    if "book" in low or "reserv" in low or "table" in low:
        for match in _BOOKED.finditer(text):
            words = _leading_names(match[1].split())
            if not _is_all_common(words):
                yield from full_name(words, is_certain=True)
    for match in _ADDRESSED.finditer(text):
        if _is_credited(text, match.start(1)):
            continue
        words = _leading_names(match[1].split())
        is_pair = len(words) >= 2 and all(_plain_form(word) not in common_words() for word in words)
        yield from full_name(words, is_certain=is_pair and any(_plain_form(word) in all_names() for word in words))
    for match in _SAID_BY.finditer(text):
        words = _leading_names(match[1].split())
        yield from full_name(words, is_certain=all(_plain_form(word) in all_names() for word in words))
    if any(cue in low for cue in ("regards", "sincerely", "cheers", "thanks", "best")):
        for match in _SIGNED.finditer(text):
            words = _leading_names(match[1].split())
            yield from full_name(words, is_certain=any(_plain_form(word) in all_names() for word in words))


def _lower(text: str) -> str:
    """Lower case of equal length, so that positions stay."""
    low = text.lower()
    if len(low) == len(text):
        return low
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _is_expected(word: str) -> bool:
    """Whether a word in a name's place can be one: in lower case, words that are no names are many."""
    form = _plain_form(word)
    return form not in PLAIN_WORDS and not (word.islower() and (form in common_words() or form in places()))


def _leading_names(words: list[str], *, is_money: bool = False) -> list[str]:
    """The words up to the first that is no name, as in "my name is anna and".

    Where money goes somewhere, a name has to look like one: that is also how shops, banks and countries are named.
    """
    kept: list[str] = []
    for word in words:
        form = _plain_form(word)
        is_initial = len(form.strip(".")) == 1
        if is_initial and kept:
            continue
        is_code = bool(kept) and word.isupper() and len(word) <= 3 and not kept[0].isupper()
        if form in PLAIN_WORDS or is_code or (kept and word.islower() and not kept[0].islower()):
            break
        if word.islower() and (form in common_words() or form in places()) and not (kept and form in last_names()):
            break
        if is_money and (
            _is_all_common([word])
            or (word.islower() and "-" in word)
            or (not word.islower() and form not in all_names())
        ):
            break
        kept.append(word)
    if is_money and kept and (_plain_form(kept[0]) in places() or len(kept[0]) < 3):
        return []
    return kept


def _is_credited(text: str, start: int) -> bool:
    """Whether the run of capitals at `start` is named as one who made a work or plays in it."""
    before = text[max(0, start - 20) : start]
    return _CREDITED.search(before) is not None and _WORKS.search(text) is not None


@functools.cache
def _known_words() -> frozenset[str]:
    return (first_names() | last_names()) - PLAIN_WORDS


@functools.cache
def _certain_first_names() -> frozenset[str]:
    return frozenset(name for name in first_names() if not _is_doubtful(name))


def _is_all_common(words: list[str]) -> bool:
    """Whether each word is one of the language or a place, as in "a table for Monday"."""
    forms = [_plain_form(word) for word in words]
    return all(form in common_words() or form in places() or form.removesuffix("s") in common_words() for form in forms)


def _judge_run(run: str, text: str, start: int) -> Iterator[Finding]:
    """Names in a run of capitalised words."""
    words = run.split()
    if len(words) == 1:
        yield from _judge_single(words[0], text, start)
        return
    first, last = first_names(), last_names()
    index = 0
    while index < len(words):
        head = _plain_form(words[index])
        is_placed = index > 0 and _WORD_BEFORE.search(words[index - 1])
        if head not in first or head in PLAIN_WORDS or is_placed or words[index].endswith(("'s", "\u2019s")):
            index += 1
            continue
        end = index + 1
        while end < len(words) and end - index < 3:
            form = _plain_form(words[end])
            if form in PLAIN_WORDS or form in _PARTICLES or form in NO_LAST_NAME:
                break
            end += 1
        if end < len(words) and _plain_form(words[end]) in NO_LAST_NAME:
            index = end + 1
            continue
        if end == index + 1:
            yield from _judge_single(words[index], text, start + run.find(words[index]))
        else:
            yield from full_name(words[index:end], is_certain=False)
        index = end
    rest = [word for word in words if _plain_form(word) not in PLAIN_WORDS]
    if len(rest) == 1 and _plain_form(rest[0]) in last - first:
        yield from _judge_single(rest[0], text, start + run.find(rest[0]))


def _judge_single(word: str, text: str, start: int) -> Iterator[Finding]:
    form = _plain_form(word)
    if form in PLAIN_WORDS or form in NO_LAST_NAME or _is_doubtful(form):
        return
    if word.isupper() or start and _WORD_BEFORE.search(text, max(0, start - 12), start - 1):
        return
    before = _NO_PERSON_BEFORE.search(text, max(0, start - 10), start)
    if before is not None and before[0].endswith(" "):
        return
    if form in first_names() and (len(form) > 3 or text[start + len(word) : start + len(word) + 1] != "-"):
        yield from words_as(word, "FIRST_NAME")
    elif form in last_names() and len(form) > 2 and before is None:
        yield from words_as(word, "LAST_NAME")


def _find_lower_pairs(text: str) -> Iterator[Finding]:
    """Lower-case pairs of an unambiguous first name and a last name."""
    words = text.split(" ")
    known = _certain_first_names()
    if known.isdisjoint(words):
        return
    for index, word in enumerate(words[:-1]):
        if word in known:
            after = words[index + 1].strip(".,!?;:")
            if after in last_names() and after.islower() and after not in common_words():
                yield Finding(word, "FIRST_NAME")
                yield Finding(after, "LAST_NAME")


def find_whole_name(text: str) -> Iterator[Finding]:
    """A message that is nothing but a name, as the answer to a question for it."""
    match = _MESSAGE.fullmatch(text)
    if match is None:
        return
    words = [word for word in match.groups() if word]
    forms = [_plain_form(word) for word in words]
    if any(form in PLAIN_WORDS or form in NO_LAST_NAME for form in forms) or " ".join(forms) in places():
        return
    is_listed = [form in all_names() and form not in common_words() and form not in places() for form in forms]
    is_capital = all(word[0].isupper() for word in words)
    if len(words) == 1:
        is_name = is_listed[0] and forms[0] not in AMBIGUOUS_NAMES
    else:
        is_unknown = all(form not in common_words() for form in forms)
        is_name = any(is_listed) and (is_capital or is_unknown) or (is_capital and is_unknown)
    if is_name:
        yield from full_name(words, is_certain=True)
