"""What one call may take in time and money, over the whole chain of specialist and LLMs.

The recipe sets both (gateway.deadline_s, gateway.budget_usd); a client can only tighten them, by the headers
x-deadline-s and x-budget-usd. Money is held back before it is spent: an LLM is asked only if the most that its answer
can cost is within the budget. Knows nothing of specialists; times are those of the event loop's clock.

The most that an answer can cost is an estimate of its prompt (serving/billing.py) at the dearest upstream's prices. A
failed attempt, which providers do not bill, counts nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from cluster.errors import UpstreamError
from cluster.prices import tokens_cost_usd
from cluster.records import Usage
from cluster.upstream import LLMNodeConfig
from serving.billing import num_prompt_tokens
from serving.draining import Drain
from serving.openai_wire import Denied, error_body

DEADLINE_HEADER, BUDGET_HEADER = "x-deadline-s", "x-budget-usd"
SPECIALIST_SHARE = 0.5
"""Of the time that is left, what a specialist may take at most, so that the LLM has the rest."""
UNLIMITED_TOKENS = 4096
"""Longest answer to a request that has a budget and sets no limit itself, in tokens. Every current model gives so many;
one that is asked for more than it gives refuses the request."""
_TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")

ResultT = TypeVar("ResultT")


class Limits(NamedTuple):
    """What is allowed to one call."""

    deadline_at: float
    """On the event loop's clock."""
    budget_usd: float
    """US dollars; infinite where nothing bounds it."""

    def specialist_s(self, now: float, most: float) -> float:
        """How long a specialist may take from `now` on, in seconds, at most `most`."""
        return min(most, max(0.0, self.deadline_at - now) * SPECIALIST_SHARE)


UNLIMITED = Limits(math.inf, math.inf)
"""Of what is no client's call."""


def read_limits(headers: Mapping[str, str], *, deadline_s: float, budget_usd: float | None, now: float) -> Limits:
    """The recipe's limits, or the client's where they are tighter.

    Args:
        now: when the call came, on the event loop's clock.

    Raises:
        Denied: 400, a header that is no positive number of seconds or no amount of dollars: who asks for a limit must not
            go without one unknown to him.
    """
    seconds = _number(headers.get(DEADLINE_HEADER))
    dollars = _number(headers.get(BUDGET_HEADER))
    if seconds is not None and not seconds > 0:
        raise _malformed(DEADLINE_HEADER, "seconds above 0, such as 2.5")
    if dollars is not None and not dollars >= 0:
        raise _malformed(BUDGET_HEADER, "US dollars, 0 or more, such as 0.002")
    given = math.inf if budget_usd is None else budget_usd
    return Limits(
        now + min(deadline_s, deadline_s if seconds is None else seconds),
        min(given, given if dollars is None else dollars),
    )


def fit_budget(request: dict[str, Any], budget_usd: float, llms: Iterable[LLMNodeConfig]) -> dict[str, Any]:
    """The request as an LLM may be sent it: one without a limit gets the max_completion_tokens that the budget pays for,
    at most UNLIMITED_TOKENS.

    Args:
        budget_usd: what is left for this answer.

    Raises:
        UpstreamError: 400 `budget_exceeded`. Not 429, which clients repeat, though the same call never fits; not 402,
            which OpenAI's clients do not know.
    """
    if math.isinf(budget_usd):
        return request
    prices = [(llm.prompt_usd_per_million, llm.completion_usd_per_million) for llm in llms]
    num_prompt = num_prompt_tokens(request)
    asked = [request[name] for name in _TOKEN_LIMITS if type(request.get(name)) is int]
    num_choices = request["n"] if type(request.get("n")) is int and request["n"] > 0 else 1
    affordable = min(_affordable_tokens(num_prompt, budget_usd, *price) / num_choices for price in prices)
    if affordable < 1 or (asked and max(asked) > affordable):
        raise _over_budget(budget_usd, num_prompt, affordable)
    # Where nothing costs, nothing is to be bounded, and a small window would refuse the bound.
    return (
        request
        if asked or math.isinf(affordable)
        else {**request, "max_completion_tokens": int(min(affordable, UNLIMITED_TOKENS))}
    )


