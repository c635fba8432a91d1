"""Which replica of an engine a specialist's call goes to: the one where it costs least, counted in calls.

What counts is what a replica has in flight; a load where it lacks the adapter, and more where it must give one up for it,
which is soon asked again; and the part of the prompt that it would compute anew though another one knows it: vLLM keeps the
keys and values of a prompt's beginning apart for every adapter. So a task's calls stay where the last ones went, as long
as that replica is not so busy that a second copy of adapter and prompt costs less than to wait, and a task asked often has
copies where there is room. Where nothing tells replicas apart, one of two drawn ones is taken, as Serve does it
(Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12(10), 2001).
"""

from __future__ import annotations

import collections
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LOAD, GIVE_UP, PROMPT = 3.0, 5.0, 2.0
"""What costs as much as so many calls in flight: an adapter that is loaded, one given up for it, a prompt computed anew.

Chosen by simulation (tests/unit/test_serving_replica_choice.py), where an adapter takes a fifth of a call to load, as measured
on a CPU (jobs/bench/adapter_room.py): no fewer calls a second than Serve's default with any of the numbers of adapters, replicas
and clients tried. Copies that push no adapter out are cheap; those that do are soon paid for again."""
_BLOCK_CHARS, _MAX_BLOCKS = 256, 32
_MAX_PROMPTS = 4_096
"""Beginnings remembered of each replica, in blocks; what a replica has forgotten meanwhile is only a worse guess."""


class Candidate(NamedTuple):
    """One replica, as far as the choice needs it."""

    queue_len: int
    has_adapter: bool
    fill: float
    """Adapters that it has, as a share of those it has room for; from 1 on it must give one up for another."""
    num_shared: int
    """Leading blocks of the prompt that it has seen with this adapter."""


def costs(candidates: Sequence[Candidate], num_blocks: int) -> list[float]:
    """What a call costs at each candidate, in calls.

    Args:
        num_blocks: of the call's prompt.
    """
    best = max((one.num_shared for one in candidates), default=0)
    found = []
    for one in candidates:
        unknown = PROMPT * (best - one.num_shared) / num_blocks if num_blocks else 0.0
        # Of two that lack it the emptier one, so that adapters spread.
        load = 0.0 if one.has_adapter else LOAD + min(one.fill, 1.0) + GIVE_UP * (one.fill >= 1.0)
        found.append(one.queue_len + unknown + load)
    return found


def choose(candidates: Sequence[Candidate], num_blocks: int, draw: random.Random) -> list[list[int]]:
    """Numbers of the candidates in ranks, the best rank first; within a rank the least busy one is to be taken.

    Args:
        num_blocks: of the call's prompt.
    """
    if not candidates:
        return []
    cost = costs(candidates, num_blocks)
    pool = [n for n, one in enumerate(cost) if one == min(cost)]
    drawn = draw.sample(pool, min(2, len(pool)))
    others = sorted((n for n in range(len(candidates)) if n not in drawn), key=cost.__getitem__)
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
        return Candidate(queue_len, not adapter or adapter in adapters, len(adapters) / self._max_adapters, shared)

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
