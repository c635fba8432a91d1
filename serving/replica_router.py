"""serving/replica_choice.py as a request router of Ray Serve: it runs in each caller, a gateway, for its own calls.

Serve looks `AdapterRouter` up here by its name; it is made then, so that importing this loads no Ray.
Source: ray.serve.request_router of Ray 2.60 (RequestRouter, MultiplexMixin).
"""

from __future__ import annotations

import functools
import random
from typing import Any

from serving.replica_choice import Memory, choose, prompt_blocks


def __getattr__(name: str) -> Any:
    if name == "AdapterRouter":
        return _router_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _router_class() -> type:
    from ray.serve.request_router import MultiplexMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

    class AdapterRouter(MultiplexMixin, RequestRouter):
        """Sends a call where it costs least by what is in flight, and by the adapters and prompts that replicas have."""

        def initialize_state(self, max_adapters: int) -> None:
            """Called by Serve with `request_router_kwargs`."""
            self._max_adapters, self._draw = max_adapters, random.Random()
            self._memories: dict[ReplicaID, Memory] = {}

        async def choose_replicas(
            self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
        ) -> list[list[RunningReplica]]:
            """Ranks of replicas, the best first; Serve takes the less busy one of a rank that accepts."""
            adapter, blocks = call_of(pending_request)
            candidates = [
                self._memory_of(one.replica_id).look(
                    self.replica_queue_len_cache.get(one.replica_id) or 0, one.multiplexed_model_ids, adapter, blocks
                )
                for one in candidate_replicas
            ]
            ranks = choose(candidates, len(blocks), self._draw)
            return [[candidate_replicas[number] for number in rank] for rank in ranks]

        def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
            """Remember where the call went."""
            self._memory_of(replica_id).note(*call_of(pending_request))

        def update_replicas(self, replicas: list[RunningReplica]) -> None:
            """Forget those that are gone."""
            super().update_replicas(replicas)
            known = {one.replica_id for one in replicas}
            self._memories = {name: one for name, one in self._memories.items() if name in known}

        def _memory_of(self, replica_id: ReplicaID) -> Memory:
            return self._memories.setdefault(replica_id, Memory(self._max_adapters))

    return AdapterRouter


def call_of(pending: Any) -> tuple[str, list[bytes]]:
    """Adapter ("" for the base alone) and prompt of a call of SpecialistServer; its methods without a request have no prompt."""
    if pending is None:
        return "", []
    request = next((one for one in pending.args if isinstance(one, dict)), None)
    return pending.metadata.multiplexed_model_id, prompt_blocks(request) if request else []
