"""Whether a replica is up, told by calls alone."""

from __future__ import annotations

import asyncio

import pytest

from serving.presence import ColdStart, Presence


class Deployment:
    """Holds probes until it has a replica."""

    def __init__(self) -> None:
        self.has_replica = asyncio.Event()
        self.num_probes = 0
        self.now = 0.0

    async def probe(self) -> None:
        self.num_probes += 1
        await self.has_replica.wait()

    def presence(self, idle_s: float | None = None) -> Presence:
        return Presence(self.probe, idle_s, lambda: self.now)


def test_calls_go_elsewhere_until_the_probe_is_answered() -> None:
    async def main() -> None:
        deployment = Deployment()
        presence = deployment.presence()
        found = await asyncio.gather(*(presence.check() for _ in range(5)), return_exceptions=True)
        assert all(isinstance(one, ColdStart) for one in found) and deployment.num_probes == 1
        deployment.has_replica.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await presence.check()
        assert deployment.num_probes == 1

    asyncio.run(main())


def test_a_replica_that_is_up_costs_one_quick_probe() -> None:
    async def main() -> None:
        deployment = Deployment()
        deployment.has_replica.set()
        presence = deployment.presence()
        await asyncio.gather(*(presence.check() for _ in range(5)))
        assert deployment.num_probes == 1

    asyncio.run(main())


def test_after_an_idle_time_in_which_the_last_may_have_gone_it_is_probed_again() -> None:
    async def main() -> None:
        deployment = Deployment()
        presence = deployment.presence(idle_s=300.0)
        with presence.watch():
            pass
        deployment.now = 299.0
        await presence.check()
        with presence.watch():
            pass
        deployment.now = 600.0
        with pytest.raises(ColdStart):
            await presence.check()
        assert deployment.num_probes == 1

    asyncio.run(main())


def test_a_call_that_was_given_up_late_makes_the_next_one_probe_and_one_given_up_early_does_not() -> None:
    async def main() -> None:
        deployment = Deployment()
        presence = deployment.presence()
        with presence.watch():
            pass
        for seconds in (1.0, 10.0):
            with pytest.raises(TimeoutError), presence.watch():
                deployment.now += seconds
                raise TimeoutError
            if seconds == 1.0:
                await presence.check()
                assert deployment.num_probes == 0
        with pytest.raises(ColdStart):
            await presence.check()

    asyncio.run(main())


def test_a_probe_that_fails_is_followed_by_another() -> None:
    num_probes = 0

    async def probe() -> None:
        nonlocal num_probes
        num_probes += 1
        if num_probes == 1:
            raise ConnectionError

    async def main() -> None:
        presence = Presence(probe, None)
        with pytest.raises(ColdStart):
            await presence.check()
        await presence.check()

    asyncio.run(main())
    assert num_probes == 2
