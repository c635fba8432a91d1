"""Two ways to one answer: who wins, and that the loser is cancelled, waited for and given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.hedging import Race, race


class Side:
    """One way: after `turns` of the loop it gives `result` or raises it."""

    def __init__(self, turns: int, result: Any) -> None:
        self.turns, self.result = turns, result
        self.state = "idle"

    async def answer(self) -> Any:
        self.state = "running"
        try:
            for _ in range(self.turns):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.state = "cancelled"
            raise
        self.state = "done"
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def _race(first: Side, second: Side, after_s: float) -> tuple[Race | Exception, list[Any]]:
    discarded: list[Any] = []

    async def discard(answer: Any) -> None:
        discarded.append(answer)

    async def scenario() -> Race:
        ended = await race(
            first.answer(), second.answer, after_s=after_s, is_good=lambda said: said != "refusal", discard=discard
        )
        assert len(asyncio.all_tasks()) == 1, "nothing goes on"
        return ended

    try:
        return asyncio.run(scenario()), discarded
    except ValueError as error:
        return error, discarded


@given(
    st.builds(Side, st.integers(0, 6), st.sampled_from(["specialist", None])),
    st.builds(Side, st.integers(0, 6), st.sampled_from(["llm", "refusal", ValueError("no LLM")])),
    st.sampled_from([0.0, 60.0]),
)
def test_one_good_answer_wins_and_nothing_is_left_over(first: Side, second: Side, after_s: float) -> None:
    result, second_result = first.result, second.result
    ended, discarded = _race(Side(first.turns, result), second, after_s)
    if isinstance(ended, Exception):
        assert result is None and isinstance(second_result, Exception), "there was no answer"
        return
    assert (ended.first is None) != (ended.second is None)
    assert (ended.first, ended.second) in [("specialist", None), (None, "llm"), (None, "refusal")]
    if ended.second is not None:
        assert not discarded and (result is None or ended.was_hedged)
        assert result is None or ended.second == "llm", "a refusal wins over nothing alone"
    elif second.state == "done" and not isinstance(second_result, Exception):
        assert discarded == [second_result], "an answer that came too late is given back"
    else:
        assert not discarded and second.state in ("idle", "cancelled", "done")
    if after_s:
        assert not ended.was_hedged, "a quick first is alone"


def test_a_slow_first_is_cancelled_and_a_slow_second_too() -> None:
    slow, quick = Side(10**9, "specialist"), Side(0, "llm")
    assert _race(slow, quick, 0.0)[0] == Race(None, "llm", True)
    assert slow.state == "cancelled"
    slow, quick = Side(10**9, "llm"), Side(3, "specialist")
    assert _race(quick, slow, 0.0)[0] == Race("specialist", None, True)
    assert slow.state == "cancelled"


def test_where_the_second_fails_the_first_is_waited_for() -> None:
    ended, _ = _race(Side(50, "specialist"), Side(0, ValueError("no LLM")), 0.0)
    assert ended == Race("specialist", None, True)
    ended, discarded = _race(Side(50, "specialist"), Side(0, "refusal"), 0.0)
    assert ended == Race("specialist", None, True) and discarded == ["refusal"]


def test_who_leaves_ends_both() -> None:
    async def scenario() -> None:
        first, second = Side(10**9, "specialist"), Side(10**9, "llm")

        async def discard(_: Any) -> None:
            raise AssertionError("there is no answer")

        task = asyncio.ensure_future(race(first.answer(), second.answer, after_s=0.0, is_good=bool, discard=discard))
        while second.state == "idle":
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert first.state == second.state == "cancelled"

    asyncio.run(scenario())
