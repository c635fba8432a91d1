"""training/redact.py, recognisers.py, surrogates.py: values go, shape stays, tool calls parse, copies stay copies."""

import datetime
import json
import re
import string
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from training.findings import Finding
from training.recognisers import find_keyed
from training.redact import RedactConfig, Redactor
from training.surrogates import SurrogateMaker, is_luhn_valid, match_case

KEY = b"k" * 32
OK = {"role": "assistant", "content": "ok"}
PROFILE = {
    "name": {"first_name": "Mia", "last_name": "Li"},
    "address": {"address1": "975 Sunset Drive", "city": "Austin", "zip": "78750"},
    "email": "mia.li3818@mail.com",
    "dob": "1990-04-05",
    "phone": 5125550143,
    "cards": {"credit_card_4421486": {"card_number": "5221 8096 7929 0813"}},
    "origin": "MIA",
}


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(RedactConfig(), KEY)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def redact_call(redactor: Redactor, request: dict, answer: dict, scope: str = "c/s") -> tuple[dict, dict, Counter[str]]:
    ((request, answer),), counts = redactor.redact_session([(request, answer)], scope)
    return request, answer, counts


def redact_text(redactor: Redactor, text: str, scope: str = "c/s") -> str:
    request, _, _ = redact_call(redactor, {"messages": [user(text)]}, OK, scope)
    return request["messages"][0]["content"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("write to raj.kim6179@example.com please", "raj.kim6179@example.com"),
        ("my card # 5221809679290813 for", "5221809679290813"),
        ("money transfer from DE82321547105903445369 to other", "DE82321547105903445369"),
        ("Here's my SSN: 150-65-8118", "150-65-8118"),
        ("call me on (265) 555-0108.", "(265) 555-0108"),
        ("You can call +1 533 555 0194", "+1 533 555 0194"),
        ("keep getting address 192.0.2.134 blocked", "192.0.2.134"),
        ("ship to 786 Cedar Street, Suite 12", "786 Cedar Street, Suite 12"),
        ("I was born on 1961-08-10.", "1961-08-10"),
        ("my name is olga petrova and", "olga petrova"),
        ("Thank you, Emma.", "Emma"),
        ("a table under Lecia Rivlin", "Lecia Rivlin"),
        ("last name is Honsberger", "Honsberger"),
        ("passengers Omar Davis and Fatima Patel", "Fatima Patel"),
    ],
)
def test_a_value_is_replaced_and_nothing_else(redactor, text, value):
    redacted = redact_text(redactor, text)
    assert value not in redacted
    head, tail = text.split(value)
    assert redacted.endswith(tail)
    assert redacted.startswith(head) or "passengers" in text


@pytest.mark.parametrize(
    "text",
    [
        "I need a flight from New York to San Francisco on 2024-05-16 at 08:28:51, order 4421486123",
        "May I mark this bill as paid? Will do, thanks!",
        "reservation JG7FMM costs $1,859.00 (3 bags), flight HAT028, 1.5.2 to 2.0",
        "The Golden Gate Bridge and Central Park are nice",
        '{"type": "object", "properties": {"email": {"type": "string"}, "first_name": "string"}}',
        "",
        "{not json",
    ],
)
def test_text_without_personal_values_stays_byte_for_byte(redactor, text):
    assert redact_text(redactor, text) == text


def test_one_person_is_one_surrogate_across_turns_json_and_arguments(redactor):
    arguments = json.dumps({"user_id": "mia_li_3668", "email": PROFILE["email"]})
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    system = {"role": "system", "content": "You help Mia. Be brief."}
    request = {
        "messages": [
            system,
            user("I am mia_li_3668."),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {
                "role": "tool",
                "tool_call_id": "1",
                "name": "find",
                "content": json.dumps({"result": json.dumps(PROFILE)}),
            },
        ],
        "tools": [{"type": "function", "function": {"name": "Mia"}}],
    }
    target = {"role": "assistant", "content": "Thank you, MIA is right, Mia Li of 975 Sunset Drive."}
    redacted, answer, counts = redact_call(redactor, request, target)
    text = json.dumps([redacted["messages"], answer])
    assert not re.search(
        r"\bMia\b|\bLi\b|mia_|_li_|Sunset Drive\W*Austin|1990-04-05|5125550143|5221 8096|mia\.li", text
    )
    assert '"MIA' in text.replace("\\", "") and "MIA is right" in text
    profile = json.loads(json.loads(redacted["messages"][3]["content"])["result"])
    first, last = profile["name"]["first_name"], profile["name"]["last_name"]
    assert redacted["messages"][0]["content"] == f"You help {first}. Be brief."
    user_id = redacted["messages"][1]["content"].removeprefix("I am ").removesuffix(".")
    assert re.fullmatch(rf"{first.lower()}_{last.lower()}_\d{{4}}", user_id) and not user_id.endswith("3668")
    assert answer["content"] == f"Thank you, MIA is right, {first} {last} of {profile['address']['address1']}."
    copied = json.loads(redacted["messages"][2]["tool_calls"][0]["function"]["arguments"])
    assert copied == {"user_id": user_id, "email": profile["email"]}
    assert profile["address"]["city"] == "Austin"
    assert isinstance(profile["phone"], int) and len(str(profile["phone"])) == 10
    ((card_id, card),) = profile["cards"].items()
    assert re.fullmatch(r"credit_card_\d{7}", card_id) and card_id != "credit_card_4421486"
    assert is_luhn_valid(card["card_number"])
    assert redacted["tools"] is request["tools"]
    assert (counts["PERSON"], counts["EMAIL_ADDRESS"]) >= (2, 1)


