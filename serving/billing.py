"""What LLMs' answers cost, whether or not the LLM says so, and what each may still cost today.

Where token counts are not reported (a stream without them, a call that was left or cut before its end) they are an
estimate: a token for every three bytes, of messages and tools on one side and of what the answer says on the other.
English has about four bytes to a token, Chinese characters have three. Thinking that is not shown is not in it; an image
given in the request itself counts by its bytes, which is more than it costs.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.errors import UpstreamError
from cluster.prices import tokens_cost_usd
from cluster.records import Usage
from cluster.spend import DailySpend
from cluster.telemetry import Meter
from cluster.upstream import LLMNodeConfig
from serving.openai_wire import error_body, error_code, usage_of

BYTES_PER_TOKEN = 3
_READ_BY_AN_LLM = ("messages", "tools", "functions", "response_format")


class Cost(NamedTuple):
    """What something cost."""

    usd: float = 0.0
    is_estimated: bool = False
    """Whether a part of it rests on estimated token counts."""

    def plus(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(self.usd + other.usd, self.is_estimated or other.is_estimated)


class Bill:
    """What one call has cost so far of LLMs whose answer nobody gets: left while they worked, or too slow."""

    def __init__(self) -> None:
        self.cost = Cost()

    def add(self, cost: Cost) -> None:
        """Put it on the bill."""
        self.cost = self.cost.plus(cost)


class Spending:
    """What the LLMs behind one gateway have cost. Belongs to one event loop."""

    def __init__(self, configs: Sequence[LLMNodeConfig], meter: Meter) -> None:
        """Take the LLMs' configs in the order in which they are asked; each is known by being that object."""
        self._configs, self._meter = tuple(configs), meter
        self._days = [DailySpend(config.max_usd_per_day) for config in configs]

    def wait_s(self, endpoint: LLMNodeConfig) -> float:
        """Seconds until one of the LLMs may cost more: 0, or until midnight UTC."""
        return self._days[self._number(endpoint)].wait_s

    def charge(self, endpoint: LLMNodeConfig, usage: Usage, *, is_estimated: bool) -> Cost:
        """Count tokens of one of the LLMs.

        Args:
            usage: both counts are known.
        """
        prices = endpoint.prompt_usd_per_million, endpoint.completion_usd_per_million
        if not any(prices):
            return Cost()
        usd = tokens_cost_usd(usage, prompt_usd_per_million=prices[0], completion_usd_per_million=prices[1])
        assert usd is not None, "both counts are known"
        number = self._number(endpoint)
        self._days[number].add(usd)
        basis = "estimated" if is_estimated else "reported"
        self._meter.count("understudy_llm_spend_usd_total", usd, endpoint=str(number), basis=basis)
        return Cost(usd, is_estimated)

    def charge_answer(
        self, endpoint: LLMNodeConfig, request: Mapping[str, Any], response: dict[str, Any] | None
    ) -> Cost:
        """Count an answer of one of the LLMs, by its own token counts or, where it lacks one, by an estimate.

        Args:
            response: as much of it as came; None where the LLM was left before it said anything.
        """
        if not (endpoint.prompt_usd_per_million or endpoint.completion_usd_per_million):
            return Cost()
        reported = usage_of(response)
        prompt, completion = reported.prompt_tokens, reported.completion_tokens
        usage = Usage(
            prompt_tokens=num_prompt_tokens(request) if prompt is None else prompt,
            completion_tokens=num_answer_tokens(response) if completion is None else completion,
        )
        return self.charge(endpoint, usage, is_estimated=prompt is None or completion is None)

    def _number(self, endpoint: LLMNodeConfig) -> int:
        return next(number for number, config in enumerate(self._configs) if config is endpoint)


def num_prompt_tokens(request: Mapping[str, Any]) -> int:
    """Estimated tokens of what an LLM reads of a request."""
    read = {name: request[name] for name in _READ_BY_AN_LLM if request.get(name)}
    return _num_tokens(json.dumps(read, ensure_ascii=False))


def num_answer_tokens(response: Mapping[str, Any] | None) -> int:
    """Estimated tokens of all that the choices of a completion say; 0 where there is none."""
    choices = (response or {}).get("choices")
    messages = [one.get("message") for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    return _num_tokens("".join(text for message in messages for text in _texts_of(message)))


def was_at_work(error: BaseException) -> bool:
    """Whether an LLM that gave this instead of an answer may be paid for having read the request: its caller left, or the
    answer did not come in time. Any other error is its own, and providers do not bill what failed."""
    if isinstance(error, UpstreamError):
        return error_code(error.body) == "upstream_timeout"
    return isinstance(error, asyncio.CancelledError)


def spent_error(wait_s: float) -> UpstreamError:
    """The error of a call that no LLM may be asked any more today."""
    message = "upstream: every LLM has spent its max_usd_per_day here; try again tomorrow (UTC) or raise it"
    body = error_body(message, kind="insufficient_quota", code="insufficient_quota")
    return UpstreamError(message, 429, body, wait_s)


def _num_tokens(text: str) -> int:
    return math.ceil(len(text.encode(errors="surrogatepass")) / BYTES_PER_TOKEN)


def _texts_of(message: Any) -> list[str]:
    """What an LLM generated of a message: its texts, and names and arguments of its calls."""
    texts: list[str] = []
    stack = [message]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            stack += [item for key, item in value.items() if key not in ("role", "id", "type")]
        elif isinstance(value, list):
            stack += value
    return texts
