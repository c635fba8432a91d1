"""Nothing leaks over random traffic: checked by brute force over words, without the product's hashes, bands or index."""

import itertools
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cluster.calls import write_calls
from cluster.records import AgentCall
from cluster.store import Store
from training.curate import CurateConfig, curate
from training.leakage import NEAR_LEAKED
from training.near_duplicates import MAX_TEMPLATE_SESSIONS, MAX_TEMPLATE_SHARE, Shingler, jaccard
from training.snapshot import load_split, read_rows
from training.splits import SPLITS, SplitConfig

SYSTEM = "You sort the tickets of a shop."
WORDS = "tent kayak lamp stove rope blue red broken late lost refund courier zip pole seam size swap money gift store".split()
THRESHOLD = 0.8


def word_pairs(text: str) -> set[tuple[str, str]]:
    words = re.findall(r"\w+", text.lower())
    return set(itertools.pairwise(["^", *words, "$"])) if words else set()


def similarity(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


@given(one=st.lists(st.sampled_from(WORDS[:6]), max_size=12), other=st.lists(st.sampled_from(WORDS[:6]), max_size=12))
def test_similarity_is_that_of_the_words(one, other):
    shingler = Shingler(b"k")
    ours = jaccard(shingler.shingle(" ".join(one)), shingler.shingle("  ".join(other).upper() + "!"))
    assert ours == pytest.approx(similarity(word_pairs(" ".join(one)), word_pairs(" ".join(other))))


def test_a_script_without_spaces_is_compared_by_its_characters():
    shingler = Shingler(b"k")
    assert 0.5 < jaccard(shingler.shingle("我的帐篷昨天到了但是坏了"), shingler.shingle("我的帐篷今天到了但是坏了")) < 1
    assert isinstance(shingler.shingle(""), np.ndarray) and len(shingler.shingle("?!")) == 0


@st.composite
def traffic(draw) -> list[AgentCall]:
    """Sessions of one or two calls over few texts, each said as it is, with other punctuation or with a word changed."""
    texts = draw(st.lists(st.lists(st.sampled_from(WORDS), min_size=3, max_size=22), min_size=1, max_size=6))
    calls = []
    for session in range(draw(st.integers(1, 24))):
        history: list[dict] = []
        for step in range(draw(st.integers(1, 2))):
            words = list(draw(st.sampled_from(texts)))
            change = draw(st.sampled_from(["none", "shout", "word", "word", "number"]))
            if change == "word":
                words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(WORDS))
            if change == "number":
                words.append(str(draw(st.integers(0, 3))))
            text = " ".join(words).upper() + "!" if change == "shout" else " ".join(words)
            messages = [{"role": "system", "content": SYSTEM}, *history, {"role": "user", "content": text}]
            answer = {"role": "assistant", "content": draw(st.sampled_from(["yes", "no"]))}
            calls.append(
                AgentCall(
                    call_id=f"call-{session}-{step}",
                    ts=1_750_000_000.0 + draw(st.integers(0, 10**6)),
                    client_id=f"client-{draw(st.integers(0, 2))}",
                    agent="desk",
                    session_id=f"s{session}",
                    step=step,
                    request={"messages": messages},
                    response={"choices": [{"message": answer}]},
                    status=draw(st.sampled_from([200, 200, 200, 500])),
                )
            )
            history = [*messages[1:], answer]
    return calls


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # Shrinking curates thousands of stores.
)
@given(calls=traffic(), test_by=st.sampled_from(["time", "hash"]))
def test_nothing_leaks(tmp_path_factory, calls, test_by):
    store = Store(str(tmp_path_factory.mktemp("store")))
    write_calls(store, calls)
    config = CurateConfig(split=SplitConfig(test_by=test_by))
    snapshot = curate(store, config, b"k" * 32)
    counts, by_id = snapshot.counts, {call.call_id: call for call in calls}
    ids = {
        split: [i for row in read_rows(store, snapshot.id, split).to_pylist() for i in row["source_call_ids"]]
        for split in SPLITS
    }
    assert counts.num_calls == len(calls) == sum(counts.dropped.values()) + sum(map(len, ids.values()))
    assert counts.num_source_calls == {split: len(found) for split, found in ids.items()}
    sessions = {split: {by_id[i].session_id for i in found} for split, found in ids.items()}
    assert sum(map(len, sessions.values())) == len(set().union(*sessions.values())), "a session in two splits"
    usable = {call.call_id for call in calls if call.status == 200}
    for split in SPLITS[1:]:
        whole = {i for i in usable if by_id[i].session_id in sessions[split]}
        assert sorted(ids[split]) == sorted(whole), "held-out splits keep the traffic's frequencies"
    assert not find_leaks([by_id[i] for i in sorted(usable)], ids)
    held = load_split(store, snapshot.id, "calibration", as_served=True)
    assert [(e.request, e.target) for e in held] == [
        (by_id[e.source_call_ids[0]].request, by_id[e.source_call_ids[0]].message) for e in held
    ], "graded as served"
    assert curate(store, config, b"k" * 32) == snapshot


