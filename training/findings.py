"""What a recogniser finds: a value and its kind. Knows nothing of how values are found or replaced."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal[
    "EMAIL_ADDRESS",
    "PHONE_NUMBER",
    "CREDIT_CARD",
    "IBAN_CODE",
    "US_SSN",
    "IP_ADDRESS",
    "STREET_ADDRESS",
    "ADDRESS_PLACE",
    "ZIP_CODE",
    "DATE_OF_BIRTH",
    "ID_NUMBER",
    "MEDICAL_ID",
    "CUSTOM",
    "FIRST_NAME",
    "LAST_NAME",
]


class Finding(NamedTuple):
    """A personal value as it is written; names come word by word."""

    value: str
    kind: Kind
    is_sure: bool = True
    """False for a word that follows a first name but is on no list: it is replaced only as it was written."""


def is_name(kind: Kind) -> bool:
    """Whether a kind of value is a word of a person's name."""
    return kind in ("FIRST_NAME", "LAST_NAME")
