"""training/redact_rules.py, paraphrase.py and the reversible table: what a recipe adds to redaction."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import validate
from cluster.errors import ConfigError
from training.paraphrase import copied_spans
from training.redact import RedactConfig, Redactor
from training.replacing import restore_text

KEY = b"k" * 32
OK = {"role": "assistant", "content": "ok"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def redact_turn(
    redactor: Redactor, *messages: dict, answer: dict = OK, scope: str = "c/s", **request
) -> tuple[dict, dict]:
    (turn,), _ = redactor.redact_session([({"messages": list(messages), **request}, answer)], scope)
    return turn


def redact_text(config: RedactConfig, text: str) -> str:
    return redact_turn(Redactor(config, KEY), user(text))[0]["messages"][0]["content"]


def test_an_applications_pattern_is_replaced_in_its_shape_where_its_group_says():
    config = RedactConfig(patterns={"badge": r"badge (B-\d{4}[A-Z])"})
    redacted = redact_text(config, "my badge B-1234X is lost, gate B-9999Q")
    assert re.fullmatch(r"my badge [A-Z]-\d{4}[A-Z] is lost, gate B-9999Q", redacted) and "B-1234X" not in redacted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patterns": {"x": "(["}}, r"patterns.*x: no regular expression"),
        ({"patterns": {"x": "a" * 501}}, r"patterns.*x: 501 characters; allowed: at most 500"),
        ({"patterns": {"x": "a*"}}, r"patterns.*x: matches the empty text"),
        ({"patterns": {"a b": "c"}}, r"patterns.*'a b': allowed: a name of letters"),
        ({"deny": ["ab"]}, r"deny.*'ab': allowed: at least 3 characters"),
        ({"json_paths": ["a..b"]}, r"json_paths.*'a\.\.b': allowed: names with dots"),
        ({"json_paths": ["a[x]"]}, r"json_paths.*'a\[x\]'"),
    ],
)
def test_a_wrong_rule_is_a_config_error_that_says_what_is_allowed(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(RedactConfig, fields)


def test_a_catastrophic_pattern_stops_with_its_name_and_not_the_text():
    redactor = Redactor(RedactConfig(patterns={"slow": r"(x|xx)+y"}), KEY)
    with pytest.raises(ConfigError, match=r"redact.patterns.slow: took longer") as caught:
        redactor.find("x" * 60)
    assert "xxx" not in str(caught.value)


def test_a_deny_list_goes_everywhere_and_an_allow_list_stays():
    config = RedactConfig(deny=("project zeus",), allow=("Emma Watson", "jo.doe77@mail.com"))
    request, _ = redact_turn(
        Redactor(config, KEY),
        {"role": "system", "content": "You serve Project Zeus."},
        user("Is PROJECT ZEUS late? Emma Watson and Olga Ivanova ask; write to jo.doe77@mail.com"),
    )
    system, text = (message["content"] for message in request["messages"])
    assert "zeus" not in (system + text).casefold() and "Olga" not in text
    assert "Emma Watson" in text and "jo.doe77@mail.com" in text
    assert (
        system.removeprefix("You serve ").rstrip(".").casefold()
        == text.split(" late")[0].removeprefix("Is ").casefold()
    )


@pytest.mark.parametrize(
    ("path", "is_found"),
    [
        ("patient.mrn", True),
        ("$.patient.mrn", True),
        ("$.mrn", False),
        ("mrn", True),
        ("items[*].serial", False),
        ("patient.*", True),
        ("$.visits[0].mrn", False),
    ],
)
def test_a_json_path_names_a_field_in_messages_arguments_and_results(path, is_found):
    text = json.dumps({"patient": {"mrn": "ABQ-7781", "ward": "north"}, "items": [{"serial": 1234567}]})
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    tool = {"role": "tool", "tool_call_id": "0", "content": text}
    request, answer = redact_turn(Redactor(RedactConfig(json_paths=(path,)), KEY), tool, answer=answer)
    result = json.loads(request["messages"][0]["content"])
    assert (result["patient"]["mrn"] != "ABQ-7781") == is_found
    assert re.fullmatch(r"[A-Z]{3}-\d{4}", result["patient"]["mrn"])
    assert answer["tool_calls"][0]["function"]["arguments"] == request["messages"][0]["content"]


def test_items_of_lists_are_reached_and_keep_their_type():
    config = RedactConfig(json_paths=("items[*].serial", "$.tags[1]"))
    redacted = json.loads(
        redact_text(config, json.dumps({"items": [{"serial": 1234567}], "tags": ["first", "second"]}))
    )
    assert redacted["items"][0]["serial"] != 1234567 and len(str(redacted["items"][0]["serial"])) == 7
    assert redacted["tags"][0] == "first" and redacted["tags"][1] != "second"


@pytest.mark.parametrize(
    "text",
    [
        "MRN: 00847261 was admitted",
        "medical record number is A1234567",
        "her member ID is XYZ123456789",
        '{"mrn": "847261"}',
    ],
)
def test_health_numbers_are_replaced_where_the_recipe_asks(text):
    assert redact_text(RedactConfig(), text) == text
    redacted = redact_text(RedactConfig(phi=True), text)
    assert redacted != text and [c.isdigit() for c in redacted] == [c.isdigit() for c in text]


def test_what_a_schema_lists_is_never_replaced():
    schema = {"type": "object", "properties": {"desk": {"type": "string", "enum": ["Olga", "Ivan"]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    text = "Connect me to Olga, says Svetlana"
    request, _ = redact_turn(Redactor(RedactConfig(), KEY), user(text), tools=tools)
    assert "Olga" in request["messages"][0]["content"] and "Svetlana" not in request["messages"][0]["content"]


def test_a_city_is_replaced_inside_an_address_only_if_the_session_is_not_about_it():
    address = "send it to 178 Lakeview Drive, Suite 576, Fort Worth, TX 76150"
    redactor = Redactor(RedactConfig(), KEY)
    alone, _ = redact_turn(redactor, user(address))
    about, _ = redact_turn(redactor, user(address), user("what is the weather in Fort Worth?"))
    assert "Fort Worth" not in alone["messages"][0]["content"]
    assert "Fort Worth" in about["messages"][0]["content"] and "76150" not in about["messages"][0]["content"]


def test_a_reversible_recipe_hands_out_the_table_once_and_others_keep_nothing():
    text = json.dumps(
        {"note": "Olga Ivanova, olga.ivanova77@mail.com, 178 Lakeview Drive", "first_name": "Olga", "n": 1}
    )
    for is_reversible in (True, False):
        redactor = Redactor(RedactConfig(reversible=is_reversible), KEY)
        request, _ = redact_turn(redactor, user(text))
        redacted = request["messages"][0]["content"]
        mapping = redactor.mapping_of("c/s")
        assert "Olga" not in redacted
        assert (restore_text(redacted, mapping) == text) == is_reversible
        assert redactor.mapping_of("c/s") == {}


PEOPLE = st.lists(
    st.sampled_from("Olga Ivan Emma Fatima Priya Carlos Hiroshi Svetlana".split()), min_size=1, max_size=6
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(people=PEOPLE, numbers=st.lists(st.integers(10_000, 99_999), max_size=4), word=st.text(max_size=12))
def test_what_was_replaced_can_be_restored(people, numbers, word):
    redactor = Redactor(RedactConfig(reversible=True), KEY)
    text = (
        " and ".join(f"{p} of {n} Oak Street" for p, n in zip(people, numbers + [7] * 6, strict=False)) + f" | {word}"
    )
    request, _ = redact_turn(redactor, user(text), scope=word)
    assert restore_text(request["messages"][0]["content"], redactor.mapping_of(word)) == text


COPIED = "178 Lakeview Drive"


def reworded(paraphrase, keep_chars: int = 12) -> tuple[dict, dict, Redactor]:
    redactor = Redactor(RedactConfig(paraphrase=True, paraphrase_keep_chars=keep_chars), KEY, paraphrase)
    data = json.dumps({"first_name": "Olga", "address1": COPIED})
    arguments = json.dumps({"name": "Olga", "address": COPIED, "urgent": True})
    call = {"id": "1", "type": "function", "function": {"name": "ship", "arguments": arguments}}
    request, answer = redact_turn(
        redactor,
        user(f"Hey, Olga here, my dog ate the parcel so please ship it again to {COPIED}"),
        {"role": "tool", "tool_call_id": "0", "content": data},
        user("no names in this one"),
        answer={"role": "assistant", "content": None, "tool_calls": [call]},
    )
    return request, answer, redactor


def test_a_passage_is_reworded_and_what_the_answer_copies_survives():
    request, answer, redactor = reworded(
        lambda text: text.replace("Hey, ", "").replace("my dog ate the parcel so ", "")
    )
    arguments = json.loads(answer["tool_calls"][0]["function"]["arguments"])
    text, data, other = (message["content"] for message in request["messages"])
    assert "my dog" not in text and other == "no names in this one"
    assert arguments["address"] in text and arguments["name"] in text and arguments["urgent"] is True
    assert json.loads(data) == {"first_name": arguments["name"], "address1": arguments["address"]}
    assert redactor.paraphrased == {"reworded": 1}


@pytest.mark.parametrize("paraphrase", [lambda text: "The customer wants it again.", lambda text: " ", str.upper])
def test_a_rewording_that_loses_what_is_copied_is_not_taken(paraphrase):
    request, answer, redactor = reworded(paraphrase)
    plain, plain_answer, _ = reworded(lambda text: text)
    assert request == plain and answer == plain_answer
    assert redactor.paraphrased == {"kept": 1}


def test_shared_spans_are_the_longest_ones():
    spans = copied_spans("the quick brown fox jumps", {"see: quick brown dog", '{"a": "fox", "b": [1]}'}, 8)
    assert spans == {" quick brown ", "fox"}


def test_paraphrasing_without_a_model_is_a_config_error():
    with pytest.raises(ConfigError, match=r"redact.paraphrase=True.*redact.paraphrase=false"):
        Redactor(RedactConfig(paraphrase=True), KEY)


def test_a_spacy_model_of_a_folder_adds_its_persons(tmp_path):
    import spacy

    model = spacy.blank("en")
    ruler = model.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "Zzyxqa Qwortle"}, {"label": "ORG", "pattern": "Glimfeather"}])
    model.to_disk(tmp_path / "model")
    text = "I saw zebras, then asked whether Zzyxqa Qwortle knows Glimfeather"
    assert redact_text(RedactConfig(), text) == text
    redacted = redact_text(RedactConfig(spacy_model=str(tmp_path / "model")), text)
    assert "Zzyxqa" not in redacted and "Qwortle" not in redacted and redacted.endswith("knows Glimfeather")
