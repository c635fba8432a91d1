"""What a recipe says about redaction, and the application's own rules made of it: patterns, deny lists, JSON paths, PHI.

Knows neither sessions nor surrogates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import regex
from pydantic import Field, field_validator

from cluster.config import Config
from cluster.errors import ConfigError
from training.findings import Finding

MAX_PATTERN_CHARS = 500
MAX_LINE_CHARS = 2_000
"""An application's pattern sees at most this much of a line at once."""
MAX_PATTERN_S = 1.0
"""A pattern that takes longer on one line is refused, wherever it shows."""
MIN_CHARS = 3
"""A shorter value is replaced nowhere: it would be replaced inside everything else."""
_PATH = re.compile(r"(?:\$\.?)?[\w-]+(?:\[(?:\d+|\*)\])*(?:\.(?:[\w-]+|\*)(?:\[(?:\d+|\*)\])*)*")
_STEP = re.compile(r"[\w-]+|\*")


class RedactConfig(Config):
    """What is taken for personal, and what happens to it. Values are replaced by made-up ones of the same shape."""

    spacy_model: str | None = None
    """Installed spaCy model, or a folder of one, whose persons are added to those found by list and context; None: none."""
    patterns: dict[str, str] = {}
    """The application's own values: a name for the kind -> a regular expression; its first group where it has one."""
    deny: tuple[str, ...] = ()
    """Words and phrases that are always replaced, in any case, in system prompts too."""
    allow: tuple[str, ...] = ()
    """Words and phrases that are never replaced, in any case."""
    json_paths: tuple[str, ...] = ()
    """Fields that are always replaced in JSON of messages, arguments and results, such as `patient.mrn`, `$.customer.id` or
    `items[*].serial`. A path that begins with `$` starts at the outermost value, others anywhere."""
    phi: bool = False
    """Also numbers of medical records, patients and health plans, by what is said about them."""
    reversible: bool = False
    """Keep each session's surrogates with the values they stand for, for whoever holds the curator's key."""
    paraphrase: bool = False
    """Reword passages with personal values by a language model after values were replaced."""
    paraphrase_keep_chars: int = Field(default=12, ge=4, le=200)
    """A span of at least so many characters that the answer shares with a passage stays as it is."""

    @field_validator("patterns")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, str]) -> dict[str, str]:
        for name, pattern in patterns.items():
            if not re.fullmatch(r"[A-Za-z]\w{0,39}", name):
                raise ValueError(f"{name!r}: allowed: a name of letters, digits and _")
            if len(pattern) > MAX_PATTERN_CHARS:
                raise ValueError(f"{name}: {len(pattern)} characters; allowed: at most {MAX_PATTERN_CHARS}")
            try:
                compiled = regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"{name}: no regular expression ({error})") from None
            if compiled.fullmatch(""):
                raise ValueError(f"{name}: matches the empty text; allowed: a pattern that needs a character")
        return patterns

    @field_validator("deny", "allow")
    @classmethod
    def _check_phrases(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        for phrase in phrases:
            if len(phrase.strip()) < MIN_CHARS:
                raise ValueError(f"{phrase!r}: allowed: at least {MIN_CHARS} characters")
        return phrases

    @field_validator("json_paths")
    @classmethod
    def _check_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not _PATH.fullmatch(path):
                raise ValueError(f"{path!r}: allowed: names with dots, [number] or [*], such as items[*].serial")
        return paths


class ApplicationRules:
    """A recipe's rules, compiled. Built once per process."""

    def __init__(self, config: RedactConfig) -> None:
        self._patterns = {name: regex.compile(pattern) for name, pattern in config.patterns.items()}
        self._deny = _phrases(config.deny)
        self._allowed = frozenset(phrase.casefold().strip() for phrase in config.allow)
        self._allowed_words = frozenset(word for phrase in self._allowed for word in phrase.split())
        self._paths = [(path.startswith("$"), tuple(_STEP.findall(path))) for path in config.json_paths]
        self._has_phi = config.phi

    @property
    def has_fields(self) -> bool:
        """Whether `find_at` can find anything."""
        return self._has_phi or bool(self._paths)

    def find(self, text: str) -> Iterator[Finding]:
        """Values by the application's patterns, deny list and PHI contexts.

        Raises:
            ConfigError: a pattern took longer than `MAX_PATTERN_S` on one line.
        """
        if self._deny is not None:
            for match in self._deny.finditer(text):
                yield Finding(match[0], "CUSTOM")
        if self._has_phi:
            for match in _PHI.finditer(text):
                if any(c.isdigit() for c in match[1]):
                    yield Finding(match[1], "MEDICAL_ID")
        if self._patterns:
            for line in _lines(text):
                for name, pattern in self._patterns.items():
                    yield from _run_pattern(name, pattern, line)

    def find_at(self, path: tuple[str, ...], value: str | int) -> Iterator[Finding]:
        """What a field's path in JSON says. `path` holds names of fields and numbers of items, outermost first."""
        text = str(value)
        key = re.sub(r"[\W_]", "", next((step for step in reversed(path) if not step.isdigit()), "")).casefold()
        if self._has_phi and key in _PHI_KEYS and len(text) >= MIN_CHARS and any(c.isdigit() for c in text):
            yield Finding(text, "MEDICAL_ID")
        if len(text) >= MIN_CHARS and any(_is_at(path, steps, is_rooted) for is_rooted, steps in self._paths):
            yield Finding(text, "CUSTOM")

    def is_allowed(self, finding: Finding) -> bool:
        """Whether the recipe keeps this value; a name is kept if it is a word of a kept phrase."""
        value = finding.value.casefold()
        is_word = finding.kind in ("FIRST_NAME", "LAST_NAME") and value in self._allowed_words
        return is_word or value in self._allowed


def _run_pattern(name: str, pattern: Any, line: str) -> Iterator[Finding]:
    try:
        for match in pattern.finditer(line, timeout=MAX_PATTERN_S):
            value = match[1] if pattern.groups and match[1] else match[0]
            if len(value) >= MIN_CHARS:
                yield Finding(value, "CUSTOM")
    except TimeoutError:
        raise ConfigError(
            f"redact.patterns.{name}: took longer than {MAX_PATTERN_S} s on a line of {len(line)} characters; allowed: a "
            "pattern without repeats inside repeats; next: rewrite it, for instance with possessive repeats (a++)"
        ) from None


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        for start in range(0, len(line), MAX_LINE_CHARS):
            yield line[start : start + MAX_LINE_CHARS]


def _phrases(phrases: tuple[str, ...]) -> re.Pattern[str] | None:
    if not phrases:
        return None
    words = (r"\s+".join(map(re.escape, phrase.split())) for phrase in sorted(phrases, key=lambda p: (-len(p), p)))
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.I)


