"""One string -> the personal values in it: identifiers, addresses, dates of birth and names, by text and by JSON field.

Works without a language model and without network; where a spaCy model is named, its named entities are added. A text
is cut into pieces of bounded length, at line ends where it has them, and each piece is given to every recogniser.
Knows neither messages nor surrogates. Sources: presidio-analyzer 2.2 predefined recognisers; lists of Faker.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterator

from cluster.errors import ConfigError
from training.addresses import NUMERIC_DATE, find_addresses, find_birth_dates
from training.findings import Finding
from training.identifiers import find_identifiers
from training.names import MAX_NAME_MESSAGE_CHARS, find_names, find_whole_name, full_name, words_as
from training.word_lists import PLAIN_WORDS

MAX_PIECE_CHARS = 4_000
"""Longer texts are cut at line ends or white space, so that no pattern runs over an unbounded text."""

_ESCAPED_SPACE = re.compile(r"\\[nrt](?=[\s\\A-Z0-9]|$)")
_NO_LETTER = re.compile(r"[\W\d_]+")
_FIELD = re.compile(r'"([A-Za-z_]{2,30})"\s{0,3}:\s{0,3}"([^"\\\n]{2,100})"')


def find_values(text: str, *, is_message: bool) -> Iterator[Finding]:
    """Personal values in plain text, a whole message or a string in JSON. Line ends written as \\n, as in text that was escaped twice, count as such."""
    for piece in split_text(text):
        # Of equal length, so that positions stay; the replacer takes values as they are written between them.
        plain = _ESCAPED_SPACE.sub("  ", piece) if "\\" in piece else piece
        for find in (find_identifiers, find_addresses, find_birth_dates, find_names):
            for finding in find(plain):
                yield finding if plain is piece else finding._replace(value=_as_written(finding.value, plain, piece))
        if is_message and len(text) <= MAX_NAME_MESSAGE_CHARS and text.count(" ") <= 4:
            yield from find_whole_name(plain)
        if '":' in piece or '" :' in piece:
            for match in _FIELD.finditer(piece):
                yield from find_keyed(match[1], match[2])


def find_keyed(key: str, value: str | int) -> Iterator[Finding]:
    """What the name of a JSON field says about its value."""
    kind = _KEYS.get(_NO_LETTER.sub("", key.casefold()))
    text = str(value)
    if kind is None or not 2 <= len(text) <= 200 or text.casefold() in PLAIN_WORDS:
        return
    if kind in ("FIRST_NAME", "LAST_NAME"):
        yield from words_as(text, kind)
    elif kind == "FULL_NAME":
        yield from full_name(text.split(), is_certain=key.casefold() != "name")
    elif _LOOKS_RIGHT[kind].search(text):
        yield Finding(text, kind)


def build_ner(spacy_model: str | None) -> Callable[[str], Iterator[Finding]] | None:
    """Persons' names by a spaCy model, as a function of one text; None without a model. Loading takes seconds.

    Args:
        spacy_model: an installed package, or a folder that spaCy wrote.

    Raises:
        ConfigError: `spacy_model` is neither.
    """
    if spacy_model is None:
        return None
    import spacy
    import spacy.util

    is_folder = (pathlib.Path(spacy_model) / "meta.json").is_file()
    if not is_folder and not spacy.util.is_package(spacy_model):
        raise ConfigError(
            f"redact.spacy_model={spacy_model!r}: not installed; allowed: an installed spaCy model, a folder that spaCy "
            f"wrote, or unset; next: python -m spacy download {spacy_model}"
        )
    model = spacy.load(spacy_model)

    def find(text: str) -> Iterator[Finding]:
        for piece in split_text(text):
            for entity in model(piece).ents:
                if entity.label_ in ("PERSON", "PER"):
                    yield from full_name(entity.text.split(), is_certain=True)

    return find


def split_text(text: str) -> Iterator[str]:
    """`text` in pieces of at most `MAX_PIECE_CHARS`, at line ends or white space where there are any."""
    start = 0
    while len(text) - start > MAX_PIECE_CHARS:
        end = start + MAX_PIECE_CHARS
        cut = max(text.rfind("\n", start + MAX_PIECE_CHARS // 2, end), -1)
        if cut < 0:
            cut = text.rfind(" ", start + MAX_PIECE_CHARS // 2, end)
        cut = cut if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _as_written(value: str, plain: str, piece: str) -> str:
    at = plain.find(value)
    return piece[at : at + len(value)]


_KEY_WORDS: dict[str, str] = {
    "FIRST_NAME": "firstname givenname forename given middlename nickname preferredname",
    "LAST_NAME": "lastname surname familyname family maidenname",
    "FULL_NAME": """name fullname customername patientname passengername contactname personname cardholder cardholdername
        nameoncard guestname employeename recipientname sendername accountholder holdername""",
    "EMAIL_ADDRESS": "email emailaddress mail contactemail useremail customeremail",
    "PHONE_NUMBER": "phone phonenumber telephone tel mobile mobilenumber mobilephone cell cellphone fax contactnumber",
    "STREET_ADDRESS": "address addressline streetaddress street shippingaddress billingaddress homeaddress",
    "DATE_OF_BIRTH": "dob dateofbirth birthdate birthday",
    "CREDIT_CARD": "cardnumber creditcardnumber creditcard ccnumber pan",
    "ZIP_CODE": "zip zipcode postalcode postcode",
    "ID_NUMBER": "accountnumber passport passportnumber driverlicense licensenumber nationalid taxid",
    "US_SSN": "ssn socialsecuritynumber socialsecurity",
    "IBAN_CODE": "iban",
    "IP_ADDRESS": "ip ipaddress clientip remoteip",
}
_KEYS = {key: kind for kind, keys in _KEY_WORDS.items() for key in keys.split()}
_LOOKS_RIGHT: dict[str, re.Pattern[str]] = {
    "EMAIL_ADDRESS": re.compile(r"^[^@\s]+@[^@\s]+\.\w+$"),
    "PHONE_NUMBER": re.compile(r"^\D{0,3}(?:\d\D{0,3}){7,15}$"),
    "STREET_ADDRESS": re.compile(r"^(?:\d+\w?\s+\D*[^\W\d]|[^\W\d].*\s\d|(?:Suite|Apt|Unit|Flat)\b.*\d)"),
    "DATE_OF_BIRTH": re.compile(rf"^(?:{NUMERIC_DATE})$"),
    "CREDIT_CARD": re.compile(r"^(?:\d[ -]?){12,19}$"),
    "ID_NUMBER": re.compile(r"^(?=.*\d{3})[\w -]{4,20}$"),
    "ZIP_CODE": re.compile(r"^(?=.*\d{2})[\w -]{4,10}$"),
    "US_SSN": re.compile(r"^\d{3}\D?\d{2}\D?\d{4}$"),
    "IBAN_CODE": re.compile(r"^[A-Z]{2}\d{2}[A-Z0-9 ]{10,34}$"),
    "IP_ADDRESS": re.compile(r"^\d{1,3}(?:\.\d{1,3}){3}$|^[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:]*$"),
}
