"""training/curate.py: nothing leaks between splits, sessions never move, every call is accounted for."""

import gzip
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared_data import DATA, NO_DATA

from cluster.access import Pseudonyms
from cluster.calls import read_calls, write_calls
from cluster.config import validate
from cluster.errors import ConfigError, InputError, StoreError
from cluster.quarantine import read_quarantine
from cluster.records import AgentCall, RouteDecision
from cluster.store import Store
from jobs.ingest import ingest
from training import curate as curate_module
from training.cleaning import BAD_OUTCOME
from training.curate import BIASED, CurateConfig, curate
from training.leakage import LEAKED, SHARED_TEXT
from training.snapshot import AuditCounts, Snapshot, load_snapshot, load_split, read_rows
from training.splits import SPLITS, SplitConfig, split_of
from training.validity import AUDIT_MISSING, FACES_PERSON, MALFORMED_ANSWER, MALFORMED_REQUEST, TOO_DEEP

KEY = b"k" * 32
SHARES = SplitConfig(test_by="hash")
"""So that a session's name decides its split; tests/unit/test_training_splits.py is about time."""
SESSION_IN = {split: next(f"s{i}" for i in range(1000) if split_of(f"s{i}", SHARES) == split) for split in SPLITS}
OTHER_TRAIN_SESSION = next(f"t{i}" for i in range(1000) if split_of(f"t{i}", SHARES) == "train")
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]


def make_call(index: int, question: str = "", **fields) -> AgentCall:
    question = question or f"question {index}"
    values = {
        "call_id": f"call-{index}",
        "ts": 1_700_000_000.0 + index,
        "client_id": "client",
        "agent": "desk",
        "session_id": f"s{index}",
        "step": 0,
        "request": {"model": "big", "user": "u", "messages": [{"role": "user", "content": question}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]},
    }
    return AgentCall(**{**values, **fields})


def curate_calls(tmp_path, calls, **config) -> tuple[Store, Snapshot]:
    store = Store(str(tmp_path / "store"))
    write_calls(store, calls)
    return store, curate(store, CurateConfig(**{"split": SHARES, **config}), KEY)


def ids_of(store: Store, snapshot: Snapshot, split) -> set[str]:
    rows = read_rows(store, snapshot.id, split, ["source_call_ids"])
    return {call_id for ids in rows["source_call_ids"].to_pylist() for call_id in ids}


def answer(content: str | None = None, finish: str = "stop", **fields) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": content, **fields}, "finish_reason": finish}]}


def ask(*messages: dict, **fields) -> dict:
    return {"messages": list(messages or [{"role": "user", "content": "hello"}]), **fields}


def said_call(**function) -> dict:
    return answer(tool_calls=[{"id": "c", "type": "function", "function": function}])


