"""One string -> the personal values in it: pattern recognisers of Presidio, names by context and list, JSON keys.

Works without a language model and without network; where a spaCy model is named, its named entities are added. Text is
looked at line by line, and a line reaches Presidio only if a cheap pattern says that it could hold such a value, which
is what makes scanning fast. Cities, countries and plain dates are not looked for: tasks are about them. Knows neither
messages nor surrogates. Sources: presidio-analyzer 2.2 predefined recognisers; name lists of Faker.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from cluster.errors import ConfigError

Kind = Literal[
    "EMAIL_ADDRESS",
    "PHONE_NUMBER",
    "CREDIT_CARD",
    "IBAN_CODE",
    "US_SSN",
    "IP_ADDRESS",
    "STREET_ADDRESS",
    "DATE_OF_BIRTH",
    "ID_NUMBER",
    "FIRST_NAME",
    "LAST_NAME",
]


class Finding(NamedTuple):
    """A personal value as it is written; names come word by word."""

    value: str
    kind: Kind
    is_sure: bool = True
    """False for a word that follows a first name but is on no list: it is replaced only as it was written."""


MAX_LINE_CHARS = 2_000
"""Longer lines are cut at white space, so that no pattern runs over an unbounded text."""
MIN_SCORE = 0.4
"""Presidio's score of a phone number without context; weaker patterns match any nine digits."""

_ISO_TIME = re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?")
_COULD_HOLD: dict[Kind, re.Pattern[str]] = {
    "EMAIL_ADDRESS": re.compile(r"\w@\w"),
    "PHONE_NUMBER": re.compile(r"(?:\d[\s()./-]{0,3}){7}"),
    "CREDIT_CARD": re.compile(r"(?:\d[ -]?){12}"),
    "IBAN_CODE": re.compile(r"\b[A-Z]{2}\d{2} ?[A-Z0-9]{4}"),
    "US_SSN": re.compile(r"\b\d{3}[- .]\d{2}[- .]\d{4}\b"),
    "IP_ADDRESS": re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b|[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){3}"),
}
_PHONE_CONTEXT = re.compile(
    r"phone|\bcall|\btel\b|mobile|\bcell|\bfax\b|\btext(?:ed)? me|reach|\bsms\b|contact|dial|number is", re.I
)
_STREET = (
    r"Street|St|Avenue|Ave|Road|Rd|Drive|Dr|Lane|Ln|Boulevard|Blvd|Court|Ct|Way|Place|Pl|Terrace|Square|Sq|Parkway|Pkwy"
    r"|Highway|Hwy|Circle|Cir|Trail"
)
_ADDRESS = re.compile(
    rf"\b\d{{1,5}}[ ](?:[NSEW]\.?[ ])?(?:[A-Z][\w'.-]{{1,20}}[ ]){{1,3}}(?:{_STREET})\b"
    r"(?:,?[ ](?:Apt|Suite|Unit)\.?[ ]?\w{1,6})?"
)
_DATE = r"\d{4}-\d\d?-\d\d?|\d\d?[/.-]\d\d?[/.-]\d{4}"
_INTERNATIONAL = re.compile(r"(?<![\w+])\+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){2,5}(?!\w)")
_ZIP = re.compile(r"\b(?:USA|[A-Z]{2}),? (\d{5}(?:-\d{4})?)\b(?!-)")
_NAMED_ID = re.compile(r"(?<![^\W_])([a-z]{2,20})[_.]([a-z]{2,20})_?\d{2,}(?!\w)")
_BORN = re.compile(
    rf"(?:\bborn(?: on)?|date of birth|birth ?date|birthday|\bdob)\W{{1,6}}(?:(?:is|was|it's)\W{{1,4}})?({_DATE})\b",
    re.I,
)

