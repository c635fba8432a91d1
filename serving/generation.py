"""One generation in vLLM: prompt ids -> token ids with log-probabilities, given up once its confidence is lost.

vLLM's client is used directly, because Ray's engine wrapper has no token-in, token-out call in 2.60. A generation whose
reader leaves, by cancellation or by giving it up, is aborted in the engine. Knows nothing of prompts or messages.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from cluster.confidence import ConfidenceBound
from cluster.errors import EngineError


class Generated(NamedTuple):
    """What the engine said, as far as it was let."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    """As `EngineAnswer.finish_reason`."""


async def generate(
    client: Any,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    stop: int,
    lora: Any,
    stop_below: float = 0.0,
    constraint: dict[str, Any] | None = None,
) -> Generated:
    """Ask vLLM for tokens, greedily, up to the token `stop`.

    Args:
        lora: vLLM's LoRARequest; None for the base model alone.
        stop_below: as `Engine.answer` takes it.
        constraint: what the answer is held to, as `serving.constraint` has it. A schema that vLLM cannot make a grammar of
            constrains nothing; the answer is checked against it all the same.

    Raises:
        EngineError: the engine gave nothing.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=0,
        stop_token_ids=[stop],
        # The ids are decoded by whoever asked, in one piece.
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(**constraint) if constraint else None,
    )
    prompt = TokensPrompt(prompt_token_ids=prompt_ids)
    try:
        return await collect(client.generate(prompt, params, uuid.uuid4().hex, lora_request=lora), stop_below)
    except VLLMValidationError:
        if not constraint:
            raise
    params.structured_outputs = None
    return await collect(client.generate(prompt, params, uuid.uuid4().hex, lora_request=lora), stop_below)


async def collect(outputs: AsyncGenerator[Any, None], stop_below: float) -> Generated:
    """Join the pieces of one generation; close it, which aborts it in vLLM, once no more tokens can save it.

    Args:
        outputs: vLLM's RequestOutputs, each with the tokens that are new.
    """
    token_ids: list[int] = []
    logprobs: list[float] = []
    bound = ConfidenceBound()
    finish_reason: str | None = None
    # Also where this coroutine is cancelled: vLLM aborts a request whose generator is closed.
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            (piece,) = output.outputs
            for token, entry in zip(piece.token_ids, piece.logprobs, strict=True):
                token_ids.append(token)
                logprobs.append(entry[token].logprob)
                bound.add(logprobs[-1])
            if output.finished:
                # Its generator ends by itself; closed before that, it would abort what is over.
                finish_reason = piece.finish_reason or "length"
            elif bound.is_lost(stop_below):
                return Generated(token_ids, logprobs, "rejected")
    if finish_reason is None:
        raise EngineError("engine: no output")
    return Generated(token_ids, logprobs, finish_reason)