def nest(depth: int) -> dict:
    return {"inner": nest(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"served_by": "specialist"}, "answered by a specialist"),
        ({"status": 500}, "call failed"),
        ({"response": None}, "no answer"),
        ({"response": {"choices": []}}, "no answer"),
        ({"response": answer(None)}, "no answer"),
        ({"response": answer(" \n")}, "no answer"),
        ({"response": answer(function_call={"name": "f", "arguments": "{}"})}, "no answer"),
        ({"served_by": "specialist", "is_reference": True}, AUDIT_MISSING),
        ({"response": answer("yes", "length")}, "answer cut off"),
        ({"response": answer("yes", "content_filter")}, "answer cut off"),
        ({"faces_person": True}, "answer faces a person"),
        ({"question": "x" * 101_000}, "prompt longer than 100000 characters"),
        ({"request": {"messages": [{"role": "user", "content": [nest(150)]}]}}, TOO_DEEP),
        ({"response": {"choices": {"message": {"content": "yes"}}}}, MALFORMED_ANSWER),
        ({"response": {"choices": ["yes"]}}, MALFORMED_ANSWER),
        ({"response": {"choices": [{"message": "yes"}]}}, MALFORMED_ANSWER),
        ({"response": answer({"text": "yes"})}, MALFORMED_ANSWER),
        ({"response": answer([{"type": "image_url"}])}, MALFORMED_ANSWER),
        ({"response": said_call(name="f", arguments='{"a": 1')}, MALFORMED_ANSWER),
        ({"response": said_call(name="f", arguments="[1]")}, MALFORMED_ANSWER),
        ({"response": said_call(arguments="{}")}, MALFORMED_ANSWER),
        ({"response": answer(tool_calls={"name": "f"})}, MALFORMED_ANSWER),
        ({"response": answer(tool_calls=["f"])}, MALFORMED_ANSWER),
        ({"request": {}}, MALFORMED_REQUEST),
        ({"request": ask({"content": "no role"})}, MALFORMED_REQUEST),
        ({"request": ask({"role": "bot", "content": "hi"})}, MALFORMED_REQUEST),
        ({"request": ask({"role": "user", "content": {"text": "hi"}})}, MALFORMED_REQUEST),
        ({"request": ask({"role": "user", "content": [{"type": "text"}]})}, MALFORMED_REQUEST),
        ({"request": ask({"role": "user", "content": ["hi"]})}, MALFORMED_REQUEST),
        ({"request": ask({"role": "assistant", "tool_calls": [{"function": None}]})}, MALFORMED_REQUEST),
        ({"request": ask(tools={"name": "f"})}, MALFORMED_REQUEST),
        ({"request": ask(tools=[{"function": "f"}])}, MALFORMED_REQUEST),
        ({"request": ask(functions=[{"name": ["f"]}])}, MALFORMED_REQUEST),
        ({"request": ask(response_format="json")}, MALFORMED_REQUEST),
        ({"request": ask(tool_choice={"function": "f"})}, MALFORMED_REQUEST),
    ],
)
def test_calls_that_cannot_be_learned_from_are_dropped_and_counted(tmp_path, fields, reason):
    store, snapshot = curate_calls(tmp_path, [make_call(0), make_call(1, **fields)])
    assert snapshot.counts.dropped == {reason: 1}
    assert set().union(*(ids_of(store, snapshot, split) for split in SPLITS)) == {"call-0"}


@pytest.mark.parametrize("split", SPLITS)
def test_an_audited_call_counts_once_and_the_llms_answer_is_the_target(tmp_path, split):
    routes = [RouteDecision(action=action, reason="", task_id="t", specialist="t@1") for action in ("accept", "audit")]
    shared = {"session_id": SESSION_IN[split], "is_reference": True}
    kept = make_call(0, "same", served_by="specialist", route=routes[0], response=answer("ours"), **shared)
    audit = make_call(1, "same", audit_of="call-0", route=routes[1], response=answer("theirs"), **shared)
    store, snapshot = curate_calls(tmp_path, [kept, audit])
    assert (snapshot.counts.num_calls, snapshot.counts.dropped) == (1, {})
    assert snapshot.counts.audits == {"t": AuditCounts(num_kept=1, num_audited=1)}
    assert ids_of(store, snapshot, split) == {"call-1"}


def test_what_a_specialist_was_asked_off_the_path_changes_nothing(tmp_path):
    route = RouteDecision(action="shadow", reason="would be kept", task_id="t", specialist="t@1", agrees=False)
    shadow = make_call(9, "same", served_by="specialist", route=route, audit_of="call-0", response=answer("ours"))
    _, before = curate_calls(tmp_path / "without", [make_call(0, "same")])
    store, snapshot = curate_calls(tmp_path / "with", [make_call(0, "same"), shadow])
    assert snapshot == before
    assert set().union(*(ids_of(store, snapshot, split) for split in SPLITS)) == {"call-0"}


