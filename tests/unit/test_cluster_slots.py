"""Places for calls: who gets one, who waits, who is turned away."""

from __future__ import annotations

import asyncio

from cluster.slots import Slots


def test_who_finds_the_places_taken_and_the_queue_full_is_turned_away_at_once() -> None:
    async def main() -> None:
        slots = Slots(1, 1, 60.0)
        assert await slots.take()
        waiting = asyncio.create_task(slots.take())
        await asyncio.sleep(0)
        assert not await slots.take()
        slots.give()
        assert await waiting

    asyncio.run(main())


def test_who_waits_too_long_is_turned_away_and_holds_no_place() -> None:
    async def main() -> None:
        slots = Slots(1, 1, 0.01)
        assert await slots.take()
        assert not await slots.take()
        slots.give()
        assert await slots.take() and not await slots.take()

    asyncio.run(main())


def test_who_leaves_while_waiting_holds_no_place() -> None:
    async def main() -> None:
        slots = Slots(1, 1, 60.0)
        assert await slots.take()
        waiting = asyncio.create_task(slots.take())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        slots.give()
        assert await slots.take()

    asyncio.run(main())
