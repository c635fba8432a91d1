"""The demo's world keeps its seasons apart, the scripted LLM is right about it at its stated rate, and the agent works."""

import asyncio
import itertools
import json
import re
from collections import Counter
from typing import Any

import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.demo import world
from jobs.demo.agent import CallResult, SupportAgent, run_agent
from jobs.demo.llm import MODEL_ID, NOT_UNDERSTOOD, Answer, ChatRequest, ScriptedLLM, build_app, start_server
from jobs.demo.phrases import PHRASEBOOKS
from jobs.demo.run import NUM_CAPTURED, NUM_FRESH, SEED
from jobs.demo.world import SITES, Conversation, build_messages, make_conversations, true_answers


def ask(llm: ScriptedLLM, conversation: Conversation, site: str) -> Answer:
    return llm.answer(ChatRequest.model_validate({"messages": build_messages(conversation, site)}))


def read(message: dict[str, Any], site: str) -> Any:
    """Bring an assistant message into the form of `true_answers`."""
    if site == "order_lookup":
        call = message["tool_calls"][0]["function"]
        return {"name": call["name"], "arguments": json.loads(call["arguments"])}
    return message["content"] if site in ("status_text", "reply") else json.loads(message["content"])


def run_against(llm: ScriptedLLM, conversations: list[Conversation], max_in_flight: int = 4) -> list[CallResult]:
    async def run() -> list[CallResult]:
        runner, url = await start_server(llm)
        try:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                return await run_agent(client, MODEL_ID, conversations, max_in_flight)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def understand(site: str, text: str) -> dict[str, Any]:
    """Read what a consistent LLM answers to a text at a site that answers in JSON."""
    prompt = {"intent": world.INTENT_PROMPT, "field_extraction": world.FIELDS_PROMPT}[site]
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": text}]
    llm = ScriptedLLM(self_disagreement=0.0)
    return json.loads(llm.answer(ChatRequest.model_validate({"messages": messages})).message["content"])


def fresh_values(conversation: Conversation) -> set[str]:
    """Collect all that a model must not have seen before it meets this conversation."""
    values = {conversation.text, conversation.session_id, conversation.name, conversation.mentioned_email}
    values |= {conversation.order[key] for key in ("order_id", "product", "product_code")}
    return {value for value in values if value}


def phrases_of(season: str) -> dict[str, set[str]]:
    """Return kind of phrase -> all templates of a season."""
    book = PHRASEBOOKS[season]
    kinds = ("problems", "openers", "mentions", "details", "closers")
    return {kind: {t for templates in getattr(book, kind).values() for t in templates if t} for kind in kinds}


def test_no_fresh_value_occurs_in_captured_traffic():
    """With the seed and the numbers of conversations of the demo itself."""
    llm = ScriptedLLM(seed=SEED)
    captured = make_conversations("captured", NUM_CAPTURED, SEED)
    traffic = "\n".join(
        json.dumps([build_messages(c, site), ask(llm, c, site).message]) for c in captured for site in SITES
    )
    fresh = make_conversations("fresh", NUM_FRESH, SEED)
    values = set().union(*map(fresh_values, fresh))
    assert len(values) > 4 * NUM_FRESH
    assert [value for value in values if value in traffic] == []
    words = set(re.findall(r"\w+", traffic))
    book = PHRASEBOOKS["fresh"]
    assert words.isdisjoint(book.first_names + book.last_names)


def test_search_for_fresh_values_can_find_them():
    conversation = make_conversations("captured", 1, seed=1)[0]
    traffic = json.dumps([build_messages(conversation, site) for site in SITES])
    assert conversation.text in traffic
    assert conversation.order["product_code"] in json.dumps(build_messages(conversation, "status_text"))


def test_fresh_phrases_are_held_out_and_recombine_captured_words():
    captured, fresh = phrases_of("captured"), phrases_of("fresh")
    for kind in captured:
        assert captured[kind].isdisjoint(fresh[kind])
        known = set(re.findall(r"\w+", " ".join(captured[kind]).lower()))
        used = re.findall(r"\w+", " ".join(fresh[kind]).lower())
        unknown = [word for word in used if word not in known]
        assert len(unknown) <= 0.02 * len(used), unknown


def test_every_intent_has_enough_phrases():
    for season, least in (("captured", 20), ("fresh", 6)):
        assert set(PHRASEBOOKS[season].problems) == set(world.INTENTS)
        assert all(len(set(phrases)) >= least for phrases in PHRASEBOOKS[season].problems.values())