def test_lost_audits_are_counted_by_task(tmp_path):
    def kept(index: int, task: str, **fields) -> AgentCall:
        route = RouteDecision(action="accept", reason="", task_id=task, specialist=f"{task}@1")
        return make_call(index, served_by="specialist", route=route, **{"is_reference": True, **fields})

    def audit(index: int, task: str, of: int, **fields) -> AgentCall:
        route = RouteDecision(action="audit", reason="", task_id=task, specialist=f"{task}@1")
        return make_call(index, route=route, is_reference=True, audit_of=f"call-{of}", **fields)

    calls = [kept(i, "a" if i < 4 else "b") for i in range(6)]
    calls += [audit(10, "a", 0), audit(11, "a", 1), audit(12, "a", 2, response=answer(None)), audit(13, "b", 99)]
    _, snapshot = curate_calls(tmp_path, [*calls, kept(20, "a", is_reference=False)])
    assert snapshot.counts.audits == {
        "a": AuditCounts(num_kept=4, num_audited=2),
        "b": AuditCounts(num_kept=3, num_audited=1),
    }
    assert snapshot.counts.dropped == {AUDIT_MISSING: 3, "no answer": 1, "answered by a specialist": 1}


@pytest.mark.parametrize("split", SPLITS)
def test_escalated_calls_teach_but_only_the_reference_stream_is_held_out(tmp_path, split):
    route = RouteDecision(action="escalate", reason="", task_id="t", specialist="t@1", confidence=0.1)
    calls = [make_call(i, session_id=SESSION_IN[split], route=route, is_reference=i == 0) for i in range(2)]
    store, snapshot = curate_calls(tmp_path, calls)
    is_train = split == "train"
    assert snapshot.counts.dropped == ({} if is_train else {BIASED: 1})
    assert ids_of(store, snapshot, split) == ({"call-0", "call-1"} if is_train else {"call-0"})


def test_a_long_prompt_is_listed_in_quarantine(tmp_path):
    store, _ = curate_calls(tmp_path, [make_call(0), make_call(1, "x" * 300_000)])
    (row,) = read_quarantine(store)
    assert row.reason == "prompt longer than 100000 characters"
    assert "call-1" in row.detail and "xxx" not in row.detail


def test_a_malformed_call_is_listed_in_quarantine_without_its_words(tmp_path):
    bad = [
        make_call(1, request=ask({"role": "SECRET", "content": "SECRET"})),
        make_call(2, response=said_call(name="SECRET", arguments="SECRET")),
    ]
    store, _ = curate_calls(tmp_path, [make_call(0), *bad])
    rows = sorted(read_quarantine(store), key=lambda row: row.detail)
    assert [row.reason for row in rows] == [MALFORMED_REQUEST, MALFORMED_ANSWER]
    assert [row.detail.split(":")[0] for row in rows] == ["call call-1", "call call-2"]
    assert "messages.0.role" in rows[0].detail and "SECRET" not in repr(rows)