_NAME = r"[^\W\d_](?:[^\W\d_]|['\u2019-](?=[^\W\d_])){1,24}"
_CAPITAL = r"[A-Z\u00c0-\u00de](?:[^\W\d_]|['\u2019-](?=[^\W\d_])){1,24}"
_CAPITALS = rf"{_CAPITAL}(?: [A-Z]\.)?(?: {_CAPITAL}){{0,2}}"
_SAID_FIRST = re.compile(rf"\b(?:first name|given name)(?: is|'s|:)? ({_NAME})", re.I)
_SAID_LAST = re.compile(rf"\b(?:last name|surname|family name)(?: is|'s|:| of)? ({_NAME})", re.I)
_SAID_FULL = re.compile(
    rf"\b(?:(?:my|full|his|her|their) name(?: is|'s|:)|(?:under|in) the name(?: of)?) ({_NAME}(?: {_NAME})?)", re.I
)
_TITLED = re.compile(rf"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof)\.? ({_CAPITALS})")
_UNDER = re.compile(rf"\b(?:reservation|booking|table|booked|reserved|be|it|people|one|two|[1-9]) under ({_CAPITALS})")
_PLACE = "San|Santa|Santo|Sao|Los|Las|El|La|Saint|St|New|Port|Fort|Lake|Mount|Prince|Princess"
_SINGLE = re.compile(
    rf"(?<![\w.@/-])(?<!\bSan )(?<!\bSanta )(?<!\bSt )(?<!\bSt\. )(?<!\bSaint )(?<!\bPrince )({_CAPITAL})(?![\w@/-])"
)
_ADDRESSED = re.compile(
    r"\b(?:I'm|I am|call me|calls me|[Tt]his is|[Tt]hank you,?|[Tt]hanks,?|Hi,?|Hello,?|Hey,?|Dear|[Nn]amed|[Cc]alled"
    rf"|[Pp]assengers?:?|[Nn]ame:?\*{{0,2}}:?) ({_CAPITALS})"
)
_PAIR = re.compile(rf"(?<![\w])(?!(?:{_PLACE}) )({_CAPITAL}) (?:[A-Z]\. )?({_CAPITAL})(?![\w])")

_PLAIN_WORDS = frozenset(
    """a an and are as at be but by can do does for from had has have her here him his how i in is it me my no not
    of on or our out she he so sorry sure that the their them there they this to up us was we what when where
    which who will with would yes you your please thanks thank hello hi just like need want going looking trying
    calling writing able also name first last string str null none unknown test user users customer passenger
    agent assistant guest admin n/a na tbd example sample booking table
    """.split()
)
"""Never a name, however they are written."""
AMBIGUOUS_NAMES = frozenset(
    """may will mark bill grant rose art frank grace hope joy faith dawn summer april june august young long brown
    green black white gray price page cook king love day bell stone rich dean drew chase hunter miles major guy
    gene pat sue rob jack bob nick ray max ally pearl ruby amber crystal virginia georgia carolina charlotte
    madison jordan austin dallas houston jackson lincoln paris london sydney chelsea victoria florence israel chad
    china asia india america english french west north east south church hill wood woods forest lake park parks
    street rivers ford mills fields banks bush cross case best more little small short bright sharp strong wise
    noble rush holiday christian christmas monday friday mercedes lexus tiffany sky star sunny lane drive ware jan
    mar mai sol sun kong yang ye alpha iris urban pastor old cherry silver beijing christ farmer carpenter baker
    butler fisher taylor potter mason miller smith carter porter turner walker singer salinas santiago
    """.split()
)
"""Names that are words too: alone they prove nothing, and elsewhere they are replaced only as they were written."""
_MORE_FIRST_NAMES = frozenset(
    """ava mia harper luna aria camila layla zoe nora riley lily aurora hazel stella maya naomi elena leah willow
    ivy isla nova liam noah elijah oliver ezra mateo leo kai asher silas jayden mason ethan aiden omar yusuf
    mohamed mohammed muhammad ahmed ali hassan ibrahim fatima aisha yara amir khalid raj ravi priya arjun aarav
    ananya sanjay deepa wei mei lin jun ming hiroshi yuki daiki kenji sakura haruto ivan olga dmitri svetlana
    natasha igor sergei carlos juan jose diego mateus joao bjorn lars sven
    """.split()
)
"""Common first names of several countries that Faker's lists lack."""
_NO_LAST_NAME = frozenset(
    """airport airlines airways avenue street road drive lane beach bay city county state university college
    school hospital center centre park hotel river lake island mountain valley station bank inc corp llc ltd
    company group street st united national international general county january february march april may june
    july august september october november december monday tuesday wednesday thursday friday saturday sunday hills
    heights springs falls church museum bridge square
    """.split()
)


