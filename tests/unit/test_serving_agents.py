"""Agents of other people's frameworks through the gateway over HTTP: the same agent, unchanged, before and after a release.

The agent asks for a tool, gets its result and answers. Before, the LLM does all of it; after, a specialist asks for the
tool, and what speaks to a person stays with the LLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import agents
import pydantic_ai
import pytest
from fakes import Running, engine_answer, gateway, make_specialist, tool_message
from loopback import served
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from cluster.engine import EngineAnswer
from cluster.records import Specialist

INSTRUCTIONS = "Help with orders; look them up first."
QUESTION = "Where are A-1 and B-2?"
CITIES = {"A-1": "Rome", "B-2": "Oslo"}
CALLS = tool_message(("find_order", {"order_id": "A-1"}), ("find_order", {"order_id": "B-2"}))
"""Both tools at once."""


class Found(BaseModel):
    places: list[str]


def llm_says(request: dict[str, Any]) -> dict[str, Any]:
    """An LLM that looks both orders up, then says what the tools said: as text, as JSON or by a tool of that name."""
    results = [message["content"] for message in request["messages"] if message["role"] == "tool"]
    if not results:
        return CALLS
    places = [place for result in results for place in CITIES.values() if place in result]
    assert places == list(CITIES.values()), "both results are there, in the order of the calls"
    if "final_result" in [tool["function"]["name"] for tool in request.get("tools") or ()]:
        return tool_message(("final_result", {"places": places}))
    said = json.dumps({"places": places}) if request.get("response_format") else f"In {' and '.join(places)}."
    return {"role": "assistant", "content": said}


def find_order(order_id: str) -> str:
    """Say where an order is.

    Args:
        order_id: the order's id.
    """
    return f"{order_id} is in {CITIES[order_id]}"


async def by_openai_agents(client: AsyncOpenAI, output: Any, is_stream: bool) -> Any:
    model = agents.OpenAIChatCompletionsModel(model="any", openai_client=client)
    agent = agents.Agent(
        name="orders",
        instructions=INSTRUCTIONS,
        model=model,
        tools=[agents.function_tool(find_order)],
        output_type=output,
    )
    # Its traces would go to OpenAI.
    settings = agents.RunConfig(tracing_disabled=True)
    if not is_stream:
        return (await agents.Runner.run(agent, QUESTION, run_config=settings)).final_output
    result = agents.Runner.run_streamed(agent, QUESTION, run_config=settings)
    kinds = [event.type async for event in result.stream_events()]
    assert "raw_response_event" in kinds
    return result.final_output


async def by_pydantic_ai(client: AsyncOpenAI, output: Any, is_stream: bool) -> Any:
    model = OpenAIChatModel("any", provider=OpenAIProvider(openai_client=client))
    agent = pydantic_ai.Agent(model, instructions=INSTRUCTIONS, tools=[find_order], output_type=output)
    if not is_stream:
        return (await agent.run(QUESTION)).output
    async with agent.run_stream(QUESTION) as result:
        return await result.get_output()


Framework = Callable[[AsyncOpenAI, Any, bool], Awaitable[Any]]


@contextlib.asynccontextmanager
async def opened(tmp_path: pathlib.Path, **config: Any) -> AsyncIterator[tuple[Running, AsyncOpenAI]]:
    async with gateway(tmp_path, specialist(), **config) as run, served(run.api) as url:
        run.llm.answer_with = llm_says
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=run.key, max_retries=0) as client:
            yield run, client


def specialist() -> Specialist:
    made = make_specialist()
    return made.model_copy(update={"prompt_format": {**made.prompt_format, "answer_kind": "tool_call"}})


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("output", [str, Found], ids=["text", "typed"])
@pytest.mark.parametrize("framework", [by_openai_agents, by_pydantic_ai])
def test_an_agent_works_the_same_before_and_after_a_release(
    tmp_path: pathlib.Path, framework: Framework, output: Any, is_stream: bool
) -> None:
    expected = Found(places=list(CITIES.values())) if output is Found else "In Rome and Oslo."

    async def before() -> dict[str, Any]:
        async with opened(tmp_path / "before") as (run, client):
            assert await framework(client, output, is_stream) == expected
            first, second = run.llm.requests
            assert bool(first.get("stream")) == is_stream and not run.engine.num_asked
            results = [message for message in second["messages"] if message["role"] == "tool"]
            assert [one["tool_call_id"] for one in results] == [call["id"] for call in CALLS["tool_calls"]]
            assert [call.status for call in await run.captured()] == [200, 200]
            return first

    async def after(routed: dict[str, Any]) -> None:
        async with opened(tmp_path / "after", requests=[routed]) as (run, client):

            async def answer() -> EngineAnswer:
                # Sure of the first step alone.
                sure = 0.99 if run.engine.num_asked == 1 else 0.1
                return engine_answer("", sure).model_copy(update={"message": CALLS})

            run.engine.answer_with = answer
            assert await framework(client, output, is_stream) == expected
            first, second = await run.captured()
            assert (first.served_by, second.served_by) == ("specialist", "llm")
            (asked,) = run.llm.requests
            assert first.message is not None
            ids = [call["id"] for call in first.message["tool_calls"]]
            assert [m["tool_call_id"] for m in asked["messages"] if m["role"] == "tool"] == ids

    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    asyncio.run(after(asyncio.run(before())))
