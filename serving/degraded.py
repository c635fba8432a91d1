"""What a call gets that no LLM answers, where the recipe allows it: its specialist's valid answer below the threshold.

The specialist is asked again, because an answer that was going to be rejected may have been given up before its end. What
it says is marked, in the response header and in the captured call, and counts for no certificate; but for a specialist
that gave no answer the first time (it failed or was late) and now gives one above its threshold: that one is kept as ever.
"""

from __future__ import annotations

import asyncio
import logging

from cluster.engine import Engine, EngineAnswer
from cluster.errors import UnderstudyError, UpstreamError
from cluster.prompts import PromptFormat
from cluster.records import RouteDecision, Specialist
from cluster.servable import ask_engine
from cluster.telemetry import log_event
from serving import policy
from serving.pending import PendingCall


def may_stand_in(error: UpstreamError) -> bool:
    """Whether the LLMs are down or busy; an error that is the client's own is the client's to mend."""
    return error.status == 429 or error.status >= 500


async def asked_again(
    engine: Engine, specialist: Specialist, call: PendingCall, timeout_s: float
) -> EngineAnswer | None:
    """The specialist's answer if it is valid; None where it is not, or does not come in time."""
    prompt_format = PromptFormat.model_validate(specialist.prompt_format)
    asking = ask_engine(engine, specialist.lora, prompt_format, call.request, specialist.max_answer_tokens, call.facing)
    try:
        async with asyncio.timeout(timeout_s):
            answer, invalid = await asking
    except (*_engine_errors(), UnderstudyError, OSError) as error:
        log_event("stand_in_failed", logging.WARNING, call_id=call.call_id, error=type(error).__name__)
        return None
    return answer if invalid is None else None


def stand_in_decision(decision: RouteDecision, answer: EngineAnswer, specialist: Specialist) -> RouteDecision:
    """The decision to serve a valid answer: as any other where it is above the threshold after all, else degraded.

    Args:
        decision: what came of asking the first time. Where the specialist answered and was not kept, a second try does not
            count: the gate speaks of one.
    """
    if decision.action == "fall_back":
        judged = policy.decide_after(answer, specialist, None, release=decision.release or "")
        if judged.action == "accept":
            return judged
    update = {"action": "degrade", "reason": "no LLM answers", "confidence": answer.confidence}
    return decision.model_copy(update=update)


def _engine_errors() -> tuple[type[BaseException], ...]:
    """What a handle's call may raise; looked up when something was raised, so that importing this loads no Ray."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return RayError, RayServeException, TimeoutError