def find_values(text: str, analyze: Callable[[str], list[Finding]]) -> set[Finding]:
    """Personal values in plain text. `analyze` adds what it finds in a line."""
    return {finding for line in _split_lines(text) for finding in (*_find_in_line(line), *analyze(line))}


def find_keyed(key: str, value: str | int) -> Iterator[Finding]:
    """What the name of a JSON field says about its value."""
    kind = _KEYS.get("".join(c for c in key.casefold() if c.isalpha()))
    text = str(value)
    if kind is None or not 2 <= len(text) <= 100 or text.casefold() in _PLAIN_WORDS:
        return
    if kind in ("FIRST_NAME", "LAST_NAME"):
        yield from _words_as(text, kind)
    elif kind == "FULL_NAME":
        yield from _full_name(text.split(), is_certain=key.casefold() != "name")
    elif _LOOKS_RIGHT[kind].search(text):
        yield Finding(text, kind)


def build_analyzer(spacy_model: str | None) -> Callable[[str], list[Finding]]:
    """Presidio's AnalyzerEngine as a function of one line. Loading takes seconds and does not use the network.

    Raises:
        ConfigError: `spacy_model` is not installed.
    """
    engine, entities = _build_engine(spacy_model)

    def analyze(line: str) -> list[Finding]:
        without_times = _ISO_TIME.sub(" ", line)
        wanted = [kind for kind, pattern in _COULD_HOLD.items() if pattern.search(without_times)]
        wanted += entities
        if not wanted:
            return []
        results = engine.analyze(line, "en", entities=wanted, score_threshold=MIN_SCORE)
        return [finding for result in _without_overlaps(results) for finding in _to_findings(line, result)]

    return analyze


def _build_engine(spacy_model: str | None) -> tuple[Any, list[str]]:
    import spacy.util
    import tldextract
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry, nlp_engine
    from presidio_analyzer import predefined_recognizers as known

    class OfflineEmailRecognizer(known.EmailRecognizer):
        """Checks the domain against the public-suffix list inside tldextract instead of downloading one."""

        _suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

        def validate_result(self, pattern_text: str) -> bool:
            return self._suffixes(pattern_text).fqdn != ""

    recognizers = [
        OfflineEmailRecognizer(),
        known.PhoneRecognizer(),
        known.CreditCardRecognizer(),
        known.IbanRecognizer(),
        known.UsSsnRecognizer(),
        known.IpRecognizer(),
    ]
    engine: nlp_engine.NlpEngine = nlp_engine.NoOpNlpEngine([{"lang_code": "en", "model_name": ""}])
    if spacy_model is not None:
        if not spacy.util.is_package(spacy_model):
            raise ConfigError(
                f"redact.spacy_model={spacy_model!r}: not installed; allowed: an installed spaCy model, or unset; "
                f"next: python -m spacy download {spacy_model}"
            )
        engine = nlp_engine.SpacyNlpEngine([{"lang_code": "en", "model_name": spacy_model}])
        recognizers.append(known.SpacyRecognizer(supported_entities=["PERSON"]))
    registry = RecognizerRegistry(recognizers=recognizers, supported_languages=["en"])
    return AnalyzerEngine(registry=registry, nlp_engine=engine), ["PERSON"] if spacy_model else []


def _without_overlaps(results: list[Any]) -> list[Any]:
    """The best of results that overlap: higher score, then longer."""
    kept: list[Any] = []
    for result in sorted(results, key=lambda r: (-r.score, r.start - r.end, r.start)):
        if all(result.end <= other.start or result.start >= other.end for other in kept):
            kept.append(result)
    return kept


