"""Plain text -> postal addresses and dates of birth, of several countries' forms.

An address is found in parts (street line, unit, postal code, and the city and state that close it), so that the parts
agree with the fields of a form that holds the same address. Cities and plain dates elsewhere are not looked for: tasks
are about them. A date that lies a working life back is taken for a date of birth without a word that says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from training.findings import Finding

_DIGIT = re.compile("[0-9]")
_TYPES = (
    r"Street|Avenue|Road|Drive|Lane|Boulevard|Court|Way|Place|Terrace|Square|Parkway|Highway|Circle|Trail|Crescent|Close"
    r"|Grove|Gardens|Row|Walk|Alley|Loop|Plaza|Mews|Hill|Rise|Path|Turnpike|Expressway|Freeway|Crossing|Pike|Ridge|Point"
    r"|Run|Park|Quay|Esplanade|Parade|Bypass|Causeway|Broadway|Green|View|Heights|Vale|Bend|Cove|Junction|Landing|Pass"
)
_SHORT_TYPES = r"St|Ave|Av|Rd|Dr|Ln|Blvd|Ct|Pl|Ter|Sq|Pkwy|Hwy|Cir|Trl|Cres|Aly|Expy|Fwy|Pk|Plz|Xing"
_WORD = r"[A-Z\u00c0-\u00de][\w'\u2019.-]{0,24}"
_GAP = r"[ \t]{1,4}"
_ORDINAL = r"\d{1,3}(?:st|nd|rd|th)"
_HOUSE = r"\d{1,6}(?:[-/]\d{1,4})?[A-Za-z]?"
_DIRECTION = rf"(?:(?:[NSEW]{{1,2}}\.?|North|South|East|West){_GAP})?"
_NUMBERED = rf"(?<![\w.$\u20ac#/-]){_HOUSE},?{_GAP}{_DIRECTION}"

_NUMBER_FIRST = (
    # 975 Sunset Drive; 350 5th Avenue; 12-14 High St
    rf"{_NUMBERED}(?:(?:{_WORD}|{_ORDINAL}){_GAP}){{1,4}}?(?:{_TYPES}|{_SHORT_TYPES})\b(?:{_GAP}(?:N|S|E|W|NW|NE|SW|SE)\b)?",
    # 123 Broadway; 9 main st
    rf"{_NUMBERED}(?:Broadway|The{_GAP}{_WORD}|(?i:(?:[a-z]{{3,15}}{_GAP}){{1,2}}"
    r"(?:street|avenue|road|lane|boulevard|blvd|ave|rd)\b))",
    # 12 rue de Rivoli; 5, avenue Foch
    rf"{_NUMBERED}(?:bis{_GAP})?(?:[Rr]ue|[Aa]venue|[Bb]oulevard|[Bb]d|[Pp]lace|[Cc]hemin|[Aa]ll\u00e9e|[Ii]mpasse|[Qq]uai|[Cc]ours)"
    rf"(?:{_GAP}(?:de|du|des|la|le|les|l'|d'))*{_GAP}?{_WORD}(?:[ -]{_WORD}){{0,3}}",
)
_NAME_FIRST = (
    # Calle Mayor 12; Via Roma, 5; Avenida Paulista 1000
    rf"\b(?:Calle|C/|Avenida|Av\.|Avda\.?|Paseo|Plaza|Carrer|Via|Viale|Piazza|Corso|Largo|Rua|Travessa|Rue|Ulica|ul\.|aleja)"
    rf"(?:{_GAP}(?:de|del|della|di|da|do|dos|la|las|los|el))*(?:{_GAP}{_WORD}){{1,4}},?{_GAP}(?:n\u00ba?\.?{_GAP}?)?{_HOUSE}\b",
    # Hauptstra\u00dfe 12a; Berliner Str. 5; Am Markt 3; Kerkstraat 12; Storgatan 5
    r"\b[A-Z\u00c0-\u00de][\w-]{2,30}(?:stra\u00dfe|strasse|str\.|weg|platz|gasse|allee|damm|ufer|ring|straat|laan|plein|gracht|kade"
    rf"|gatan|v\u00e4gen|vej|gade|veien|gata|katu|tie|utca){_GAP}{_HOUSE}\b",
    rf"\b(?:{_WORD}{_GAP}){{1,2}}(?:Stra\u00dfe|Strasse|Str\.|Weg|Platz|Allee|Gasse|Ring|utca|\u00fat|u\.){_GAP}{_HOUSE}\b",
    rf"\b(?:Am|An der|Auf dem|Im|Zum|Zur|Unter den){_GAP}{_WORD}{_GAP}{_HOUSE}\b",
    r"\b(?:P\.?\s?O\.?\s?|[Pp]ost [Oo]ffice )[Bb]ox[ \t]{1,2}#?\d{1,8}\b",
    r"\b(?:Postfach|Casilla|Apartado(?: de correos)?|Bo\u00eete postale|Postbus)[ \t]{1,2}\d{2,8}\b",
)
_NUMBER_FIRST_STREET = re.compile("|".join(f"(?:{pattern})" for pattern in _NUMBER_FIRST))
_NAME_FIRST_STREET = re.compile("|".join(f"(?:{pattern})" for pattern in _NAME_FIRST))
_NAME_FIRST_HINTS = tuple(
    """Calle C/ Aven Av. Avda Paseo Plaza Carrer Via Piazza Corso Largo Rua Travessa Rue Ulica ul. aleja stra\u00df stras str. weg
    platz gasse allee damm ufer ring laan plein gracht kade gatan v\u00e4gen vej gade vei gata katu tie utca Str Weg Platz Allee
    Gasse Ring \u00fat u. Am An Auf Im Zum Zur Unter Box box Postfach Casilla Apartado Bo\u00eete Postbus""".split()
)
_UNNUMBERED = re.compile(
    rf"\b(?!(?:Google|Wall|Hard|Test|Flash|Silk|Sesame|Abbey|Disk|Tape|One|Pen|USB|The|A|An|This|That|My|Your|On|In|At"
    rf"|Main\.)\b){_WORD}{_GAP}(?:{_WORD}{_GAP})?(?:Street|Avenue|Road|Lane|Drive|Boulevard|Blvd|Ave|Rd)\b(?!-)"
    rf"|\b{_WORD}{_GAP}(?:St|Ave|Rd|Blvd)\.(?![ ][A-Z])"
    rf"|(?<=\b(?:on|at) ){_WORD} (?=(?:street|avenue|road|lane|boulevard)\b)"
)
_UNNUMBERED_HINTS = "Street Avenue Road Lane Drive Boulevard Blvd Ave Rd St. street avenue road lane boulevard".split()
_UNIT_WORDS = (
    r"Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|Room|Rm|Bldg|Building|Block|App(?:artement|t)?|Piso|Wohnung|Etage"
)
_SUITE = re.compile(r"\b(?:Suite|Ste\.?|Apt\.?|Apartment|Flat)[ \t]{1,2}#?(?:\d{1,5}[A-Z]?|[A-Z]\d{0,4})\b")
_BREAK = r"(?:[\s,;-]{1,8})"
_UNIT_TAIL = re.compile(
    rf"{_BREAK}((?:(?:{_UNIT_WORDS})\.?[ \t]{{1,2}}#?[\w-]{{1,6}}|#[ ]?\d{{1,5}}\w?|\d{{1,2}}(?:st|nd|rd|th) [Ff]loor))\b"
)
_STATES = (
    r"A[LKZRAEP]|C[AOT]|D[EC]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEHINOPST]|N[CDEHJMVY]|O[HKR]|P[AR]|RI|S[CD]|T[NX]|UT"
    r"|V[AIT]|W[AIVY]|AB|BC|MB|NB|NL|NS|ON|PE|QC|SK|NSW|VIC|QLD|TAS|ACT"
)
_CITY = rf"{_WORD}(?:[ -]{_WORD}){{0,3}}?"
_COUNTRY = r"USA|U\.S\.A\.|US|United States(?: of America)?"
_UK_CODE = r"[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}"
_CODE = rf"\d{{5}}(?:-\d{{4}})?|{_UK_CODE}|[A-Z]\d[A-Z] ?\d[A-Z]\d|\d{{4}}"
_PLACE_TAIL = re.compile(
    rf"{_BREAK}(?P<place>{_CITY}{_BREAK}(?:{_STATES}|{_COUNTRY})\b)(?:{_BREAK}(?P<zip>{_CODE})\b)?"
    rf"|{_BREAK}(?P<place2>{_CITY}){_BREAK}(?P<zip2>\d{{5}}(?:-\d{{4}})?|{_UK_CODE})\b"
    rf"|{_BREAK}(?P<zip3>(?:[A-Z]{{1,2}}-)?\d{{4,5}}){_BREAK}(?P<place3>{_CITY})\b"
)
_ZIP = re.compile(rf"\b(?:USA|{_STATES}),?[ \t]{{1,3}}(\d{{5}}(?:-\d{{4}})?)\b(?!-)")
_ZIP_SAID = re.compile(
    r"\b(?:zip|postal|post)[ -]?code(?: is|:|'s)?[ \t]{1,2}([A-Z0-9][A-Z0-9 -]{2,8}[A-Z0-9])\b", re.I
)
_STREET_CITY = re.compile(rf"({_HOUSE}{_GAP}(?:{_WORD}{_GAP}?){{1,3}}),[ ]{_CITY},?[ ](?:{_STATES})[ ](\d{{5}})\b")

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_WRITTEN = rf"{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}|\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH},? \d{{4}}"
NUMERIC_DATE = r"\d{4}-\d\d?-\d\d?|\d{4}/\d\d?/\d\d?|\d\d?[/.-]\d\d?[/.-]\d{4}"
_SAID_DATE = rf"{NUMERIC_DATE}|\d\d?[/.-]\d\d?[/.-]\d\d|{_WRITTEN}"
_BORN = re.compile(
    rf"(?:\bborn\b|\bbirth|\bd\.?o\.?b\b|\bbday)[^\n]{{0,40}}?(?<![\d/.-])({_SAID_DATE})(?![\d/-])", re.I
)
_OLD_DATE = re.compile(
    r"(?<![\w/.-])(?:(?:19[1-9]\d|200[0-5])[-/](?:0?[1-9]|1[0-2])[-/](?:0?[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])[/.-](?:0?[1-9]|[12]\d|3[01])[/.-](?:19[1-9]\d|200[0-5]))(?![\w/-]|[:.]\d)"
)


def find_addresses(text: str) -> Iterator[Finding]:
    """Parts of postal addresses in plain text of at most some thousand characters."""
    if _DIGIT.search(text) is not None:
        streets = list(_NUMBER_FIRST_STREET.finditer(text))
        if any(hint in text for hint in _NAME_FIRST_HINTS):
            streets += _NAME_FIRST_STREET.finditer(text)
        for match in streets:
            yield Finding(match[0], "STREET_ADDRESS")
            yield from _find_tail(text, match.end())
        for match in _STREET_CITY.finditer(text):
            yield Finding(match[1].strip(), "STREET_ADDRESS")
        for match in _SUITE.finditer(text):
            yield Finding(match[0], "STREET_ADDRESS")
            yield from _find_tail(text, match.end())
        for match in _ZIP.finditer(text):
            yield Finding(match[1], "ZIP_CODE")
        for match in _ZIP_SAID.finditer(text):
            if sum(c.isdigit() for c in match[1]) >= 2:
                yield Finding(match[1], "ZIP_CODE")
    if not any(hint in text for hint in _UNNUMBERED_HINTS):
        return
    for match in _UNNUMBERED.finditer(text):
        yield Finding(match[0].strip(), "STREET_ADDRESS")
        yield from _find_tail(text, match.end())


def find_birth_dates(text: str) -> Iterator[Finding]:
    """Dates that are said to be of a birth, and numeric dates before 2006."""
    if _DIGIT.search(text) is None:
        return
    low = text.lower()
    if "birth" in low or "born" in low or "dob" in low or "d.o.b" in low or "bday" in low:
        for match in _BORN.finditer(text):
            yield Finding(match[1], "DATE_OF_BIRTH")
    for match in _OLD_DATE.finditer(text):
        yield Finding(match[0], "DATE_OF_BIRTH")


def _find_tail(text: str, start: int) -> Iterator[Finding]:
    """What follows a street: unit, city with state or postal code."""
    unit = _UNIT_TAIL.match(text, start)
    if unit is not None:
        yield Finding(unit[1], "STREET_ADDRESS")
        start = unit.end()
    tail = _PLACE_TAIL.match(text, start)
    if tail is None:
        return
    place = tail["place"] or tail["place2"] or tail["place3"]
    code = tail["zip"] or tail["zip2"] or tail["zip3"]
    yield Finding(place, "ADDRESS_PLACE")
    if code:
        yield Finding(code, "ZIP_CODE")
