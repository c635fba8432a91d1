"""Two ways to one answer: the first is asked, the second as well once the first is slow; the first good answer wins.

The loser is cancelled and waited for, so that nothing of it goes on unseen. Nothing of either answer leaves here before
the race is decided, and only the winner's does. Knows nothing of specialists or LLMs. Source: Dean and Barroso, "The tail at scale", CACM 56(2), 2013 (hedged requests).
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
    is_good: Callable[[SecondT], bool],
    discard: Callable[[SecondT], Awaitable[None]],
) -> Race[FirstT, SecondT]:
    """Ask the first; ask the second when the first gave nothing, or gave nothing within `after_s`.

    Args:
        first: gives None where it has no good answer; where it raises, the race ends with that.
        is_good: whether an answer of the second may win; one that is not is given only where the first has none.
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
            if not leading.done() and not (_has_result(following) and is_good(following.result())):
                # The second has no good answer; the first may still have one.
                await asyncio.wait([leading])
        if leading.done() and (answer := leading.result()) is not None:
            return Race(answer, None, was_hedged)
        following = following or asyncio.ensure_future(second())
        result = await following
        is_kept = True
        return Race(None, result, was_hedged)
    finally:
        # Both are told before anything is awaited: a second cancellation must not leave one at work.
        leading.cancel()
        if following is not None and not is_kept:
            following.cancel()
        await _end(leading)
        if following is not None and not is_kept and await _end(following):
            await discard(following.result())


async def _end(task: asyncio.Task[Any]) -> bool:
    """Cancel the task and wait for its end; whether it has a result for all that."""
    task.cancel()
    await asyncio.wait([task])
    return _has_result(task)


def _has_result(task: asyncio.Task[Any]) -> bool:
    """Whether a task that is done has a result; its exception is looked at, so that asyncio does not complain of it."""
    return not task.cancelled() and task.exception() is None