def test_parts_that_are_not_text_are_well_formed(tmp_path):
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    request = ask({"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture]})
    assert curate_calls(tmp_path, [make_call(0, request=request)])[1].counts.dropped == {}


def test_calls_that_face_a_person_are_kept_on_request(tmp_path):
    calls = [make_call(0, faces_person=True)]
    assert curate_calls(tmp_path, calls, keep_faces_person=True)[1].counts.dropped == {}


def test_an_answer_that_ends_a_turn_leaves_train_alone(tmp_path):
    """Serving learns only from the answer that the turn has ended: held out, such a call speaks for what it may keep."""
    request = ask(tools=[{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])
    turns = {"request": request, "response": answer("Your bag is on its way."), "faces_person": True}
    calls = [
        make_call(i, session_id=SESSION_IN[split], **{**turns, "ts": 1.7e9 + 60 * i}) for i, split in enumerate(SPLITS)
    ]
    store, snapshot = curate_calls(tmp_path, calls)
    assert snapshot.counts.dropped == {FACES_PERSON: 1}
    assert {split: len(ids_of(store, snapshot, split)) for split in SPLITS} == {
        "train": 0,
        "validation": 1,
        "calibration": 1,
        "test": 1,
    }


def test_a_bad_outcome_keeps_its_session_out_of_train_alone(tmp_path):
    calls = [make_call(i, session_id=SESSION_IN[split], outcome={"reward": 0.0}) for i, split in enumerate(SPLITS)]
    same_session = make_call(8, session_id=SESSION_IN["train"], outcome={"correct": True})
    good = make_call(9, session_id=OTHER_TRAIN_SESSION, outcome={"correct": True})
    store, snapshot = curate_calls(tmp_path, [*calls, same_session, good], min_reward=0.5)
    assert snapshot.counts.dropped == {BAD_OUTCOME: 2}
    assert ids_of(store, snapshot, "train") == {"call-9"}
    assert snapshot.counts.num_examples == dict.fromkeys(SPLITS, 1)


def test_train_merges_exact_duplicates_and_the_others_keep_them(tmp_path):
    calls = [
        make_call(10 * number + copy, f"about {split}", session_id=SESSION_IN[split])
        for number, split in enumerate(SPLITS)
        for copy in range(3)
    ]
    store, snapshot = curate_calls(tmp_path, calls)
    assert snapshot.counts.num_examples == {"train": 1, "validation": 3, "calibration": 3, "test": 3}
    (example,) = load_split(store, snapshot.id, "train", as_served=False)
    assert example.source_call_ids == ("call-0", "call-1", "call-2")


def test_duplicates_differ_in_ids_of_tool_calls_but_not_in_answers(tmp_path):
    def respond(name: str, call_id: str) -> dict:
        function = {"name": name, "arguments": "{}"}
        message = {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "function": function}]}
        return {"choices": [{"message": message}]}

    responses = [respond("f", "1"), respond("f", "2"), respond("g", "3")]
    asked = ask({"role": "user", "content": "same"}, tools=TOOLS)
    calls = [make_call(i, request=asked, session_id=SESSION_IN["train"], response=r) for i, r in enumerate(responses)]
    _, snapshot = curate_calls(tmp_path, calls)
    assert snapshot.counts.num_examples["train"] == 2
    assert snapshot.counts.num_train_requests_with_several_answers == 1


def test_a_user_text_of_another_split_leaves_train_though_the_task_is_another(tmp_path):
    user = {"role": "user", "content": "When will my new blue tent arrive?"}
    calls = [
        make_call(i, request=ask({"role": "system", "content": split}, user), session_id=SESSION_IN[split])
        for i, split in enumerate(("train", "test"))
    ]
    store, snapshot = curate_calls(tmp_path, calls)
    assert snapshot.counts.dropped == {SHARED_TEXT: 1}
    assert ids_of(store, snapshot, "test") == {"call-1"}


@pytest.mark.parametrize("split", SPLITS[1:])
def test_a_request_of_another_split_leaves_train_and_stays_there(tmp_path, split):
    calls = [make_call(0, "same", session_id=SESSION_IN["train"]), make_call(1, "same", session_id=SESSION_IN[split])]
    store, snapshot = curate_calls(tmp_path, calls)
    assert snapshot.counts.dropped == {LEAKED: 1}
    assert ids_of(store, snapshot, split) == {"call-1"}


def test_stored_examples_hold_no_served_content(tmp_path):
    secret = "jo.doe77@mail.com"
    calls = [make_call(i, f"{split} {secret}", session_id=SESSION_IN[split]) for i, split in enumerate(SPLITS)]
    store, snapshot = curate_calls(tmp_path, calls)
    for split in SPLITS:
        rows = read_rows(store, snapshot.id, split).to_pylist()
        assert secret not in repr(rows)
        assert (rows[0]["request"] is None) == (split in ("calibration", "test"))
    assert snapshot.counts.redacted == {"EMAIL_ADDRESS": 2}


def test_splits_are_joined_with_what_was_served(tmp_path):
    calls = [make_call(i, f"{split} a@mail.com", session_id=SESSION_IN[split]) for i, split in enumerate(SPLITS)]
    store, snapshot = curate_calls(tmp_path, calls)
    for index, split in enumerate(SPLITS[1:], 1):
        (example,) = load_split(store, snapshot.id, split, as_served=True)
        assert example.request == calls[index].request
        assert (example.target, example.split) == (calls[index].message, split)
    (stored,) = load_split(store, snapshot.id, "validation", as_served=False)
    assert "a@mail.com" not in str(stored.request)


def test_log_probabilities_are_kept_unless_they_are_of_other_texts_than_what_is_learned(tmp_path):
    def tell(text):
        return [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": [{"token": "no", "logprob": -2.5}]}]

    def call(index, question, content):
        said = {"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        response = {"choices": [{**said, "logprobs": {"content": content}}]}
        return make_call(index, question, session_id=SESSION_IN["train"], client_id=f"c{index}", response=response)

    calls = [
        call(0, "is it open on sundays?", tell("yes")),
        call(1, "is maria.keller@example.org a member?", tell("yes")),
        call(2, "is it closed in winter?", [{"token": "yes", "logprob": -0.1, "top_logprobs": []}]),
        make_call(3, "is the shop near here?", session_id=SESSION_IN["train"], client_id="c3"),
    ]
    store, snapshot = curate_calls(tmp_path, calls, max_client_share=1.0)
    assert snapshot.counts.logprobs == {"kept": 1, "redacted": 1, "unreadable": 1}
    found = {one.source_call_ids[0]: one.logprobs for one in load_split(store, snapshot.id, "train", as_served=False)}
    assert found.pop("call-0") == [("796573", [("796573", -0.1), ("6e6f", -2.5)])]
    assert set(found) == {"call-1", "call-2", "call-3"} and not any(found.values())


@pytest.mark.parametrize(("split", "as_served"), [("train", True), ("calibration", False), ("test", False)])
def test_a_split_is_refused_in_a_form_it_must_not_have(tmp_path, split, as_served):
    store, snapshot = curate_calls(tmp_path, [make_call(0)])
    with pytest.raises(InputError, match="allowed"):
        load_split(store, snapshot.id, split, as_served=as_served)


def test_of_a_call_stored_twice_the_one_written_last_counts(tmp_path):
    store = Store(str(tmp_path / "store"))
    write_calls(store, [make_call(0, session_id=SESSION_IN["train"], response=answer("first"))])
    later = make_call(0, session_id=SESSION_IN["train"], response=answer("second"), ts=1_800_000_000.0)
    write_calls(store, [later, make_call(1, session_id=SESSION_IN["train"])])
    snapshot = curate(store, CurateConfig(split=SHARES), KEY)
    assert snapshot.counts.num_calls == 2
    examples = load_split(store, snapshot.id, "train", as_served=False)
    assert sorted(e.target["content"] for e in examples) == ["second", "yes"]


def test_the_reference_says_who_answered(tmp_path):
    calls = [
        make_call(0, session_id=SESSION_IN["train"], served_by="gold"),
        make_call(1, session_id=SESSION_IN["train"]),
    ]
    store, snapshot = curate_calls(tmp_path, calls)
    assert [e.reference for e in load_split(store, snapshot.id, "train", as_served=False)] == ["gold", "llm"]


def test_curating_the_same_calls_again_finds_the_snapshot(tmp_path):
    store, snapshot = curate_calls(tmp_path, [make_call(0), make_call(1)])
    files = {name: store.read_bytes(name) for name in store.list("examples")}
    assert curate(store, CurateConfig(split=SHARES), KEY) == snapshot == load_snapshot(store, snapshot.id)
    assert {name: store.read_bytes(name) for name in store.list("examples")} == files
    assert curate(store, CurateConfig(split=SHARES, min_reward=0.5), KEY).id != snapshot.id
    write_calls(store, [make_call(2)])
    assert curate(store, CurateConfig(split=SHARES), KEY).id != snapshot.id


def test_a_snapshot_is_named_by_the_version_of_the_code_and_the_key_of_its_surrogates(tmp_path, monkeypatch):
    store, snapshot = curate_calls(tmp_path, [make_call(0, "mail jo.doe77@mail.com", session_id=SESSION_IN["train"])])
    other = curate(store, CurateConfig(), b"another key" * 3)
    assert other.id != snapshot.id
    (one,), (two,) = (load_split(store, s.id, "train", as_served=False) for s in (snapshot, other))
    assert one.request != two.request
    manifest = store.manifest(snapshot.folder)
    assert manifest["version"] == curate_module.CURATION_VERSION
    assert KEY.hex()[:8] not in str(manifest) and KEY.decode()[:8] not in str(manifest)
    monkeypatch.setattr(curate_module, "CURATION_VERSION", curate_module.CURATION_VERSION + 1)
    assert curate(store, CurateConfig(split=SHARES), KEY).id not in (snapshot.id, other.id)


def test_an_empty_store_and_an_unknown_snapshot_are_refused(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(InputError, match="next: understudy ingest"):
        curate(store, CurateConfig(split=SHARES), KEY)
    with pytest.raises(StoreError):
        load_split(store, "nothing", "train", as_served=False)


def test_shares_that_do_not_add_up_are_a_config_error():
    with pytest.raises(ConfigError, match=r"split: .*is 1\.1; allowed: exactly 1"):
        validate(CurateConfig, {"split": {"train": 0.6}})


CALLS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.booleans()), min_size=1, max_size=25)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=CALLS, num_before=st.integers(0, 25))
def test_nothing_leaks_nothing_moves_and_the_counts_add_up(tmp_path_factory, drawn, num_before):
    calls = [
        make_call(i, f"question {question}", session_id=f"s{session}", status=500 if is_failed else 200)
        for i, (session, question, is_failed) in enumerate(drawn)
    ]
    folder = tmp_path_factory.mktemp("curate")
    store, snapshot = curate_calls(folder, calls)
    counts, by_id = snapshot.counts, {call.call_id: call for call in calls}
    assert counts.num_calls == sum(counts.dropped.values()) + sum(counts.num_source_calls.values())
    ids = {split: ids_of(store, snapshot, split) for split in SPLITS}
    assert {split: len(found) for split, found in ids.items()} == counts.num_source_calls
    sessions = [{by_id[i].session_id for i in ids[split]} for split in SPLITS]
    assert sum(map(len, sessions)) == len(set().union(*sessions))
    asked = {split: {str(by_id[i].request) for i in ids[split]} for split in SPLITS}
    assert not asked["train"] & (asked["validation"] | asked["calibration"] | asked["test"])
    kept = [call for call in calls if call.status == 200]
    for split in SPLITS[1:]:
        assert ids[split] == {call.call_id for call in kept if split_of(call.session_id, SHARES) == split}
    if calls[:num_before]:
        before = curate_calls(folder / "before", calls[:num_before])
        assert all(ids_of(*before, split) <= ids[split] for split in SPLITS[1:])


def test_real_agent_traffic(tmp_path):
    if not DATA.is_dir():
        pytest.skip(NO_DATA)
    store, some = Store(str(tmp_path)), tmp_path / "some.calls.jsonl"
    with gzip.open(DATA / "nlu/snips.calls.jsonl.gz", "rt") as every:
        some.write_text("".join(itertools.islice(every, 1000)))
    ingest(store, [DATA / "agents/tau2_usersim_gpt4o.sessions.jsonl.gz", some], Pseudonyms(KEY))
    snapshot = curate(store, CurateConfig(split=SHARES), KEY)
    counts = snapshot.counts
    assert counts.num_calls == sum(counts.dropped.values()) + sum(counts.num_source_calls.values()) == 271 + 1000
    assert all(counts.num_examples[split] > 0 for split in SPLITS)
    examples = load_split(store, snapshot.id, "train", as_served=False)
    served = {call.call_id: call for call in read_calls(store)}
    for example in examples:
        original = served[example.source_call_ids[0]]
        assert [m["role"] for m in example.request["messages"]] == [m["role"] for m in original.request["messages"]]
        assert sorted(example.target) == sorted(original.message)
