"""cluster/sites.py: what recurs over the corpus names a call site, and other traffic does not move its id."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.signature import signature_of
from cluster.sites import SiteMap, fit_sites

GENERIC = "You are a helpful assistant."
BOILERPLATE = "Give your best complete final answer to the task."
WORDS = st.text(alphabet="abcdefghijklmnop ", min_size=1, max_size=60)
TRANSLATE = "Translate the following passage into plain modern French.\n{}\nReturn only the translation."
REVIEW = "# Review\nRole: you review code that others have written.\n{}\nSay what you would change."


def ask(user: str, system: str = "", **fields) -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": user}], **fields}


def as_role(role: str, goal: str = "work well together", **fields) -> dict:
    return ask("Go on.", f"You are {role}. You like it.\nYour personal goal is: {goal}\n{BOILERPLATE}", **fields)


def role_corpus() -> list[dict]:
    return [as_role(role, goal) for role in ("Writer", "Scorer", "Planner") for goal in ("speed", "depth", "fun")]


@given(WORDS, WORDS, st.sampled_from(["", GENERIC]))
def test_slots_of_a_template_in_the_user_message_do_not_move_its_site(first, second, system) -> None:
    requests = [ask(text.format(slot), system) for text in (TRANSLATE, REVIEW) for slot in ("x y", "z")]
    sites = fit_sites(requests)
    found = {
        text: {sites.site_of(ask(text.format(slot), system)).site for slot in (first, second)}
        for text in (TRANSLATE, REVIEW)
    }
    assert [len(own) for own in found.values()] == [1, 1]
    assert found[TRANSLATE] != found[REVIEW]


@settings(max_examples=25)
@given(st.lists(WORDS, max_size=6), st.randoms(use_true_random=False))
def test_order_and_other_traffic_do_not_move_a_site(strangers, rng: random.Random) -> None:
    own = [*role_corpus(), *(ask(TRANSLATE.format(i)) for i in "abc")]
    before = [fit_sites(own).site_of(request) for request in own]
    mixed = [*own, *(ask("Go on.", f"You sort the letters of the town hall by office. {word}") for word in strangers)]
    rng.shuffle(mixed)
    sites = fit_sites(mixed)
    assert [sites.site_of(request) for request in own] == before


def test_a_role_is_one_site_whatever_follows_it_and_its_tools_are_variants() -> None:
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    sites = fit_sites(role_corpus())
    plain, unseen, with_tools = as_role("Writer"), as_role("Writer", "an unseen goal"), as_role("Writer", tools=tools)
    assert sites.site_of(plain) == sites.site_of(unseen) != sites.site_of(as_role("Scorer"))
    assert sites.site_of(with_tools).site == sites.site_of(plain).site
    assert sites.site_of(with_tools).variant != sites.site_of(plain).variant


def test_an_opening_alone_before_its_own_rules_is_no_role() -> None:
    orders = [
        f"You are a user of a shop.\nInstruction: {i}\nNever give all away at once, please."
        for i in ("buy", "sell", "ask")
    ]
    requests = [ask("Go on.", f"{order} You talk to an agent about it.") for order in orders]
    sites = fit_sites(requests)
    assert len({sites.site_of(request).site for request in requests}) == 3
    assert sites.roles == frozenset()


def test_messages_that_people_write_have_no_template() -> None:
    requests = [ask(f"{word} is what i would like to hear more about today") for word in ("apples", "rivers", "stones")]
    assert fit_sites(requests).anchors == {}
    assert {fit_sites(requests).site_of(r).site for r in requests} == {signature_of(requests[0])}


def test_json_keys_tell_templates_with_one_closing_apart() -> None:
    def node(key: str, slot: str) -> dict:
        return ask(f'{slot}\n[FORMAT]\n"{key}": "..."\n[END]\nFollow the format example and generate the output.')

    requests = [node(key, slot) for key in ("Language", "File list") for slot in ("alpha", "beta", "gamma")]
    sites = fit_sites(requests)
    assert len({sites.site_of(request).site for request in requests}) == 2


def test_a_map_is_read_back_and_holds_hashes_alone() -> None:
    requests = [*role_corpus(), *(ask(TRANSLATE.format(i)) for i in "abc")]
    sites = fit_sites(requests)
    again = SiteMap.from_json(sites.to_json())
    assert [again.site_of(r) for r in requests] == [sites.site_of(r) for r in requests]
    kept = [*again.roles, *(h for found in again.anchors.values() for h in found)]
    assert kept and all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in kept)


@pytest.mark.parametrize("request_", [ask("hello"), ask("x", GENERIC), {"messages": []}])
def test_the_empty_map_makes_every_signature_a_site(request_) -> None:
    signature = signature_of(request_)
    assert SiteMap().site_of(request_) == (signature, signature)


def test_a_short_system_prompt_that_says_the_task_names_one_site_whatever_users_write() -> None:
    """Few values in a user's sentence are no templates of the program's own."""
    requests = [
        {
            "messages": [
                {"role": "system", "content": "Say the color as JSON."},
                {"role": "user", "content": f"Lamp {number} in room {number % 7} shines in {color} today"},
            ]
        }
        for number in range(40)
        for color in ("red", "green", "blue")
    ]
    sites = fit_sites(requests)
    assert len({sites.site_of(request).site for request in requests}) == 1


@given(st.lists(WORDS, min_size=3, max_size=5, unique_by=lambda word: " ".join(word.split())))
def test_an_input_given_to_several_templates_names_none_of_them(inputs) -> None:
    ways = [
        f"Rewrite the notes above {how}, and leave out nothing that matters." for how in ("as verse", "for children")
    ]
    asked = [(way, ask(f"The notes of the day so far: {text}\n{way}")) for way in ways for text in inputs]
    sites = fit_sites(request for _, request in asked)
    found = {way: {sites.site_of(request).site for other, request in asked if other == way} for way in ways}
    assert [len(own) for own in found.values()] == [1, 1]
    assert not set.intersection(*found.values())


def test_a_template_seen_once_is_a_site_of_its_own_and_a_short_message_is_not() -> None:
    requests = [ask(text.format(slot)) for text in (TRANSLATE, REVIEW) for slot in ("x y", "z")]
    once = [
        ask("Name the judge of the case below.\nThe case is about a lost letter.\nUse one word."),
        ask("Count the steps of the stairs described.\nThe house stands in a small town.\nUse digits."),
    ]
    short = [ask("hello there"), ask("what else can you do for me today")]
    sites = fit_sites([*requests, *once, *short])
    assert len({sites.site_of(request).site for request in once}) == 2
    assert {sites.site_of(request).site for request in short} == {signature_of(short[0])}
