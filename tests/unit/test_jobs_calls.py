"""jobs/calls.py, jobs/calls_verb.py: counts and costs add up, content stays out, and SQL finds no way out."""

import json

import pytest

from cluster import access
from cluster.access import Pseudonyms, load_pseudonym_key
from cluster.calls import CONTENT_COLUMNS, write_calls
from cluster.errors import InputError
from cluster.records import AgentCall, RouteDecision, Usage
from cluster.store import Store
from jobs import calls as module
from jobs.__main__ import main
from jobs.calls import Filters, count_calls, list_calls, price_calls, query_calls

SECRET = "s3cr3t"
DAY = 1_760_000_000.0  # 2025-10-09 08:53:20


def make_call(number: int, **fields) -> AgentCall:
    values = {
        "call_id": f"c{number}",
        "ts": DAY + number * 3600,
        "client_id": "nobody",
        "agent": "desk",
        "session_id": f"s{number}",
        "step": 0,
        "request": {"model": "big", "messages": [{"role": "user", "content": SECRET}]},
        "response": {"model": "big-1", "choices": [{"message": {"role": "assistant", "content": SECRET}}]},
        "label": SECRET,
        "outcome": {"text": SECRET},
        "route": RouteDecision(action="llm", reason=SECRET, task_id="t1"),
    }
    return AgentCall(**{**values, **fields})


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path / "store"))
    pseudonyms = Pseudonyms(load_pseudonym_key(store.uri))
    ann = {"client_id": pseudonyms.of("client", "ann"), "session_id": pseudonyms.session_of("ann", "talk")}
    usage = Usage(prompt_tokens=10, completion_tokens=2)
    write_calls(store, [make_call(0, agent="replaced", ts=DAY - 30 * 86400)])
    write_calls(
        store,
        [
            make_call(0, usage=usage, cost_usd=0.5, cost_basis="estimated", latency_ms=100.0, **ann),
            make_call(1, usage=usage, cost_usd=0.25, latency_ms=300.0),
            make_call(2, agent="till", status=500, error="timeout", response=None, served_by="specialist"),
            make_call(3, agent="till", faces_person=True, ts=DAY + 2 * 86400, route=None),
            make_call(4, agent="audit", audit_of="c1", cost_usd=9.0),
        ],
    )
    return store


def test_counts_tell_agents_people_and_failures_apart_and_leave_audits_out(store):
    assert count_calls(store, Filters(), "agent", 9).rows == [("all", 3, 1, 1), ("desk", 2, 0, 0), ("till", 1, 1, 1)]
    assert ("audit", 1, 0, 0) in count_calls(store, Filters(audits=True), "agent", 9).rows
    assert count_calls(store, Filters(), "day", 9).rows[1:] == [("2025-10-09", 3, 0, 1), ("2025-10-11", 0, 1, 0)]
    assert count_calls(store, Filters(), "task", 9).rows[1:] == [("t1", 3, 0, 1), ("-", 0, 1, 0)]


def test_costs_add_up_and_say_what_has_no_price(store):
    answer = price_calls(store, Filters(), "agent", 9)
    assert answer.head[1:] == [
        "calls",
        "tokens_in",
        "tokens_out",
        "cost_usd",
        "of_it_estimated",
        "unpriced",
        "p50_ms",
        "p95_ms",
    ]
    assert answer.rows == [
        ("all", 4, 20, 4, 0.75, 0.5, 2, 200.0, 290.0),
        ("desk", 2, 20, 4, 0.75, 0.5, 0, 200.0, 290.0),
        ("till", 2, 0, 0, 0.0, 0, 2, None, None),
    ]


@pytest.mark.parametrize("by", module.GROUPS)
def test_every_group_adds_up_to_all(store, by):
    everything, *groups = count_calls(store, Filters(), by, 9).rows
    assert [sum(column) for column in list(zip(*groups, strict=True))[1:]] == list(everything[1:]) == [3, 1, 1]
    assert sum(row[1] for row in price_calls(store, Filters(), by, 9).rows[1:]) == 4


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "c3 c2 c1 c0"),
        ({"audits": True}, "c3 c4 c2 c1 c0"),
        ({"agent": "till"}, "c3 c2"),
        ({"agent": "x' OR 'a' = 'a"}, ""),
        ({"task": "t1"}, "c2 c1 c0"),
        ({"day": "2025-10-11"}, "c3"),
        ({"since": "2025-10-10"}, "c3"),
        ({"until": "2025-10-09T09:53:20+00:00"}, "c0"),
        ({"since": "2025-10-09T11:53:20+02:00", "until": "2025-10-10"}, "c2 c1"),
        ({"status": "failed"}, "c2"),
        ({"status": "ok"}, "c3 c1 c0"),
        ({"status": "500"}, "c2"),
        ({"served_by": "specialist"}, "c2"),
        ({"client": "ann"}, "c0"),
        ({"client": "ann", "session": "talk"}, "c0"),
        ({"client": "ann", "session": "other"}, ""),
    ],
)
def test_filters_choose(store, filters, expected):
    rows = list_calls(store, Filters(**filters), 9).rows
    assert " ".join(row[0] for row in rows) == expected


