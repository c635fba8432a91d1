"""The LLM asked again, or asked to judge, over loopback: what it costs is counted and bounded, and off means not asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from background_loop import background_loop
from fakes import FakeLLM

from cluster.calls import write_calls
from cluster.config import validate
from cluster.errors import ConfigError
from cluster.prompts import PromptFormat
from cluster.records import AgentCall, Example, TaskSpec, TextGrader
from cluster.store import Store
from cluster.upstream import UpstreamConfig, UpstreamReply
from jobs.__main__ import main
from jobs.judge import PricedLLM, open_judge
from jobs.recipe import Recipe
from jobs.teacher import measure_teacher, plan_teacher
from training.evaluation import Candidate

TASK = TaskSpec(
    task_id="t", name="t", signature="s", kind="text", reference="llm", num_calls=1, share_calls=1.0, share_cost=1.0,
    num_examples={},
)  # fmt: skip


@pytest.fixture
def llm() -> Iterator[tuple[FakeLLM, str]]:
    """An LLM on loopback that repeats the last number of what it is asked, except for every fifth."""
    fake = FakeLLM()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        number = int(request["messages"][-1]["content"].split()[-1])
        return {"role": "assistant", "content": f"it is {-1 if number % 5 == 0 else number}"}

    fake.answer_with = answer
    with background_loop() as loop:
        url = asyncio.run_coroutine_threadsafe(fake.start(), loop).result(10)
        yield fake, url
        asyncio.run_coroutine_threadsafe(fake.close(), loop).result(10)


def recipe_of(tmp_path, url: str, **evaluation: Any) -> Recipe:
    upstream = {"base_url": url, "model": "llm-1", "prompt_usd_per_million": 1.0, "completion_usd_per_million": 1.0}
    return validate(Recipe, {"store": str(tmp_path / "store"), "upstream": [upstream], "evaluation": evaluation})


def make_example(number: int) -> Example:
    return Example(
        example_id=f"e{number}",
        split="validation",
        session_id=f"s{number}",
        ts=float(number),
        request={"model": "theirs", "stream": True, "messages": [{"role": "user", "content": f"say {number}"}]},
        target={"role": "assistant", "content": f"it is {number}"},
        reference="llm",
        source_call_ids=(f"c{number}",),
    )


def test_the_llm_is_asked_again_so_often_and_agrees_with_itself_as_often_as_it_does(tmp_path, llm) -> None:
    fake, url = llm
    said: list[str] = []
    by_split = {"validation": {"t": [make_example(k) for k in range(100)]}}
    found = measure_teacher(recipe_of(tmp_path, url, teacher_repeats=50), [TASK], by_split, said.append)
    assert len(fake.requests) == 50 and found["t"].num_answered == 50
    assert not any("stream" in request for request in fake.requests)
    wrong = sum(int(request["messages"][-1]["content"].split()[-1]) % 5 == 0 for request in fake.requests)
    assert found["t"].num_agreements == 50 - wrong and 0 < wrong < 50
    assert found["t"].interval[0] < found["t"].num_agreements / 50 < found["t"].interval[1]
    assert said[0].startswith("teacher: 50 calls asked again, 0.00")


def test_it_is_off_unless_asked_for_and_never_asks_about_gold(tmp_path, llm) -> None:
    fake, url = llm
    by_split = {"validation": {"t": [make_example(k) for k in range(10)]}}
    gold = TASK.model_copy(update={"reference": "gold"})
    assert measure_teacher(recipe_of(tmp_path, url), [TASK], by_split, print) == {}
    assert measure_teacher(recipe_of(tmp_path, url, teacher_repeats=5), [gold], by_split, print) == {}
    assert fake.requests == []
    bare = validate(Recipe, {"store": str(tmp_path / "store"), "evaluation": {"teacher_repeats": 5}})
    with pytest.raises(ConfigError, match="evaluation.teacher_repeats=5: no LLM is named to ask again with"):
        measure_teacher(bare, [TASK], by_split, print)


def test_the_plan_tells_questions_price_and_bound_before_anything_is_asked(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = recipe_of(tmp_path, "http://127.0.0.1:9/v1", teacher_repeats=30, teacher_max_usd=0.5)
    store = Store(recipe.store)
    facts = {"client_id": "c", "agent": "a", "step": 0, "response": None, "request": {"messages": []}}
    write_calls(store, [AgentCall(call_id=f"{k}", ts=k, session_id=f"{k}", cost_usd=0.002, **facts) for k in range(4)])
    assert plan_teacher(recipe, store)["max_questions"] is None
    store.write_json("tasks/identity.json", {"tasks": {"t": {}, "u": {}}})
    found = plan_teacher(recipe, store)
    assert found["max_questions"] == 60 and found["expected_usd"] == pytest.approx(0.12)
    words = ["recipe=local", "select.base=scratch-tiny", f"store={recipe.store}", "evaluation.teacher_repeats=30"]
    assert main(["plan", *words]) == 2 and "upstream.0.base_url=URL" in capsys.readouterr().err, "told before any work"
    words = ["upstream.0.base_url=http://127.0.0.1:9/v1", "upstream.0.model=m", *words]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "teacher: at most 60 calls asked again of upstream.0, about 0.1200 USD, no bound on money" in out
    assert main(["plan", "upstream.0.prompt_usd_per_million=1", *words]) == 0
    assert "about 0.1200 USD, never more than 1 USD" in capsys.readouterr().out
    assert main(["plan", *words[:-1]]) == 0 and "teacher:" not in capsys.readouterr().out


@pytest.mark.parametrize(("max_usd", "num_asked"), [(1.0, 4), (1e-9, 1)])
def test_a_judge_is_paid_remembered_and_stopped_by_its_bound(tmp_path, llm, max_usd: float, num_asked: int) -> None:
    fake, url = llm
    fake.answer_with = lambda request: {"role": "assistant", "content": json.dumps({"verdict": "same"})}
    recipe = recipe_of(tmp_path, url, text_grader="judge", judge_max_usd=max_usd)
    store = Store(recipe.store)
    candidate = Candidate(
        task=TASK,
        base="b",
        base_arm="untrained base",
        adapter="a",
        prompt_format=PromptFormat(kind="chat", answer_kind="text", max_prompt_tokens=99),
        max_answer_tokens=8,
        text_grader=TextGrader(name="judge"),
    )
    said: list[str] = []

    async def judged() -> list[bool | None]:
        async with open_judge(recipe, store, [candidate], said.append) as judge:
            assert judge is not None
            request = make_example(1).request
            return [await judge.agrees(request, "it is one", f"it is {k}") for k in (1, 2)]

    first = asyncio.run(judged())
    assert len(fake.requests) == num_asked and first == ([True, True] if num_asked == 4 else [None, None])
    assert f"judge: {num_asked} questions, 0.00" in said[0]
    assert f"{0 if num_asked == 4 else 2} not asked for evaluation.judge_max_usd" in said[0]
    assert b"same" not in b"".join(store.read_bytes(path) for path in store.list("judgements", ".parquet"))
    if num_asked == 4:
        assert asyncio.run(judged()) == first and len(fake.requests) == 4, "what was judged is not paid for again"


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "many"}, "none"])
def test_an_llm_that_reports_no_usage_reaches_the_bound_all_the_same(monkeypatch, usage: Any) -> None:
    """What it read and said is charged by estimate; a report that is none stops nothing."""
    monkeypatch.setenv("UPSTREAM_API_KEY", "k")
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "prompt_usd_per_million": 1e6}
    reply = {"choices": [{"message": {"role": "assistant", "content": "it is so"}}], "usage": usage}

    async def asked() -> tuple[PricedLLM, list[Any]]:
        llm = PricedLLM(validate(UpstreamConfig, endpoint), 1.0, "evaluation.teacher_repeats")

        async def chat(body: dict[str, Any]) -> UpstreamReply:
            return UpstreamReply(200, reply, None)

        llm._upstream.chat = chat
        found = [await llm.complete({"messages": [{"role": "user", "content": "say it"}]}) for _ in range(3)]
        await llm.close()
        return llm, found

    llm, found = asyncio.run(asked())
    assert found == [reply["choices"][0]["message"], None, None]
    assert llm.usd >= 1.0 and (llm.num_asked, llm.num_refused) == (1, 2)


def test_another_judge_is_not_taken_at_the_first_one_s_word(tmp_path, llm) -> None:
    fake, url = llm
    fake.answer_with = lambda request: {
        "role": "assistant",
        "content": json.dumps({"verdict": "same" if request["model"] == "lax" else "second"}),
    }
    store = Store(str(tmp_path / "store"))
    candidate = Candidate(
        task=TASK, base="b", base_arm="untrained base", adapter="a", max_answer_tokens=8,
        prompt_format=PromptFormat(kind="chat", answer_kind="text", max_prompt_tokens=99),
        text_grader=TextGrader(name="judge"),
    )  # fmt: skip

    async def judged(model: str) -> bool | None:
        upstream = {"base_url": url, "model": model}
        recipe = validate(Recipe, {"store": store.uri, "upstream": [upstream], "evaluation": {"text_grader": "judge"}})
        async with open_judge(recipe, store, [candidate], print) as judge:
            assert judge is not None
            return await judge.agrees(make_example(1).request, "it is one", "it is two")

    assert [asyncio.run(judged(model)) for model in ("lax", "harsh", "lax")] == [True, False, True]
    assert len(fake.requests) == 4, "each is asked once in both orders"


def test_without_free_text_to_judge_no_llm_is_needed(tmp_path) -> None:
    async def opened() -> Any:
        recipe = validate(Recipe, {"store": str(tmp_path / "store"), "evaluation": {"text_grader": "judge"}})
        async with open_judge(recipe, Store(recipe.store), [], print) as judge:
            return judge

    assert asyncio.run(opened()) is None
