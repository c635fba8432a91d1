"""Which replica of an engine a specialist's call goes to: one that has its adapter, and of these one that knows its prompt.

An adapter that a replica lacks is loaded first, and vLLM keeps the keys and values of a prompt's beginning apart for every
adapter; so a task's calls are cheapest where the last ones went. Unless that replica is busier than the others by more
than a bound: then, and for what no replica knows, the less busy of two drawn ones is taken, as Serve does it. Source of
the latter: Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12(10), 2001.
"""

from __future__ import annotations

import collections
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_QUEUE_DIFFERENCE = 8
"""Calls that a preferred replica may have more than the least busy one. A CPU engine's step takes as long for one call as
for a few, so that some waiting costs less than a second copy of the adapter and the prompt."""
_BLOCK_CHARS, _MAX_BLOCKS = 256, 32
_MAX_PROMPTS = 4_096
"""Beginnings remembered of each replica, in blocks; what a replica has forgotten meanwhile is only a worse guess."""


class Candidate(NamedTuple):
    """One replica, as far as the choice needs it."""

    queue_len: int
    has_adapter: bool
    num_adapters: int
    num_shared: int
    """Leading blocks of the prompt that it has seen with this adapter."""


def choose(candidates: Sequence[Candidate], max_difference: int, draw: random.Random) -> list[list[int]]:
    """Numbers of the candidates in ranks, the best rank first; within a rank the least busy one is to be taken.

    Args:
        max_difference: see MAX_QUEUE_DIFFERENCE.
    """
    if not candidates:
        return []
    least = min(one.queue_len for one in candidates)
    near = [n for n, one in enumerate(candidates) if one.has_adapter and one.queue_len - least <= max_difference]
    best = max((candidates[n].num_shared for n in near), default=0)
    first = [n for n in near if candidates[n].num_shared == best]
    # Who must load it: those with the most room, so that adapters spread.
    emptiest = min(one.num_adapters for one in candidates)
    pool = first or [n for n, one in enumerate(candidates) if one.num_adapters == emptiest]
    drawn = draw.sample(pool, min(2, len(pool)))
    others = [n for n in range(len(candidates)) if n not in drawn]
    return [drawn, others] if others else [drawn]


def prompt_blocks(request: Mapping[str, Any]) -> list[bytes]:
    """Hashes of a prompt's beginning, each of all up to its end: two prompts share as much as their lists do."""
    messages = request.get("messages")
    texts = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    text = "\0".join(text if isinstance(text, str) else "" for text in texts)[: _BLOCK_CHARS * _MAX_BLOCKS]
    digest, blocks = hashlib.blake2b(digest_size=8), []
    for start in range(0, len(text) - _BLOCK_CHARS + 1, _BLOCK_CHARS):
        digest.update(text[start : start + _BLOCK_CHARS].encode(errors="surrogatepass"))
        blocks.append(digest.digest())
    return blocks


class Memory:
    """What one replica was lately sent, from the sender's side."""

    def __init__(self, max_adapters: int) -> None:
        self._max_adapters = max_adapters
        self._adapters: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._blocks: collections.OrderedDict[tuple[str, bytes], None] = collections.OrderedDict()

    def look(self, queue_len: int, resident: set[str], adapter: str, blocks: Sequence[bytes]) -> Candidate:
        """The replica as a candidate for one call; `resident` is what it says that it has. Every one has the base alone ("")."""
        adapters = resident | self._adapters.keys()
        shared = next((n for n, one in enumerate(blocks) if (adapter, one) not in self._blocks), len(blocks))
        return Candidate(queue_len, not adapter or adapter in adapters, len(adapters), shared)

    def note(self, adapter: str, blocks: Sequence[bytes]) -> None:
        """A call went there, for an adapter or for the base alone ("")."""
        if adapter:
            _touch(self._adapters, adapter, self._max_adapters)
        for block in blocks:
            _touch(self._blocks, (adapter, block), _MAX_PROMPTS)


def _touch(known: collections.OrderedDict[Any, None], key: Any, limit: int) -> None:
    known[key] = None
    known.move_to_end(key)
    while len(known) > limit:
        known.popitem(last=False)
