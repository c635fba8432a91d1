"""training/names.py, addresses.py, identifiers.py: what is found and what is not, in forms of several countries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.redact import RedactConfig, Redactor


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(RedactConfig(), b"k" * 32)


def found(redactor: Redactor, text: str) -> list[str]:
    return [text[span.start : span.end] for span in redactor.find_spans(text)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("transfer 700 to jodie kephart in 7 days", ["jodie", "kephart"]),
        ("kevin jones", ["kevin", "jones"]),
        ("Laine Schill", ["Laine", "Schill"]),
        ("cancel the booking under bruggeman", ["bruggeman"]),
        ("a table for Signe Decos on January 1st", ["Signe", "Decos"]),
        ("Her maiden name is Kowalski", ["Kowalski"]),
        ("Dr. Okonkwo will see you", ["Okonkwo"]),
        ("Best regards,\nPriya Raman", ["Priya", "Raman"]),
        ("Amelia's phone is broken", ["Amelia"]),
        ("Mr. Brown will call", ["Brown"]),
        ("12 rue de Rivoli, Paris", ["12 rue de Rivoli"]),
        ("Lieferung an Hauptstraße 12a, bitte", ["Hauptstraße 12a"]),
        ("Lieferung an Berliner Str. 5", ["Berliner Str. 5"]),
        ("vivo en Calle Mayor 12", ["Calle Mayor 12"]),
        ("abito in Via Roma, 5", ["Via Roma, 5"]),
        ("P.O. Box 1234 please", ["P.O. Box 1234"]),
        ("at 221B Baker Street, Flat 3", ["221B Baker Street", "Flat 3"]),
        ("17 Kings Road, London SW3 4UD", ["17 Kings Road", "London", "SW3 4UD"]),
        ("350 5th Avenue, New York, NY 10118", ["350 5th Avenue", "New York, NY", "10118"]),
        ("he lives on Chestnut Street", ["Chestnut Street"]),
        (r"905 Oak Lane\n Apt 4\n Denver\n USA 80202", ["905 Oak Lane", "Apt 4", r"Denver\n USA", "80202"]),
        ("born on April 5, 1990", ["April 5, 1990"]),
        ("DOB 5th of May 1990", ["5th of May 1990"]),
        ("a customer since 1971-03-02", ["1971-03-02"]),
        ("fe80::1ff:fe23:4567:890a is down", ["fe80::1ff:fe23:4567:890a"]),
        ("tel. 030 1234567", ["030 1234567"]),
        ("ring +44 20 7946 0958", ["+44 20 7946 0958"]),
        ("my user id is mia_li_3668", ["mia_li_3668"]),
        ("charge gift_card_4421486", ["gift_card_4421486"]),
        ('log: {"first_name": "Zorblax"} end', ["Zorblax"]),
    ],
)
def test_values_are_found_whole(redactor, text, values):
    assert found(redactor, text) == values


@pytest.mark.parametrize(
    "text",
    [
        "I need to send money to europe, to pay for memberships, to calculate fees",
        "Can I transfer to my savings account from abroad?",
        "Wells Fargo and Madison Square Garden in San Francisco",
        "a movie directed by Quentin Tarantino with Bill Murray",
        "The Supreme Court and the Golden Gate Bridge",
        "from 2024-05-16 to 2024-05-20, at 2024-05-16T08:28:51Z",
        "order 4421486123, build 1.2.3, total 1,234,567.89, 3 to 5 items",
        "Thank you, your table for Monday in May is booked",
        "Google Drive, Wall Street, 20 Miles Away",
        "Italian",
        "New York",
        "the flight HAT028 from MIA to LAX",
    ],
)
def test_what_is_nobodys_stays(redactor, text):
    assert found(redactor, text) == []


@given(text=st.text(alphabet=st.sampled_from('aA bB1.2-"{}[]:,\\nrt@_/()+\n\u00e9\u0130\ud800'), max_size=200))
def test_spans_lie_in_the_text_in_order_and_are_what_is_replaced(redactor, text):
    spans = redactor.find_spans(text)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))
    request, _ = redactor.redact_session(
        [({"messages": [{"role": "user", "content": text}]}, {"role": "assistant"})], "s"
    )[0][0]
    assert (request["messages"][0]["content"] != text) <= bool(spans)


def test_spans_in_escaped_json_are_those_of_the_written_text(redactor):
    text = '{"note": "caf\\u00e9 \\"x\\" jo.doe77@mail.com", "inner": "{\\"email\\": \\"amy.lo12@mail.com\\"}"}'
    assert found(redactor, text) == ["jo.doe77@mail.com", "amy.lo12@mail.com"]
