"""jobs/bench/pii.py: what counts as found, right, false and broken, on texts made here and on a sample of real calls."""

import gzip
import itertools
import json
import pathlib

import pytest
from shared_data import DATA, NO_DATA

from cluster.errors import InputError
from jobs.bench import pii
from jobs.bench.presidio_stock import Found
from training.redact import RedactConfig, Redactor


def span(text: str, value: str, kind: str) -> dict:
    return {"start": text.index(value), "end": text.index(value) + len(value), "type": kind, "value": value}


def labelled(text: str, **kinds: str) -> dict:
    return {"text": text, "spans": [span(text, value, kind) for kind, value in kinds.items()]}


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def call(arguments: object, *texts: str) -> tuple[dict, dict]:
    function = {"name": "f", "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
    answer = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    schema = {"type": "object", "properties": {"zip": {"type": "string", "pattern": r"^\d{5}$"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    return {"messages": [{"role": "user", "content": text} for text in texts], "tools": tools}, answer


@pytest.fixture
def stock(monkeypatch):
    """A recogniser that finds "Anna" alone, in Presidio's place."""

    def recognise(text):
        at = text.find("Anna")
        return [Found(at, at + 4, "PERSON")] if at >= 0 else []

    monkeypatch.setattr(pii, "build_stock_presidio", lambda: recognise)
    monkeypatch.setattr(pii, "MIN_TIMED_S", 0.01)


def test_recall_precision_and_false_positives_are_counted_as_said(tmp_path, stock):
    gold = [
        labelled("I am Anna Schmidt", PERSON="Anna Schmidt"),
        labelled("write to jo.doe77@mail.com", EMAIL_ADDRESS="jo.doe77@mail.com"),
        labelled("ssn 150-65-8118", US_SSN="150-65-8118"),
        labelled("at 192.0.2.134", IP_ADDRESS="192.0.2.134"),
        labelled("he is 63, says Emma", AGE="63"),
        labelled("dear customer, the wug is lost", PERSON="wug"),
    ]
    silver = [{**labelled("I am Emma, Olga said", PERSON="Emma"), "label_kind": "silver"}]
    negative = [{"request": call({}, text)[0], "response": {}} for text in ("hello", "call Emma", "my card?", "why?")]
    result = pii.measure_pii(
        [write(tmp_path / "gold.jsonl", gold), write(tmp_path / "silver.jsonl.gz", silver)],
        [],
        [write(tmp_path / "negative.calls.jsonl", negative)],
    )
    assert result["pii_recall"] == 0.8 and result["pii_precision"] == 0.8333
    assert (result["presidio_recall"], result["presidio_precision"]) == (0.0, 1.0)
    assert result["pii_per_type"]["PERSON"] == {
        "num": 2,
        "recall": 0.5,
        "recall_strict": 0.5,
        "presidio_recall": 0.0,
        "precision": 0.6667,
    }
    assert result["pii_per_type"]["AGE"]["recall"] == 0.0
    assert [row["recall"] for row in result["pii_files"]] == [0.8, 1.0]
    assert result["pii_false_positive_rate"] == 0.25 and result["mb_per_s_core"] > 0
    assert result["tool_calls_broken"] is None


@pytest.mark.parametrize(
    ("before", "after", "broken"),
    [
        (call({"zip": "12345"}, "zip 12345"), call({"zip": "54321"}, "zip 54321"), 0),
        (call({"zip": "12345"}, "zip 12345"), call({"zip": "54321"}, "zip 11111"), 1),
        (call({"zip": "12345"}, "zip 12345"), call({"zip": "x"}, "zip x"), 1),
        (call({"zip": "x"}), call({"zip": "12345"}), 1),
        (call({"zip": "12345"}), call("{broken"), 1),
        (call("{broken"), call("{broken"), 0),
        (call({"a": "new"}, "hello"), call({"a": "other"}, "hello"), 0),
        (call({"a": "say \u00e9"}, '{"b": "say \\u00e9"}'), call({"a": "x \u00e9"}, '{"b": "x \\u00e9"}'), 0),
    ],
)
def test_a_tool_call_is_broken_where_it_no_longer_says_the_same(before, after, broken):
    assert pii.count_broken(before, after) == broken


def test_an_answer_without_tool_calls_breaks_nothing():
    turn = ({"messages": []}, {"role": "assistant", "content": "hi"})
    assert pii.count_broken(turn, turn) == 0


@pytest.mark.parametrize(
    "row", ["[]", "{}", '{"text": "ab", "spans": [{"start": 0, "end": 1, "type": "X", "value": "b"}]}', "{"]
)
def test_a_file_of_another_format_is_an_input_error(tmp_path, row):
    path = tmp_path / "x.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(InputError, match="x.jsonl"):
        pii.read_pii_texts(path)


def test_a_file_is_gold_for_all_types_only_with_many_types_and_no_silver(tmp_path):
    one = labelled("Anna", PERSON="Anna")
    assert pii.read_pii_texts(write(tmp_path / "a.jsonl", [one])) == ([pii.PiiText("Anna", one["spans"])], False)


def test_no_tool_call_of_a_sample_of_real_sessions_is_broken(tmp_path):
    path = DATA / "agents/tau_airline.sessions.jsonl.gz"
    if not path.exists():
        pytest.skip(NO_DATA)
    with gzip.open(path, "rt") as stream:
        sample = list(itertools.islice(stream, 0, None, 10))
    (tmp_path / "sample.sessions.jsonl").write_text("".join(sample))
    assert pii.count_broken_tool_calls(tmp_path / "sample.sessions.jsonl") == 0
    redactor = Redactor(RedactConfig(), b"k" * 32)
    found = [
        bool(redactor.find(message["content"] or "")) for line in sample for message in json.loads(line)["messages"][1:]
    ]
    assert sum(found) > len(found) / 4
