"""A gateway's search for engines that started after it did (serving/late_engines.py); found once they answer.

Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from cluster.engine import Engine


class EngineSearch:
    """Adds engines to those a gateway has, and takes out what no release needs."""

    def __init__(self, engines: dict[str, Engine], find: Callable[[str], Engine]) -> None:
        """
        Args:
            engines: by store path of their model; those in it now stay.
            find: the engine of a model, which may not be up yet. Raises where nobody has begun to start one; may block.
        """
        self._engines, self._find = engines, find
        self._built = frozenset(engines)
        self._probes: dict[str, asyncio.Task[None]] = {}

    def look_for(self, models: Iterable[str]) -> None:
        """See to it that these are looked for; returns at once. Saying it again goes on with a search that failed."""
        for model in models:
            probe = self._probes.get(model)
            if model not in self._engines and (probe is None or probe.done()):
                self._probes[model] = asyncio.get_running_loop().create_task(self._probe(model))
                # Looked at, so that asyncio does not complain: the next look tries again.
                self._probes[model].add_done_callback(lambda done: done.cancelled() or done.exception())

    def keep(self, models: Iterable[str]) -> None:
        """Forget late engines of other models, and look for none of them: they end, and would never answer again."""
        kept = {*models, *self._built}
        for model in [model for model in self._engines if model not in kept]:
            del self._engines[model]
        for model in [model for model in self._probes if model not in kept]:
            self._probes.pop(model).cancel()

    async def _probe(self, model: str) -> None:
        engine = await asyncio.to_thread(self._find, model)
        # Answered by a replica that is up.
        await engine.fingerprint()
        self._engines[model] = engine