def _is_at(path: tuple[str, ...], steps: tuple[str, ...], is_rooted: bool) -> bool:
    """Whether `steps` lead to the end of `path`. Items of a list may be left out of `steps`, as in `items.serial`."""
    i = len(path) - 1
    for step in reversed(steps):
        while i >= 0 and path[i].isdigit() and not step.isdigit() and step != "*":
            i -= 1
        if i < 0 or (step != "*" and path[i] != step):
            return False
        i -= 1
    return not is_rooted or all(step.isdigit() for step in path[: i + 1])


_PHI = re.compile(
    r"(?:\bmrn|\bmedical record(?: number| no\.?| id)?|\bpatient (?:id|number|no\.?)|\bhealth plan(?: id| number)?"
    r"|\b(?:member|subscriber|beneficiary|policy|insurance|medicare|medicaid|nhs|group|chart|prescription|rx)"
    r"(?: card)? (?:id|number|no\.?))[\s:#=]{0,3}(?:(?:is|was|:)\s{1,2})?#?([A-Z0-9](?:[A-Z0-9]|[ -](?=[A-Z0-9]*\d)){3,19})\b",
    re.I,
)
_PHI_KEYS = frozenset(
    """mrn medicalrecordnumber medicalrecord patientid patientnumber memberid subscriberid beneficiaryid policynumber
    healthplanid insuranceid insurancenumber medicareid medicaidid nhsnumber chartnumber prescriptionnumber rxnumber
    """.split()
)
