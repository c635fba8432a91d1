"""`understudy ingest` as a person types it: flags in any order, tables on stderr, counts on stdout, dry runs dry."""

import json

import pytest

from cluster.access import Pseudonyms, load_pseudonym_key
from cluster.calls import read_calls
from cluster.store import Store
from jobs.__main__ import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def log(tmp_path) -> str:
    examples = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "SECRET"}]}
        for n in range(3)
    ]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join([*map(json.dumps, examples), "{", json.dumps({"preferred_output": []})]))
    return str(path)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_words_and_flags_come_in_any_order(log, tmp_path, capsys, order):
    store = str(tmp_path / "store")
    groups = [[log], ["--format", "openai", "--client", "acme", "--agent", "desk"], [f"store={store}"]]
    code, out, err = run(capsys, "ingest", *(word for number in order for word in groups[number]))
    counts = json.loads(out)
    assert code == 0 and (counts["ingested"], counts["quarantined"], counts["skipped"]) == (3, 1, 1)
    calls = read_calls(Store(store))
    pseudonym = Pseudonyms(load_pseudonym_key(store)).of("client", "acme")
    assert {(call.client_id, call.agent) for call in calls} == {(pseudonym, "desk")}
    lines = err.splitlines()
    assert lines[0].split("\t")[1:4] == ["format", "records", "ingested"]
    assert f"{log}\topenai\t5\t3\t0\t1\t1" in lines
    assert "quarantined\tnot JSON\t1" in lines
    assert "skipped\ta preference pair, which no model answered as it stands\t1" in lines
    assert "\x1b" not in err and "\r" not in err and "SECRET" not in out + err


def test_a_dry_run_makes_no_store_and_no_key(log, tmp_path, capsys):
    store = tmp_path / "store"
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, "ingest", log, "--dry-run", f"store={store}")
    assert code == 0 and sorted(tmp_path.iterdir()) == before
    counts = json.loads(out)
    assert (counts["ingested"], counts["agents"], counts["num_clients"], counts["num_sessions"]) == (
        3,
        {"openai": 3},
        1,
        3,
    )
    assert "would ingest" in err and "nothing was written" in err and "without a time: 3" in err


def test_a_client_field_that_is_absent_is_told(log, tmp_path, capsys):
    code, _, err = run(capsys, "ingest", log, "--client-field", "metadata.who", f"store={tmp_path / 'store'}")
    assert code == 0 and "--client-field: absent in 3 records" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--client", ""], ["--client ''", "allowed", "next"]),
        (["--client-field", ""], ["--client-field ''", "allowed", "next"]),
        (["missing.json"], ["missing.json: no such file", "allowed", "next"]),
        (["stores=x"], ["stores: unknown key"]),
    ],
)
def test_what_is_wrong_exits_2_and_is_named(log, tmp_path, capsys, words, parts):
    code, out, err = run(capsys, "ingest", log, *words, f"store={tmp_path / 'store'}")
    assert (code, out) == (2, "") and [part for part in parts if part not in err] == []
    assert not (tmp_path / "store").exists() or Store(str(tmp_path / "store")).list("") == []


@pytest.mark.parametrize("words", [["--client", "a", "--client-field", "b"], ["--format", "xml"]])
def test_flags_that_cannot_be_are_refused_by_usage(log, capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(["ingest", log, *words])
    assert caught.value.code == 2 and "usage: understudy ingest" in capsys.readouterr().err
