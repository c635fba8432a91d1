"""training/validity.py: whatever a captured call holds, the stages of a conversion go through and count it."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.answers import check, grade
from cluster.calls import write_calls
from cluster.prompts import PromptFormat
from cluster.records import AgentCall
from cluster.store import Store
from training.candidates import estimate_prompt_tokens
from training.curate import CurateConfig, curate
from training.dataset import build_task_data
from training.discover import DiscoverConfig, discover, save_discovery
from training.scratch import texts_of, train_tokenizer
from training.selection import group_by_task
from training.snapshot import load_split
from training.splits import SPLITS, SplitConfig, split_of
from training.validity import find_problem

KEY = b"k" * 32
NUM_GOOD = 24
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}{{ tools }}"
SESSIONS = {split: next(f"s{i}" for i in range(1000) if split_of(f"s{i}", SplitConfig()) == split) for split in SPLITS}
SCHEMA = {"type": "object", "properties": {"order": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}
CALL = {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"order": "AB-1234"}'}}
RICH = {
    "request": {
        "model": "big",
        "messages": [
            {"role": "system", "content": "Find the order.\nReturn JSON."},
            {"role": "user", "content": [{"type": "text", "text": "order AB-1234 of jo.doe77@mail.com"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": '{"order": "AB-1234"}'},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "find"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "o", "schema": SCHEMA}},
    },
    "response": {
        "choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [CALL]}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3},
    },
}
TEXTS = ["text", "user", "function", "{", '{"order": "AB-1234"}', '{"a": [1e999]}', "[" * 5000, "\ue0003,4\ue001", ""]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(TEXTS),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from("role content type text function name arguments $schema".split()), inner)
    ),
    max_leaves=5,
)


def paths_of(value, path=()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in items for found in paths_of(inner, (*path, key)))]


@st.composite
def damaged_calls(draw) -> dict:
    """A rich call of which up to three parts are something else, or gone."""
    call = copy.deepcopy(RICH)
    if draw(st.booleans()):
        call["response"]["choices"][0]["message"] = {"role": "assistant", "content": draw(st.sampled_from(TEXTS))}
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from([path for path in paths_of(call) if path not in ((), ("request",))]))
        place = call
        for step in above:
            place = place[step]
        if draw(st.booleans()) and isinstance(place, dict):
            del place[key]
        else:
            place[key] = draw(JSON)
        call = {"request": {}, "response": None} | call
        call["response"] = call["response"] if isinstance(call["response"], dict) else None
    return call


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["order AB-1234 please find it for me"] * 20, 600)
    made.chat_template = TEMPLATE
    return made


def make_call(index: int, split: str, request: dict, response: dict | None) -> AgentCall:
    return AgentCall(
        call_id=f"call-{index}",
        ts=1_700_000_000.0 + index,
        client_id="client",
        agent="desk",
        session_id=SESSIONS[split],
        step=0,
        request=request,
        response=response,
    )


def good_calls() -> list[AgentCall]:
    calls = []
    for index in range(NUM_GOOD):
        messages = [{"role": "system", "content": "Sort."}, {"role": "user", "content": f"case {index}"}]
        message = {"role": "assistant", "content": ["yes", "no"][index // 4 % 2]}
        calls.append(
            make_call(index, SPLITS[index % 4], {"messages": messages}, {"choices": [{"index": 0, "message": message}]})
        )
    return calls


@settings(suppress_health_check=list(HealthCheck))
@given(damaged=st.lists(damaged_calls(), min_size=1, max_size=2))
def test_no_call_stops_a_conversion_and_every_call_is_counted(tmp_path_factory, tokenizer, damaged):
    store = Store(str(tmp_path_factory.mktemp("store")))
    calls = good_calls()
    for call in damaged:
        calls += [make_call(len(calls) + place, split, **call) for place, split in enumerate(SPLITS)]
    write_calls(store, calls)
    snapshot = curate(store, CurateConfig(), KEY)
    counts = snapshot.counts
    assert counts.num_calls == len(calls) == sum(counts.dropped.values()) + sum(counts.num_source_calls.values())
    examples = {split: load_split(store, snapshot.id, split, as_served=split != "train") for split in SPLITS}
    found = discover(examples, DiscoverConfig(min_calls=2))
    save_discovery(store, snapshot.id, found)
    num_placed = sum(task.num_calls for task in found.tasks) + sum(found.unassigned.values())
    assert num_placed == sum(counts.num_source_calls.values())
    by_split = {split: group_by_task(examples[split], found.assignment) for split in SPLITS}
    for task in found.tasks:
        train, validation = (by_split[split].get(task.task_id, []) for split in ("train", "validation"))
        texts_of(train, task.static_lines)
        for kind in ("compact", "chat"):
            prompt_format = PromptFormat(kind=kind, answer_kind=task.kind, max_prompt_tokens=4000)
            data = build_task_data(train, validation, prompt_format, tokenizer)
            assert len(data.train) + data.num_skipped == len(train)
        for example in by_split["test"].get(task.task_id, []):
            check(example.target, task.kind, example.request)
            grade(example.target, example.target, task.kind, example.request)
    assert sum(task.num_calls for task in found.tasks if task.tool_names == ()) >= NUM_GOOD


def test_the_rich_call_itself_is_fine():
    problem = find_problem(make_call(0, "train", **RICH), keep_faces_person=False, max_prompt_chars=10_000)
    assert problem is None and estimate_prompt_tokens(RICH["request"]) > 10