@pytest.mark.parametrize("season", ["captured", "fresh"])
def test_texts_are_distinct_and_of_customers_length(season):
    texts = [c.text for c in make_conversations(season, 1500, seed=3)]
    assert len(set(texts)) == len(texts)
    assert all(10 <= len(text.split()) <= world.MAX_WORDS for text in texts)
    assert all(text.isascii() and "{" not in text for text in texts)


@given(st.sampled_from(["captured", "fresh"]), st.integers(0, 10**6), st.integers(0, 30), st.integers(0, 10))
@settings(max_examples=20)
def test_conversations_are_deterministic_and_extend(season, seed, count, more):
    assert make_conversations(season, count + more, seed)[:count] == make_conversations(season, count, seed)


def test_values_given_stand_in_the_text():
    for c in make_conversations("fresh", 300, seed=4):
        given_values = (c.name, c.mentioned_order_id, c.mentioned_email, c.mentioned_product_code, c.mentioned_quantity)
        assert all(str(value) in c.text for value in given_values if value is not None)
        assert (c.order["order_id"] in c.text) == (c.mentioned_order_id is not None)


def test_system_prompts_are_of_real_length():
    c = make_conversations("captured", 1, seed=1)[0]
    assert all(60 <= len(build_messages(c, site)[0]["content"].split()) <= 200 for site in SITES)


@pytest.mark.parametrize("season", ["captured", "fresh"])
def test_consistent_llm_is_always_right(season):
    llm = ScriptedLLM(self_disagreement=0.0)
    for c in make_conversations(season, 800, seed=5):
        for site, truth in true_answers(c).items():
            assert read(ask(llm, c, site).message, site) == truth, (site, c.text)


def test_llm_understands_every_problem_phrase():
    for season, book in PHRASEBOOKS.items():
        for intent, phrases in book.problems.items():
            for phrase, urgency in itertools.product(phrases, book.closers):
                for closer in book.closers[urgency]:
                    text = phrase.format(product="Summit tent") + " " + closer
                    assert understand("intent", text) == {"intent": intent, "urgency": urgency}, (season, text)


def test_llm_reads_every_name_and_is_not_misled_by_it():
    for book in PHRASEBOOKS.values():
        for first, last in zip(book.first_names + book.last_names, book.last_names + book.first_names, strict=False):
            text = f"Hi, this is {first} {last}. Where is it? My account email is {first.lower()}.{last.lower()}@example.com."
            assert understand("intent", text) == {"intent": "order_status", "urgency": "normal"}, text
            assert understand("field_extraction", text)["name"] == f"{first} {last}"


def test_llm_disagrees_at_its_stated_rate_with_well_formed_answers():
    llm = ScriptedLLM(self_disagreement=0.2)
    wrong, asked = Counter(), 400
    for c in make_conversations("captured", asked, seed=6):
        for site, truth in true_answers(c).items():
            wrong[site] += read(ask(llm, c, site).message, site) != truth
    # 0.2 +- 4 standard errors
    assert all(0.12 <= wrong[site] / asked <= 0.28 for site in true_answers(c)), wrong
    assert llm.stats()["num_disagreements"] == wrong.total()


def test_answers_do_not_depend_on_arrival_order():
    conversations = make_conversations("captured", 60, seed=7)
    calls = [(c, site) for c in conversations for site in SITES]
    first, second = ScriptedLLM(self_disagreement=0.3), ScriptedLLM(self_disagreement=0.3)
    forward = {(c.number, site): ask(first, c, site) for c, site in calls}
    backward = {(c.number, site): ask(second, c, site) for c, site in reversed(calls)}
    assert forward == backward


def test_reply_is_worded_anew_each_time():
    llm = ScriptedLLM()
    c = make_conversations("captured", 1, seed=8)[0]
    assert len({ask(llm, c, "reply").message["content"] for _ in range(50)}) == 50
    assert len({ask(llm, c, "status_text").message["content"] for _ in range(20)}) == 1


def test_unknown_requests_are_told_so():
    llm = ScriptedLLM()
    parts = [{"type": "text", "text": "Write a poem."}]
    unknown = llm.answer(ChatRequest.model_validate({"messages": [{"role": "user", "content": parts}]}))
    assert unknown.message["content"] == NOT_UNDERSTOOD
    messages = [{"role": "system", "content": world.STATUS_PROMPT}, {"role": "user", "content": "[1]"}]
    assert llm.answer(ChatRequest.model_validate({"messages": messages})).message["content"] == NOT_UNDERSTOOD


