"""Two ways to one answer: the first is asked, the second as well once the first is slow; the first good answer wins.

An answer is good where it is not None and no exception; the loser is cancelled and waited for, so that nothing of it
goes on unseen. Nothing of either answer leaves here before the race is decided, and only the winner's does. Knows
nothing of specialists or LLMs. Source: Dean and Barroso, "The tail at scale", CACM 56(2), 2013 (hedged requests).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, NamedTuple, TypeVar

FirstT = TypeVar("FirstT")
SecondT = TypeVar("SecondT")


class Race(NamedTuple, Generic[FirstT, SecondT]):
    """How it ended; exactly one of `first` and `second` is set."""

    first: FirstT | None
    second: SecondT | None
    was_hedged: bool
    """Whether the second was asked while the first had not yet answered."""


async def race(
    first: Coroutine[Any, Any, FirstT | None],
    second: Callable[[], Coroutine[Any, Any, SecondT]],
    *,
    after_s: float,
    discard: Callable[[SecondT], Awaitable[None]],
) -> Race[FirstT, SecondT]:
    """Ask the first; ask the second when the first gave nothing, or gave nothing within `after_s`.

    Args:
        first: gives None where it has no good answer; where it raises, the race ends with that.
        discard: takes an answer of the second that came too late to win.

    Raises:
        Whatever the second raised, where the first gave None.
    """
    leading = asyncio.ensure_future(first)
    following: asyncio.Task[SecondT] | None = None
    is_kept = False
    try:
        await asyncio.wait([leading], timeout=after_s)
        was_hedged = not leading.done()
        if was_hedged:
            following = asyncio.ensure_future(second())
            await asyncio.wait([leading, following], return_when=asyncio.FIRST_COMPLETED)
            if not leading.done() and following.exception() is not None:
                # The second has no answer; the first may still have one.
                await asyncio.wait([leading])
        if leading.done() and (answer := leading.result()) is not None:
            return Race(answer, None, was_hedged)
        following = following or asyncio.ensure_future(second())
        result = await following
        is_kept = True
        return Race(None, result, was_hedged)
    finally:
        await _end(leading)
        if following is not None and not is_kept and await _end(following):
            await discard(following.result())


async def _end(task: asyncio.Task[Any]) -> bool:
    """Cancel the task and wait for its end; whether it has a result for all that."""
    task.cancel()
    await asyncio.wait([task])
    # Looked at, so that asyncio does not complain about an exception that nobody wants to know.
    return not task.cancelled() and task.exception() is None
