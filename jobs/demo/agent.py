"""The demo's agent: a support desk that makes five LLM calls per conversation through any OpenAI-compatible endpoint.

Turns Conversations into CallResults. Every call is built from the conversation and the agent's own order table, never from
an earlier answer: each call is graded alone, so a wrong answer at one site must not change what the next site is asked.
Knows nothing of who answers: pointing `base_url` at a gateway is the only change that watching it needs.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletionChunk

from jobs.demo.world import LOOKUP_TOOLS, SITES, Conversation, build_messages

AGENT_NAME = "support-desk"
STREAM_EVERY = 4
"""One conversation in this many streams its reply, as an agent does while a customer watches."""

SITE_PARAMETERS: dict[str, dict[str, Any]] = {
    "intent": {"response_format": {"type": "json_object"}},
    "order_lookup": {"tools": LOOKUP_TOOLS, "tool_choice": "required"},
    "field_extraction": {"response_format": {"type": "json_object"}},
}


@dataclass(frozen=True)
class CallResult:
    """One call as the agent saw it."""

    session_id: str
    site: str
    request: dict[str, Any]
    """The whole chat.completions body."""
    message: dict[str, Any] | None
    """The assistant message; None after an error."""
    headers: dict[str, str]
    """The response's headers, names in lower case; empty when no response came."""
    latency_ms: float
    """From sending to the last byte."""
    error: str | None


class SupportAgent:
    """Handles conversations one call after the other.

    Args:
        client: Client of the endpoint, for example a gateway; its retries and timeouts apply.
        model: Model name to ask for.
    """

    def __init__(self, client: openai.AsyncOpenAI, model: str) -> None:
        self._client = client
        self._model = model

    async def handle(self, conversation: Conversation) -> list[CallResult]:
        """Make the five calls in order; an error in one is recorded and the rest go on."""
        return [await self._call(conversation, site) for site in SITES]

    async def _call(self, conversation: Conversation, site: str) -> CallResult:
        request = self._build_request(conversation, site)
        headers = {
            "x-session-id": conversation.session_id,
            "x-agent": AGENT_NAME,
            "x-step": str(SITES.index(site) + 1),
        }
        message, seen_headers, error = None, {}, None
        started = time.perf_counter()
        try:
            raw = await self._client.chat.completions.with_raw_response.create(**request, extra_headers=headers)
            seen_headers = {name.lower(): value for name, value in raw.headers.items()}
            answer = raw.parse()
            if isinstance(answer, openai.AsyncStream):
                message = await _read_stream(answer)
            else:
                message = answer.choices[0].message.model_dump(exclude_none=True)
        except openai.OpenAIError as failure:
            if isinstance(failure, openai.APIStatusError):
                seen_headers = {name.lower(): value for name, value in failure.response.headers.items()}
            error = f"{type(failure).__name__}: {failure}"
        latency_ms = (time.perf_counter() - started) * 1000
        return CallResult(conversation.session_id, site, request, message, seen_headers, latency_ms, error)

    def _build_request(self, conversation: Conversation, site: str) -> dict[str, Any]:
        request = {
            "model": self._model,
            "messages": build_messages(conversation, site),
            "temperature": 0,
            **SITE_PARAMETERS.get(site, {}),
        }
        if site == "reply" and conversation.number % STREAM_EVERY == STREAM_EVERY - 1:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return request


async def run_agent(
    client: openai.AsyncOpenAI,
    model: str,
    conversations: Sequence[Conversation],
    max_in_flight: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CallResult]:
    """Handle many conversations, at most `max_in_flight` at once; results stand in the conversations' order.

    Args:
        on_progress: Called with (conversations done, all conversations) after each one.
    """
    agent = SupportAgent(client, model)
    semaphore = asyncio.Semaphore(max_in_flight)
    num_done = 0

    async def handle(conversation: Conversation) -> list[CallResult]:
        nonlocal num_done
        async with semaphore:
            results = await agent.handle(conversation)
        num_done += 1
        if on_progress:
            on_progress(num_done, len(conversations))
        return results

    handled = await asyncio.gather(*(handle(conversation) for conversation in conversations))
    return [result for results in handled for result in results]


async def _read_stream(stream: openai.AsyncStream[ChatCompletionChunk]) -> dict[str, Any]:
    """Put a streamed text back together."""
    pieces: list[str] = []
    async with stream:
        async for chunk in stream:
            pieces.extend(choice.delta.content or "" for choice in chunk.choices)
    return {"role": "assistant", "content": "".join(pieces)}