@pytest.mark.parametrize("num_sessions", [MAX_TEMPLATE_SESSIONS, MAX_TEMPLATE_SESSIONS + 1])
def test_a_template_is_what_many_sessions_say_however_often_each_repeats_it(tmp_path, num_sessions):
    """Drawn once by the test above: counted by message, few sessions that repeat their text made it a template, and what
    then still varied was no longer near a held-out call."""
    store, calls = Store(str(tmp_path)), []
    for session in range(num_sessions):
        # The second call repeats the first one's text; the number keeps the requests and the questions from being equal.
        text = f"{' '.join(WORDS)} {session}"
        history = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        messages = [*history, {"role": "user", "content": f"{text.upper()}!"}]
        calls.append(
            AgentCall(
                call_id=f"call-{session}",
                ts=1_750_000_000.0 + 60 * session,
                client_id="client",
                agent="desk",
                session_id=f"s{session}",
                step=0,
                request={"messages": messages},
                response={"choices": [{"message": {"role": "assistant", "content": "no"}}]},
            )
        )
    write_calls(store, calls)
    snapshot = curate(store, CurateConfig(), b"k" * 32)
    ids = {
        split: [i for row in read_rows(store, snapshot.id, split).to_pylist() for i in row["source_call_ids"]]
        for split in SPLITS
    }
    assert not find_leaks(calls, ids)
    num_near, num_train = snapshot.counts.dropped.get(NEAR_LEAKED, 0), len(ids["train"])
    is_template = num_sessions > MAX_TEMPLATE_SESSIONS
    assert (num_near == 0 < num_train) if is_template else (num_train == 0 < num_near)


def find_leaks(usable: list[AgentCall], ids: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Pairs of a train and a held-out call that say the same, or nearly so in what varies and in the question."""
    said = {call.call_id: [m["content"] for m in call.request["messages"]] for call in usable}
    speakers: dict[tuple, set[str]] = defaultdict(set)
    for call in usable:
        for pair in set().union(*map(word_pairs, said[call.call_id])):
            speakers[pair].add(call.session_id)
    num_sessions = len({call.session_id for call in usable})
    most = max(MAX_TEMPLATE_SESSIONS, MAX_TEMPLATE_SHARE * num_sessions)
    varying = {
        i: {p for p in set().union(*map(word_pairs, texts)) if len(speakers[p]) <= most} for i, texts in said.items()
    }
    leaks = []
    for split in SPLITS[1:]:
        for ours, theirs in itertools.product(ids["train"], ids[split]):
            is_near = (
                split in ("calibration", "test")
                and varying[ours]
                and similarity(varying[ours], varying[theirs]) >= THRESHOLD
                and similarity(word_pairs(said[ours][-1]), word_pairs(said[theirs][-1])) >= THRESHOLD
            )
            if said[ours] == said[theirs] or is_near:
                leaks.append((ours, theirs))
    return leaks


def test_the_check_itself_sees_a_leak():
    """And the traffic drawn above has leaks to find: without curation they are there."""
    text = " ".join(WORDS)
    calls = [
        AgentCall(
            call_id=f"call-{i}",
            ts=float(i),
            client_id="c",
            agent="a",
            session_id=f"s{i}",
            step=0,
            request={"messages": [{"role": "user", "content": f"{text}{' indeed' * i}"}]},
            response=None,
        )
        for i in range(2)
    ]
    ids = {**dict.fromkeys(SPLITS, []), "train": ["call-0"], "test": ["call-1"]}
    assert find_leaks(calls, ids) == [("call-0", "call-1")]
    assert Counter(ids["train"]).total() == 1