def test_what_a_later_call_reveals_is_replaced_in_earlier_ones(redactor):
    first = ({"messages": [user("ask honsberger about it")]}, {"role": "assistant", "content": "Honsberger who?"})
    second = ({"messages": [user("his last name is Honsberger")]}, {"role": "assistant", "content": "ok"})
    turns, _ = redactor.redact_session([first, second], "c/s")
    assert "honsberger" not in json.dumps(turns).casefold()


def test_scopes_and_keys_give_unrelated_surrogates():
    text = "my card 5221809679290813 and mail a.b@example.com"
    one, other = Redactor(RedactConfig(), KEY), Redactor(RedactConfig(), b"other key" * 4)
    assert redact_text(one, text, "c/1") == redact_text(Redactor(RedactConfig(), KEY), text, "c/1")
    assert len({redact_text(one, text, "c/1"), redact_text(one, text, "c/2"), redact_text(other, text, "c/1")}) == 3


def test_half_of_a_surrogate_pair_stays_escaped(redactor):
    redacted = redact_text(redactor, '{"note": "caf\u00e9 \\ud800 jo.doe77@mail.com"}')
    assert redacted.encode() and "jo.doe77" not in redacted and json.loads(redacted)["note"][5] == "\ud800"


@pytest.mark.parametrize(
    "layout", [{"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}, {"indent": "\t"}]
)
def test_json_keeps_its_layout(redactor, layout):
    value = {"note": "caf\u00e9 \u2713", "first_name": "Mia", "n": [1, 2.50, True, None], "tool": "Mia's"}
    text = json.dumps(value, **layout)
    redacted = redact_text(redactor, text)
    changed = json.loads(redacted)
    assert redacted == json.dumps(changed, **layout)
    assert changed["tool"] == f"{changed['first_name']}'s" != "Mia's"


def test_message_parts_are_searched_and_structure_is_left(redactor):
    image = {"type": "image_url", "image_url": {"url": "http://x/mia@example.com"}}
    message = {"role": "user", "name": "Mia", "content": [{"type": "text", "text": "I am Mia Li"}, image]}
    request, _, _ = redact_call(redactor, {"messages": [message]}, OK)
    assert request["messages"][0]["content"][1] == image
    assert "Mia" not in request["messages"][0]["content"][0]["text"]


def test_a_missing_spacy_model_is_a_config_error_with_the_next_command():
    with pytest.raises(ConfigError, match=r"redact.spacy_model='no_such_model'.*spacy download no_such_model"):
        Redactor(RedactConfig(spacy_model="no_such_model"), KEY)


WORDS = st.text(string.ascii_letters, min_size=2, max_size=10)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "first_name": WORDS,
        "last_name": WORDS,
        "email": st.builds("{}.{}@mail.com".format, WORDS, st.integers(0, 99)),
        "zip": st.integers(10_000, 99_999).map(str),
        "ssn": st.integers(100_000_000, 899_999_999),
        "phone": st.integers(2_000_000_000, 9_999_999_999).map(str),
        "note": st.text(max_size=20),
        "items": st.lists(st.integers() | WORDS, max_size=3),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(fields=FIELDS)
def test_tool_calls_parse_and_what_must_be_copied_can_be_copied(redactor, fields):
    text = json.dumps(fields)
    call = {"id": "1", "type": "function", "function": {"name": "save", "arguments": text}}
    target = {"role": "assistant", "content": None, "tool_calls": [call]}
    request, answer, _ = redact_call(redactor, {"messages": [user(text)]}, target)
    arguments = answer["tool_calls"][0]["function"]["arguments"]
    assert arguments == request["messages"][0]["content"]
    redacted = json.loads(arguments)
    assert list(redacted) == list(fields)
    assert all(type(redacted[name]) is type(value) for name, value in fields.items())
    for name in fields.keys() & {"zip", "ssn", "phone"}:
        assert len(str(redacted[name])) == len(str(fields[name])) and str(redacted[name]).isdigit()


NAMES = st.lists(st.sampled_from("mia li omar davis fatima patel anna fox".split()), min_size=1, unique=True)


@given(names=NAMES, scope=st.text(max_size=5))
def test_names_never_share_a_surrogate_and_never_become_one_another(names, scope):
    made = SurrogateMaker(KEY, scope).make(Finding(name.capitalize(), "LAST_NAME") for name in names)
    assert sorted(made) == sorted(names)
    assert len(set(made.values())) == len(names)
    assert not set(made.values()) & set(names)


@given(digits=st.text(string.digits, min_size=12, max_size=19))
def test_cards_stay_valid_and_keep_their_length(digits):
    made = SurrogateMaker(KEY, "s").make([Finding(digits, "CREDIT_CARD")])[digits]
    assert is_luhn_valid(made)
    assert (len(made), made[0]) == (len(digits), digits[0])


def test_ibans_stay_valid():
    iban = "DE82321547105903445369"
    made = SurrogateMaker(KEY, "s").make([Finding(iban, "IBAN_CODE")])[iban]
    assert made != iban and len(made) == len(iban)
    assert int("".join(str(int(c, 36)) for c in made[4:] + made[:4])) % 97 == 1


def test_two_spellings_of_a_number_get_the_same_digits():
    values = ["555-123-4567", "5551234567"]
    made = SurrogateMaker(KEY, "s").make(Finding(value, "PHONE_NUMBER") for value in values)
    assert made[values[0]].replace("-", "") == made[values[1]]


@pytest.mark.parametrize(("like", "expected"), [("Li", "Fox"), ("LI", "FOX"), ("li", "fox"), ("L", "Fox")])
def test_case_is_kept(like, expected):
    assert match_case("fox", like) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("firstName", "Mia", ["Mia"]),
        ("full_name", "Mia van Li", ["Mia", "Li"]),
        ("name", "get_user", []),
        ("name", "Emma Watson", ["Emma", "Watson"]),
        ("name", "Widget Pro", []),
        ("email", "none", []),
        ("dob", "unknown", []),
        ("color", "5125550143", []),
    ],
)
def test_a_json_key_says_what_its_value_is(key, value, expected):
    assert [finding.value for finding in find_keyed(key, value)] == expected


