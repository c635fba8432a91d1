"""Giving a generation up: exactly what the whole answer would be refused for, and the engine's request ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.confidence import ConfidenceBound, confidence
from cluster.errors import EngineError
from serving.generation import collect

LOGPROBS = st.lists(
    st.one_of(
        st.floats(-30, 0.0),
        st.floats(-1e-3, 1e-9),
        st.sampled_from([0.0, -0.0, float("-inf"), float("nan"), float("inf"), -1e308]),
    ),
    min_size=1,
    max_size=60,
)


class Vllm:
    """Streams one request as vLLM's client does, in pieces, and aborts it when its generator is closed or cancelled."""

    def __init__(self, logprobs: list[float], piece_size: int = 1, finish_reason: str = "stop") -> None:
        self.pieces = [logprobs[at : at + piece_size] for at in range(0, len(logprobs), piece_size)]
        self.finish_reason = finish_reason
        self.num_said = 0
        self.is_aborted = False
        self.may_go_on = asyncio.Event()

    async def generate(self) -> AsyncGenerator[Any, None]:
        try:
            for number, piece in enumerate(self.pieces, 1):
                if self.num_said:
                    await self.may_go_on.wait()
                ids = list(range(self.num_said, self.num_said + len(piece)))
                self.num_said += len(piece)
                entries = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids, piece, strict=True)]
                is_last = number == len(self.pieces)
                output = SimpleNamespace(
                    token_ids=ids, logprobs=entries, finish_reason=self.finish_reason if is_last else None
                )
                yield SimpleNamespace(outputs=[output], finished=is_last)
        except (asyncio.CancelledError, GeneratorExit):
            self.is_aborted = True
            raise


def _collect(vllm: Vllm, stop_below: float) -> Any:
    async def scenario() -> Any:
        vllm.may_go_on.set()
        return await collect(vllm.generate(), stop_below)

    return asyncio.run(scenario())


@given(LOGPROBS, st.floats(0, 1), st.integers(1, 7))
def test_only_what_the_whole_answer_is_refused_for_is_given_up(
    logprobs: list[float], threshold: float, piece_size: int
) -> None:
    vllm = Vllm(logprobs, piece_size)
    found = _collect(vllm, threshold)
    whole = confidence(logprobs)
    if found.finish_reason == "rejected":
        assert whole < threshold and vllm.is_aborted
        assert len(found.token_ids) == vllm.num_said < len(logprobs)
    else:
        assert found.finish_reason == "stop" and not vllm.is_aborted
        assert confidence(found.logprobs) == whole, "the same answer as without a threshold"


@given(LOGPROBS, LOGPROBS, st.one_of(st.floats(0, 1), st.just(None)))
def test_no_continuation_reaches_a_threshold_that_is_lost(
    begun: list[float], rest: list[float], threshold: float | None
) -> None:
    # None: a threshold at the whole answer's own confidence, where rounding would show.
    whole = confidence([*begun, *rest])
    threshold = whole if threshold is None else threshold
    bound = ConfidenceBound()
    for logprob in begun:
        bound.add(logprob)
    assert not (bound.is_lost(threshold) and whole >= threshold)
    assert not ConfidenceBound().is_lost(threshold), "before the first token everything is possible"


def test_a_lost_answer_ends_with_the_token_that_lost_it() -> None:
    vllm = Vllm([-0.01, -5.0, -0.01, -0.01])
    found = _collect(vllm, 0.9)
    assert (found.finish_reason, found.token_ids, vllm.num_said, vllm.is_aborted) == ("rejected", [0, 1], 2, True)
    whole = _collect(Vllm([-0.01, -5.0, -0.01, -0.01]), 0.0)
    assert (whole.finish_reason, len(whole.token_ids)) == ("stop", 4)


def test_a_cut_answer_says_so_and_none_is_an_error() -> None:
    assert _collect(Vllm([-0.1], finish_reason="length"), 0.0).finish_reason == "length"
    with pytest.raises(EngineError, match="no output"):
        _collect(Vllm([]), 0.0)


def test_a_caller_that_is_cancelled_aborts_the_engines_request() -> None:
    async def scenario() -> None:
        vllm = Vllm([-0.1] * 9)
        task = asyncio.ensure_future(collect(vllm.generate(), 0.0))
        while not vllm.num_said:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and vllm.is_aborted and vllm.num_said == 1

    asyncio.run(scenario())