@pytest.mark.parametrize(
    "filters",
    [{"day": "x"}, {"since": "yesterday"}, {"status": "bad"}, {"status": "-1"}, {"session": "talk"}],
)
def test_a_filter_that_means_nothing_is_refused(store, filters):
    with pytest.raises(InputError, match="allowed: .*; next: "):
        list_calls(store, Filters(**filters), 9)


def test_no_metadata_holds_content(store):
    answer = query_calls(store, "SELECT * FROM calls", 99)
    assert set(answer.head).isdisjoint({*CONTENT_COLUMNS, "route"})
    assert len(answer.rows) == 5 and SECRET not in repr(answer.rows)


def test_rows_over_the_limit_are_told(store):
    assert query_calls(store, "SELECT * FROM range(10)", 3) == (["range"], [(0,), (1,), (2,)], True)
    assert not query_calls(store, "SELECT * FROM range(3)", 3).is_cut
    assert [row[0] for row in list_calls(store, Filters(), 1).rows] == ["c3"]


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "SELEC",
        "SELECT 1; SELECT 2",
        "SELECT request FROM calls",
        "SELECT * FROM '{path}'",
        "SELECT * FROM read_csv('{path}')",
        "SELECT * FROM read_text('{path}')",
        "SELECT * FROM read_parquet('{path}')",
        "SELECT * FROM glob('{path}')",
        "SELECT * FROM 'http://127.0.0.1:9/x.csv'",
        "SELECT * FROM stored",
        "SELECT * FROM secret_of_this_frame",
        "COPY calls TO '{path}.out'",
        "EXPORT DATABASE '{path}.out'",
        "ATTACH '{path}.out'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "PRAGMA database_list",
        "DROP TABLE calls",
        "DELETE FROM calls",
        "CREATE TABLE x AS SELECT 1",
        "SELECT * FROM query('DROP TABLE calls')",
        "SELECT getenv('HOME')",
    ],
)
def test_sql_that_does_more_than_read_the_table_is_refused(store, tmp_path, sql):
    path = tmp_path / "outside.csv"
    path.write_text(f"a\n{SECRET}\n")
    secret_of_this_frame = __import__("pyarrow").table({"a": [SECRET]})
    with pytest.raises(InputError, match=r"allowed: one SELECT over calls\(call_id, .*next: ") as caught:
        query_calls(store, sql.replace("{path}", str(path)), 9)
    assert SECRET not in str(caught.value) and secret_of_this_frame is not None
    assert [entry.name for entry in tmp_path.iterdir() if ".out" in entry.name] == []


def test_an_empty_store_answers_too(tmp_path):
    store = Store(str(tmp_path))
    assert count_calls(store, Filters(), "agent", 9).rows == [("all", 0, 0, 0)]
    assert list_calls(store, Filters(), 9).rows == query_calls(store, "SELECT * FROM calls", 9).rows == []


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line_prints_tab_separated_rows_or_json_when_piped(store, capsys):
    at = f"store={store.uri}"
    code, out, _ = run(capsys, "calls", "count", at, "--by", "agent")
    assert code == 0 and out.splitlines()[:2] == ["agent\tcalls\tto_a_person\tfailed", "all\t3\t1\t1"]
    code, out, err = run(capsys, "calls", at, "--limit", "1", "list", "--json")
    assert code == 0 and [row["call_id"] for row in json.loads(out)] == ["c3"]
    assert "only the first 1 rows" in err
    code, out, _ = run(capsys, "calls", "--sql", "SELECT count(*) AS n FROM calls WHERE agent = 'desk'", at)
    assert (code, out) == (0, "n\n2\n")


def test_a_cell_cannot_steer_the_terminal(tmp_path, capsys):
    store = Store(str(tmp_path))
    write_calls(store, [make_call(0, agent="a\x1b[2Jb\tc\nd")])
    _, out, _ = run(capsys, "calls", "count", "--by", "agent", f"store={store.uri}")
    assert out.splitlines()[2] == "a?[2Jb?c?d\t1\t0\t0"


def test_only_show_prints_content_and_only_to_a_curator(store, capsys, monkeypatch):
    code, out, _ = run(capsys, "calls", "show", "c0", f"store={store.uri}")
    assert code == 0 and json.loads(out)["agent"] == "desk" and SECRET in out

    folder = access.keys_folder(store.uri)
    viewer = access.ApiKeys(folder / access.KEYS_FILE).create("somebody", "viewer")
    monkeypatch.setenv(access.API_KEY_ENV, viewer)
    code, out, err = run(capsys, "calls", "show", "c0", f"store={store.uri}")
    assert (code, out) == (2, "") and "needs role curator" in err
    for words in (["list"], ["count"], ["cost"], ["--sql", "SELECT * FROM calls"]):
        code, out, err = run(capsys, "calls", *words, f"store={store.uri}")
        assert code == 0 and SECRET not in out + err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "no such action"),
        (["lst"], "'lst'"),
        (["show"], "takes 1 names"),
        (["list", "x"], "takes 0 names"),
        (["show", "nothing"], "no such call"),
        (["list", "--limit", "0"], "--limit 0"),
        (["list", "--sql", "SELECT 1"], "beside --sql"),
        (["--sql", "SELECT 1", "--agent", "desk"], "takes no filter"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(store, capsys, words, part):
    code, out, err = run(capsys, "calls", *words, f"store={store.uri}")
    assert (code, out) == (2, "") and part in err and "allowed: " in err and "next: " in err