def test_agent_makes_five_right_calls_and_streams_every_fourth_reply():
    conversations = make_conversations("fresh", 8, seed=9)
    llm = ScriptedLLM(self_disagreement=0.0, latency_scale=0.0)
    results = run_against(llm, conversations)
    assert [(r.session_id, r.site) for r in results] == [(c.session_id, site) for c in conversations for site in SITES]
    assert [r.error for r in results] == [None] * 40
    for index, c in enumerate(conversations):
        group = results[5 * index : 5 * index + 5]
        for result in group[:4]:
            assert read(result.message, result.site) == true_answers(c)[result.site]
            assert "application/json" in result.headers["content-type"]
        assert len(group[4].message["content"].split()) > 25
        assert ("event-stream" in group[4].headers["content-type"]) == (c.number % 4 == 3)
    assert llm.stats()["num_calls_by_site"] == dict.fromkeys(SITES, 8)
    assert llm.stats()["cost_usd"] > 0


def test_streamed_and_unary_answers_agree():
    conversations = make_conversations("captured", 4, seed=10)
    streamed = run_against(ScriptedLLM(latency_scale=0.0), conversations)[-1]
    assert streamed.message["content"] == ask(ScriptedLLM(), conversations[3], "reply").message["content"]


def test_streamed_tool_call_and_usage_follow_openai():
    async def run() -> list[Any]:
        runner, url = await start_server(ScriptedLLM(self_disagreement=0.0, latency_scale=0.0))
        try:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
                options = {"stream": True, "stream_options": {"include_usage": True}, "tools": world.LOOKUP_TOOLS}
                messages = build_messages(conversation, "order_lookup")
                stream = await client.chat.completions.create(model=MODEL_ID, messages=messages, **options)
                return [chunk async for chunk in stream]
        finally:
            await runner.cleanup()

    conversation = make_conversations("captured", 1, seed=11)[0]
    *chunks, last, usage = asyncio.run(run())
    calls = [call.function for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    said = {"name": calls[0].name, "arguments": json.loads("".join(call.arguments for call in calls))}
    assert said == true_answers(conversation)["order_lookup"]
    assert last.choices[0].finish_reason == "tool_calls"
    assert usage.choices == [] and usage.usage.completion_tokens > 0
    assert {chunk.system_fingerprint for chunk in chunks} == {"scripted"}


def test_server_names_itself_and_rejects_bad_requests():
    async def run() -> Any:
        runner, url = await start_server(ScriptedLLM(latency_scale=0.0))
        try:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                models = await client.models.list()
                with pytest.raises(openai.BadRequestError, match="messages"):
                    await client.chat.completions.create(model=MODEL_ID, messages=[])
                return models.data[0]
        finally:
            await runner.cleanup()

    model = asyncio.run(run())
    assert model.id == MODEL_ID and "not a language model" in model.description


def test_errors_are_recorded_and_the_rest_go_on():
    async def run() -> list[CallResult]:
        async with openai.AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client:
            return await SupportAgent(client, MODEL_ID).handle(make_conversations("captured", 1, seed=12)[0])

    results = asyncio.run(run())
    assert [r.site for r in results] == list(SITES)
    assert all(r.message is None and r.error.startswith("APIConnectionError") for r in results)


def test_calls_in_flight_are_bounded_and_progress_is_told():
    in_flight, most, told = 0, 0, []

    @web.middleware
    async def count(request: web.Request, handler: Any) -> web.StreamResponse:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        try:
            return await handler(request)
        finally:
            in_flight -= 1

    async def run() -> None:
        app = build_app(ScriptedLLM(ttft_ms=5.0, ms_per_token=0.0))
        app.middlewares.append(count)
        async with (
            TestServer(app) as server,
            openai.AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="none", max_retries=0) as client,
        ):
            conversations = make_conversations("captured", 12, seed=15)
            await run_agent(client, MODEL_ID, conversations, 3, lambda done, total: told.append((done, total)))

    asyncio.run(run())
    assert most == 3
    assert told == [(done, 12) for done in range(1, 13)]


def test_latency_has_the_stated_median_and_grows_with_the_answer():
    llm = ScriptedLLM(ttft_ms=200.0)
    waits = sorted(ask(llm, c, "intent").ttft_s for c in make_conversations("captured", 400, seed=13))
    assert 0.18 < waits[200] < 0.22
    assert waits[0] < 0.12 and waits[-1] > 0.35
    quick = ScriptedLLM(latency_scale=0.0, ms_per_token=1000.0)
    assert all(r.latency_ms < 500 for r in run_against(quick, make_conversations("captured", 1, seed=14)))
    slow = ScriptedLLM(ttft_ms=0.0, ms_per_token=10.0)
    reply = run_against(slow, make_conversations("captured", 1, seed=14))[-1]
    assert reply.latency_ms > 10 * len(reply.message["content"]) / 4