def _to_findings(line: str, result: Any) -> Iterator[Finding]:
    value = line[result.start : result.end].strip()
    if result.entity_type == "PERSON":
        yield from _full_name(value.split(), is_certain=True)
    elif result.entity_type != "PHONE_NUMBER" or _is_phone(line, result.start, result.end):
        yield Finding(value, result.entity_type)


def _is_phone(line: str, start: int, end: int) -> bool:
    """A bare run of digits is a phone number only near a word that says so: most are ids."""
    value = line[start:end]
    if _ISO_TIME.search(value) or (start and (line[start - 1].isalnum() or line[start - 1] in "_-")):
        return False
    if re.search(r"[()+]|\d[ .-]\d{3}[ .-]\d{3,4}", value):
        return True
    return _PHONE_CONTEXT.search(line, max(0, start - 40), start) is not None


def _split_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        while len(line) > MAX_LINE_CHARS:
            cut = line.rfind(" ", MAX_LINE_CHARS // 2, MAX_LINE_CHARS)
            cut = cut if cut > 0 else MAX_LINE_CHARS
            yield line[:cut]
            line = line[cut:]
        yield line


def _find_in_line(line: str) -> Iterator[Finding]:
    for match in _ADDRESS.finditer(line):
        yield Finding(match[0], "STREET_ADDRESS")
    for match in _INTERNATIONAL.finditer(line):
        yield Finding(match[0], "PHONE_NUMBER")
    for match in _ZIP.finditer(line):
        yield Finding(match[1], "ID_NUMBER")
    for match in _BORN.finditer(line):
        yield Finding(match[1], "DATE_OF_BIRTH")
    for match in _SAID_FIRST.finditer(line):
        yield from _words_as(match[1], "FIRST_NAME")
    for match in _SAID_LAST.finditer(line):
        yield from _words_as(match[1], "LAST_NAME")
    for match in _SAID_FULL.finditer(line):
        yield from _full_name(_leading_names(match[1].split()), is_certain=True)
    for match in _TITLED.finditer(line):
        words = match[1].split()
        yield from _words_as(words[0], "LAST_NAME") if len(words) == 1 else _full_name(words, is_certain=True)
    for match in _UNDER.finditer(line):
        yield from _full_name(match[1].split(), is_certain=True)
    for match in _ADDRESSED.finditer(line):
        yield from _full_name(match[1].split(), is_certain=False)
    for match in _PAIR.finditer(line):
        yield from _full_name([match[1], match[2]], is_certain=False)
    for match in _SINGLE.finditer(line):
        yield from _full_name([match[1]], is_certain=False)
    for match in _NAMED_ID.finditer(line):
        if match[1] in _first_names() and match[2] in _last_names():
            yield from _full_name([match[1], match[2]], is_certain=True)


def _leading_names(words: list[str]) -> list[str]:
    """The words up to the first that is no name, as in "my name is anna and"."""
    for index, word in enumerate(words):
        if word.casefold() in _PLAIN_WORDS or (index and word.islower() and not words[0].islower()):
            return words[:index]
    return words


def _full_name(words: list[str], *, is_certain: bool) -> Iterator[Finding]:
    """First word as first name, the others as last names; uncertain ones only if a list knows the first name."""
    if not words or len(words) > 4:
        return
    head, tail = words[0].casefold(), [word.casefold() for word in words[1:]]
    if not is_certain:
        if head not in _first_names() or head in _PLAIN_WORDS or _NO_LAST_NAME.intersection((head, *tail)):
            return
        if len(head) <= 4 and words[0].isupper():
            # A code, such as the airport MIA.
            return
        if head in AMBIGUOUS_NAMES and not (tail and tail[-1] in _last_names()):
            return
        if tail and tail[-1] not in _last_names() and tail[-1] in _PLAIN_WORDS | AMBIGUOUS_NAMES:
            words = words[:1]
    yield from _words_as(words[0], "FIRST_NAME")
    for word in words[1:]:
        yield from _words_as(word, "LAST_NAME", is_sure=is_certain or word.casefold() in _last_names())


def _words_as(text: str, kind: Kind, *, is_sure: bool = True) -> Iterator[Finding]:
    for word in re.findall(_NAME, text):
        word = re.sub(r"['\u2019]s$", "", word)
        if word.casefold() not in _PLAIN_WORDS:
            yield Finding(word, kind, is_sure)


@functools.cache
def _first_names() -> frozenset[str]:
    from faker.providers.person import ja_JP, zh_CN

    # Chinese names of one word stand first or last.
    romanized = (
        *zh_CN.Provider.first_romanized_names,
        *zh_CN.Provider.last_romanized_names,
        *ja_JP.Provider.first_romanized_names,
    )
    return _listed("first_names") | _MORE_FIRST_NAMES | {name.casefold() for name in romanized if len(name) > 1}


@functools.cache
def _last_names() -> frozenset[str]:
    from faker.providers.person import ja_JP, zh_CN

    romanized = (*zh_CN.Provider.last_romanized_names, *ja_JP.Provider.last_romanized_names)
    return _listed("last_names") | {name.casefold() for name in romanized}


def _listed(which: str) -> frozenset[str]:
    from faker.providers.person import de_DE, en_GB, en_IN, en_US, es_ES, fr_FR, it_IT, tr_TR

    locales = (en_US, en_GB, en_IN, es_ES, fr_FR, de_DE, it_IT, tr_TR)
    return frozenset(
        name.casefold() for locale in locales for name in getattr(locale.Provider, which) if name.isalpha()
    )


_KEYS: dict[str, str] = {
    **dict.fromkeys(["firstname", "givenname", "forename", "given", "middlename"], "FIRST_NAME"),
    **dict.fromkeys(["lastname", "surname", "familyname", "family"], "LAST_NAME"),
    **dict.fromkeys(["name", "fullname", "customername", "patientname", "passengername", "contactname"], "FULL_NAME"),
    **dict.fromkeys(["personname", "cardholder", "cardholdername", "nameoncard", "guestname"], "FULL_NAME"),
    **dict.fromkeys(["email", "emailaddress"], "EMAIL_ADDRESS"),
    **dict.fromkeys(["phone", "phonenumber", "telephone", "tel", "mobile", "mobilenumber", "fax"], "PHONE_NUMBER"),
    **dict.fromkeys(["address", "addressline", "streetaddress", "street"], "STREET_ADDRESS"),
    **dict.fromkeys(["dob", "dateofbirth", "birthdate", "birthday"], "DATE_OF_BIRTH"),
    **dict.fromkeys(["cardnumber", "creditcardnumber", "creditcard"], "CREDIT_CARD"),
    **dict.fromkeys(["zip", "zipcode", "postalcode", "postcode"], "ID_NUMBER"),
    **dict.fromkeys(["accountnumber", "passport", "passportnumber", "driverlicense", "licensenumber"], "ID_NUMBER"),
    "ssn": "US_SSN",
    "socialsecuritynumber": "US_SSN",
    "iban": "IBAN_CODE",
    "ip": "IP_ADDRESS",
    "ipaddress": "IP_ADDRESS",
}
_LOOKS_RIGHT = {
    "EMAIL_ADDRESS": re.compile(r"^[^@\s]+@[^@\s]+\.\w+$"),
    "PHONE_NUMBER": re.compile(r"^\D{0,3}(?:\d\D{0,3}){7,15}$"),
    "STREET_ADDRESS": re.compile(r"^\d+\s+\D*[A-Za-z]"),
    "DATE_OF_BIRTH": re.compile(rf"^(?:{_DATE})$"),
    "CREDIT_CARD": re.compile(r"^(?:\d[ -]?){12,19}$"),
    "ID_NUMBER": re.compile(r"^(?=.*\d{3})[\w -]{4,20}$"),
    "US_SSN": re.compile(r"^\d{3}\D?\d{2}\D?\d{4}$"),
    "IBAN_CODE": re.compile(r"^[A-Z]{2}\d{2}[A-Z0-9 ]{10,34}$"),
    "IP_ADDRESS": re.compile(r"^\d{1,3}(?:\.\d{1,3}){3}$|^[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:]*$"),
}