def late_error() -> UpstreamError:
    """The error of a call whose time is over."""
    message = (
        f"No answer within the time allowed; send the request again, with more time (header {DEADLINE_HEADER}) or by "
        "raising the recipe's gateway.deadline_s"
    )
    return UpstreamError(message, 504, error_body(message, kind="timeout_error", code="deadline_exceeded"))


async def within(working: Coroutine[Any, Any, ResultT], deadline_at: float | None, drain: Drain) -> ResultT:
    """What `working` gives before the deadline, if there is one, and the gateway's end; cancelled then.

    Raises:
        UpstreamError: 504, the deadline passed; 503, the drain time did.
    """
    cut: UpstreamError | None = None

    def stop(error: UpstreamError) -> None:
        nonlocal cut
        cut = error
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout_at(deadline_at) as limit:
            with drain.watch(stop):
                return await working
    except TimeoutError:
        raise cut or late_error() from None


async def until(chunks: AsyncIterator[bytes], deadline_at: float | None, drain: Drain) -> AsyncIterator[bytes]:
    """The pieces of a stream as they come, up to the deadline, if there is one, or the gateway's end. One timer for the
    stream; a piece costs nothing more.

    Raises:
        UpstreamError: 504, the deadline passed before the stream's end; 503, the drain time did.
    """
    task = asyncio.current_task()
    assert task is not None
    is_waiting, error = False, None

    def stop(reason: UpstreamError) -> None:
        nonlocal error
        # Between two pieces the task is its reader's, who must not be cancelled; nor is one cancelled twice.
        if error is None and is_waiting:
            task.cancel()
        error = error or reason

    timer = deadline_at and asyncio.get_running_loop().call_at(deadline_at, lambda: stop(late_error()))
    try:
        with drain.watch(stop):
            while error is None:
                is_waiting = True
                try:
                    piece = await anext(chunks, None)
                except asyncio.CancelledError:
                    if error is not None and task.uncancel() == 0:
                        break
                    raise
                finally:
                    is_waiting = False
                if piece is None:
                    return
                yield piece
    finally:
        if timer:
            timer.cancel()
    raise error


def _number(text: str | None) -> float | None:
    """None where the header is absent; NaN, which is neither above nor below anything, where it is no number."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _malformed(header: str, allowed: str) -> Denied:
    return Denied(400, f"{header}: allowed are {allowed}", code="invalid_header", param=header)


def _affordable_tokens(num_prompt: int, budget_usd: float, prompt_price: float, completion_price: float) -> float:
    """Completion tokens that the budget pays for beside the prompt, a fraction included; infinite where they are free."""
    read = tokens_cost_usd(
        Usage(prompt_tokens=num_prompt, completion_tokens=0),
        prompt_usd_per_million=prompt_price,
        completion_usd_per_million=completion_price,
    )
    left = budget_usd - (read or 0.0)
    if left < 0:
        return 0.0
    return left * 1e6 / completion_price if completion_price else math.inf


def _over_budget(budget_usd: float, num_prompt: int, affordable: float) -> UpstreamError:
    allowed = f"max_completion_tokens up to {int(affordable)}, or" if affordable >= 1 else "a shorter prompt, or"
    message = (
        f"The LLM's answer could cost more than the {budget_usd:.6g} US dollars left to this call (a prompt of about "
        f"{num_prompt} tokens); allowed: {allowed} a larger {BUDGET_HEADER}, as far as gateway.budget_usd goes"
    )
    return UpstreamError(
        message, 400, error_body(message, kind="invalid_request_error", code="budget_exceeded", param=BUDGET_HEADER)
    )
