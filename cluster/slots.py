"""At most so many calls at once, and a short queue of others: who finds both full, or waits too long, is turned away.

Knows nothing of what the calls are. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio


class Slots:
    """A counted number of places. Who was given one gives it back."""

    def __init__(self, num_slots: int, max_waiting: int, max_wait_s: float) -> None:
        self._free = asyncio.Semaphore(num_slots)
        self._max_waiting, self._max_wait_s = max_waiting, max_wait_s
        self._num_waiting = 0

    async def take(self) -> bool:
        """Whether a place was given; waits at most `max_wait_s`, and only as one of at most `max_waiting`."""
        if self._free.locked():
            if self._num_waiting >= self._max_waiting:
                return False
            self._num_waiting += 1
            try:
                async with asyncio.timeout(self._max_wait_s):
                    await self._free.acquire()
            except TimeoutError:
                return False
            finally:
                self._num_waiting -= 1
            return True
        # Does not wait: it is not locked.
        await self._free.acquire()
        return True

    def give(self) -> None:
        """Give one place back."""
        self._free.release()
