"""Where a specialist's call goes: by plain values, and simulated beside Serve's default on a Zipf stream of tasks."""

from __future__ import annotations

import collections
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serving.replica_choice import Candidate, Memory, choose, prompt_blocks

CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(0, 20), st.booleans(), st.integers(0, 8), st.integers(0, 5)),
    min_size=1,
    max_size=6,
)


@given(CANDIDATES, st.integers(0, 10), st.randoms())
def test_every_candidate_is_in_one_rank_and_the_best_one_holds_the_promise(
    candidates: list[Candidate], difference: int, draw: random.Random
) -> None:
    ranks = choose(candidates, difference, draw)
    assert sorted(n for rank in ranks for n in rank) == list(range(len(candidates))) and 1 <= len(ranks[0]) <= 2
    least = min(one.queue_len for one in candidates)
    near = [one for one in candidates if one.has_adapter and one.queue_len - least <= difference]
    for chosen in (candidates[n] for n in ranks[0]):
        if near:
            assert chosen in near and chosen.num_shared == max(one.num_shared for one in near)
        else:
            assert chosen.num_adapters == min(one.num_adapters for one in candidates)


def test_no_candidate_no_rank() -> None:
    assert choose([], 8, random.Random(1)) == []


def test_prompts_share_what_they_begin_with() -> None:
    def blocks(text: str) -> list[bytes]:
        return prompt_blocks(
            {"messages": [{"role": "system", "content": "s" * 600}, {"role": "user", "content": text}]}
        )

    one, other = blocks("a" * 600), blocks("b" * 600)
    assert one[:2] == other[:2] and not set(one[2:]) & set(other[2:]) and len(one) == 4
    assert prompt_blocks({"messages": [{"content": ["x"]}, 3]}) == prompt_blocks({}) == []


def test_a_memory_forgets_the_oldest_adapter_and_keeps_prompts_apart_by_adapter() -> None:
    memory = Memory(2)
    for adapter in ("a", "b", "a", "c"):
        memory.note(adapter, [b"1", b"2"])
    assert memory.look(0, set(), "b", [b"1"]) == Candidate(0, False, 2, 1)
    assert memory.look(3, {"b"}, "b", [b"1", b"2", b"3"]) == Candidate(3, True, 3, 2)
    assert memory.look(0, set(), "d", [b"1"]).num_shared == 0


def test_a_call_for_no_adapter_goes_to_any_replica_however_many_adapters_it_has_and_to_where_its_prompt_was() -> None:
    """Else every one of them, such as the question for its facts, would go to the replica with the fewest adapters."""
    full, empty = Memory(2), Memory(2)
    full.note("a", [])
    seen = [full.look(0, {"b"}, "", []), empty.look(0, set(), "", [])]
    assert {rank[0] for rank in (choose(seen, 8, random.Random(seed))[0] for seed in range(20))} == {0, 1}
    empty.note("", [b"1"])
    assert choose([one.look(0, set(), "", [b"1", b"2"]) for one in (full, empty)], 8, random.Random(0)) == [[1], [0]]
    assert empty.look(0, set(), "a", []).num_adapters == 0, "the base is no adapter"


class Replica:
    """Simulated: adapters and prompts kept by recency; one call is done each turn."""

    def __init__(self, num_adapters: int, num_prompts: int) -> None:
        self.limits = num_adapters, num_prompts
        self.adapters: collections.OrderedDict[str, None] = collections.OrderedDict()
        self.prompts: collections.OrderedDict[tuple[str, int], None] = collections.OrderedDict()
        self.queue_len = self.num_loads = self.num_hits = 0
        self.told: set[str] = set()
        self.memory = Memory(num_adapters)

    def take(self, adapter: str, prompt: int) -> None:
        self.num_loads += adapter not in self.adapters
        self.num_hits += (adapter, prompt) in self.prompts
        for kept, key, limit in (
            (self.adapters, adapter, self.limits[0]),
            (self.prompts, (adapter, prompt), self.limits[1]),
        ):
            kept[key] = None  # type: ignore[index]
            kept.move_to_end(key)  # type: ignore[arg-type]
            if len(kept) > limit:
                kept.popitem(last=False)
        self.queue_len += 1


def _simulate(is_ours: bool, seed: int = 3) -> tuple[int, int, int]:
    """(adapter loads, prompt hits, longest queue) of 6,000 calls of 24 tasks with 4 prompts each at 4 replicas of 8 adapters.

    Replicas tell what they have with a delay of 50 calls, as Serve's do with one of seconds.
    """
    draw = random.Random(seed)
    replicas, longest = [Replica(8, 12) for _ in range(4)], 0
    tasks = [f"task-{n}" for n in range(24)]
    weights = [1 / (n + 1) for n in range(24)]
    for number in range(6_000):
        adapter, prompt = draw.choices(tasks, weights)[0], draw.randrange(4)
        if number % 50 == 0:
            for one in replicas:
                one.told = set(one.adapters)
        if is_ours:
            blocks = [adapter.encode(), str(prompt).encode()]
            seen: list[Any] = [one.memory.look(one.queue_len, one.told, adapter, blocks) for one in replicas]
            drawn = [replicas[n] for n in choose(seen, 8, draw)[0]]
        else:
            pool = [one for one in replicas if adapter in one.told]
            fewest = min(len(one.told) for one in replicas)
            pool = pool or [one for one in replicas if len(one.told) == fewest]
            drawn = draw.sample(pool, min(2, len(pool)))
        chosen = min(drawn, key=lambda one: one.queue_len)
        chosen.take(adapter, prompt)
        if is_ours:
            chosen.memory.note(adapter, blocks)
        longest = max(longest, chosen.queue_len)
        for one in replicas:
            # Together 4 calls for every 3.6 that come.
            one.queue_len -= one.queue_len > 0 and draw.random() < 1 / 3.6
    return sum(one.num_loads for one in replicas), sum(one.num_hits for one in replicas), longest


def test_simulated_fewer_loads_and_more_prompt_hits_than_the_default() -> None:
    ours, default = _simulate(True), _simulate(False)
    print(f"simulated (loads, prompt hits, longest queue): ours {ours}, default {default}")
    assert ours[0] < default[0] and ours[1] > default[1]
