"""training/leakage.py: what a held-out call says leaves train; what everybody says stays."""

import pytest

from cluster.calls import write_calls
from cluster.records import AgentCall
from cluster.store import Store
from training.curate import CurateConfig, curate
from training.leakage import LEAKED, NEAR_LEAKED, SHARED_TEXT
from training.snapshot import read_rows
from training.splits import SPLITS, SplitConfig, split_of

LONG = "When will my new blue tent arrive?"
TICKET = "My tent with the number {} arrived yesterday but one of its poles is broken, so please send me a new pole"
CONFIG = CurateConfig(split=SplitConfig(test_by="hash"))


def make_call(index: int, task: str, text: str, session: str = "", history: tuple[str, ...] = ()) -> AgentCall:
    said = [{"role": ("user", "assistant")[i % 2], "content": old} for i, old in enumerate(history)]
    return AgentCall(
        call_id=f"call-{index}",
        ts=float(index),
        client_id="client",
        agent="desk",
        session_id=session or f"s{index}",
        step=0,
        request={"messages": [{"role": "system", "content": task}, *said, {"role": "user", "content": text}]},
        response={"choices": [{"message": {"role": "assistant", "content": f"answer {index}"}}]},
    )


@pytest.fixture
def clean(tmp_path):
    """Ids that stay in train, and what was dropped; sessions are renamed so that they fall into the split asked for."""

    def run(**by_split: list[AgentCall]) -> tuple[list[str], dict[str, int]]:
        calls = []
        for split, members in by_split.items():
            names = (name for name in (f"{split}-{i}" for i in range(100_000)) if split_of(name, CONFIG.split) == split)
            renamed: dict[str, str] = {}
            for call in members:
                if call.session_id not in renamed:
                    renamed[call.session_id] = next(names)
                calls.append(call.model_copy(update={"session_id": renamed[call.session_id]}))
        store = Store(str(tmp_path))
        write_calls(store, calls)
        snapshot = curate(store, CONFIG, b"k" * 32)
        kept = {s: read_rows(store, snapshot.id, s).to_pylist() for s in SPLITS}
        for split in SPLITS[1:]:
            assert len(kept[split]) == len(by_split.get(split, [])), "held-out splits lose nothing"
        return sorted(i for row in kept["train"] for i in row["source_call_ids"]), snapshot.counts.dropped

    return run


@pytest.mark.parametrize("split", ["calibration", "test"])
def test_a_user_text_of_a_held_out_call_of_another_task_leaves_train(clean, split):
    train = [
        make_call(0, "Name the intent.", LONG.replace(" ", "\n  ")),
        make_call(1, "Name the intent.", LONG + "!"),
    ]
    assert clean(train=train, **{split: [make_call(2, "Write a reply.", LONG)]}) == (["call-1"], {SHARED_TEXT: 1})


def test_a_user_text_of_validation_stays_and_its_request_does_not(clean):
    train = [make_call(0, "Name the intent.", LONG), make_call(1, "Write a reply.", LONG)]
    assert clean(train=train, validation=[make_call(2, "Write a reply.", LONG)]) == (["call-0"], {LEAKED: 1})


def test_short_texts_stay(clean):
    train = [make_call(0, "Name the intent.", "yes please")]
    assert clean(train=train, test=[make_call(1, "Write a reply.", "yes please")]) == (["call-0"], {})


@pytest.mark.parametrize(("num_others", "is_kept"), [(4, False), (5, True)])
def test_a_text_that_many_sessions_say_stays(clean, num_others, is_kept):
    """Many steps of one session are one session."""
    test = [
        make_call(10 * other + i, f"step {i} of {other}", LONG, session=f"t{other}")
        for other in range(1, num_others + 1)
        for i in (1, 2)
    ]
    kept, dropped = clean(train=[make_call(0, "Name the intent.", LONG)], test=test)
    assert (kept, dropped) == ((["call-0"], {}) if is_kept else ([], {SHARED_TEXT: 1}))


def test_many_sessions_are_a_share_of_a_big_store(clean):
    others = [make_call(i, "Name the intent.", f"another question {i}") for i in range(100, 1100)]
    test = [make_call(i, f"case {i}", LONG) for i in range(1, 10)]
    assert clean(train=[make_call(0, "Name the intent.", LONG), *others], test=test)[1] == {SHARED_TEXT: 1}


@pytest.mark.parametrize("split", ["calibration", "test"])
def test_a_near_duplicate_of_a_held_out_call_leaves_train_and_never_the_reverse(clean, split):
    train = [make_call(0, "Help.", TICKET.format("A17")), make_call(1, "Help.", "I would like to return my kayak")]
    held = [
        make_call(2, "Help.", TICKET.format("A17").upper() + "!!"),
        make_call(3, "Help.", TICKET.format("A17") + " soon"),
    ]
    assert clean(train=train, **{split: held}) == (["call-1"], {NEAR_LEAKED: 1})


def test_a_near_duplicate_of_validation_stays(clean):
    train = [make_call(0, "Help.", TICKET.format("A17"))]
    assert clean(train=train, validation=[make_call(1, "Help.", TICKET.format("A17") + "!!")]) == (["call-0"], {})


def test_a_form_filled_in_anew_is_no_near_duplicate(clean):
    """The form is the site's template: only what is filled in is compared."""
    train = [make_call(i, "Help.", TICKET.format(f"A{i}")) for i in range(20)]
    test = [make_call(i, "Help.", TICKET.format(f"A{i}")) for i in range(100, 110)]
    kept, dropped = clean(train=train, test=[*test, make_call(200, "Help.", TICKET.format("a7") + "!")])
    assert (len(kept), dropped) == (19, {NEAR_LEAKED: 1}) and "call-7" not in kept


def test_equal_slots_in_different_forms_are_no_near_duplicates(clean):
    forms = [
        "What will the weather be in {}?",
        "Find me a cheap flight that goes to {} please",
        "Who is the mayor of {}?",
    ]
    cities = ["Ulm", "Bern", "Graz", "Kiel", "Linz", "Jena", "Gera", "Hof", "Zug", "Aue"]
    train = [make_call(i, "Help.", forms[i % 2].format(cities[i % 10])) for i in range(20)]
    test = [make_call(100 + i, "Help.", forms[2].format(city)) for i, city in enumerate(cities)]
    assert clean(train=train, test=test)[1] == {}


def test_equal_short_replies_in_different_conversations_are_no_near_duplicates(clean):
    def talk(index: int, thing: str) -> AgentCall:
        opening = f"Could you tell me whether the {thing} of my {thing} shop can be moved to {thing} street?"
        return make_call(index, "Help.", "yes, do that", history=(opening, f"Shall I move the {thing}?"))

    assert clean(train=[talk(0, "counter")], test=[talk(1, "window")]) == (["call-0"], {})


def test_the_next_step_of_a_repeated_conversation_is_no_near_duplicate(clean):
    opening = TICKET.format("A17")
    train = [make_call(0, "Help.", "Which courier brings it, and when?", history=(opening, "It is on its way."))]
    assert clean(train=train, test=[make_call(1, "Help.", opening)])[0] == ["call-0"]


def test_near_duplicates_are_of_one_call_site(clean):
    train = [make_call(0, "Name the intent.", TICKET.format("A17"))]
    assert clean(train=train, test=[make_call(1, "Write a reply.", TICKET.format("A17") + " now")])[0] == ["call-0"]