@given(days=st.lists(st.dates(min_value=datetime.date(1920, 1, 1)), min_size=2, unique=True), scope=st.text(max_size=4))
def test_dates_of_birth_stay_dates_in_their_order_and_become_others(days, scope):
    days = sorted(days)
    made = SurrogateMaker(KEY, scope).make(Finding(day.isoformat(), "DATE_OF_BIRTH") for day in days[:5])
    moved = [datetime.date.fromisoformat(made[day.isoformat()]) for day in days[:5]]
    assert moved == sorted(moved) and all(a != b for a, b in zip(days, moved, strict=False))


@pytest.mark.parametrize("value", ["04/05/1990", "5.4.1990", "April 5, 1990", "5th of May 1990", "1990/04/05"])
def test_written_dates_keep_their_form(value):
    made = SurrogateMaker(KEY, "s").make([Finding(value, "DATE_OF_BIRTH")])[value]
    assert made != value and re.sub(r"\d+", "0", made) == re.sub(r"\d+", "0", value)
    assert all(1 <= int(number) <= 20 or 1985 < int(number) < 1995 for number in re.findall(r"\d+", made))


def test_an_id_in_an_address_and_a_street_without_its_number_follow_the_others():
    findings = [
        Finding("mia_li_3668", "ID_NUMBER"),
        Finding("mia_li_3668@mail.com", "EMAIL_ADDRESS"),
        Finding("178 Lakeview Drive", "STREET_ADDRESS"),
        Finding("Lakeview Drive", "STREET_ADDRESS"),
    ]
    made = SurrogateMaker(KEY, "s").make(findings)
    assert made["mia_li_3668@mail.com"].partition("@")[0] == made["mia_li_3668"]
    assert made["178 Lakeview Drive"].partition(" ")[2] == made["Lakeview Drive"] != "Lakeview Drive"


@given(text=st.text("Omar Davis fox li ", max_size=60), name=st.sampled_from(["Omar", "Davis"]))
def test_no_surrogate_is_said_in_the_session(text, name):
    made = SurrogateMaker(KEY, "s").make([Finding(name, "LAST_NAME"), Finding("12345", "ZIP_CODE")], text)
    assert not any(surrogate in text.casefold() for surrogate in made.values())
