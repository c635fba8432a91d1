"""Where a specialist's call goes: by plain values, and simulated beside Serve's default on a Zipf stream of tasks."""

from __future__ import annotations

import collections
import heapq
import itertools
import random
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.replica_choice import GIVE_UP, LOAD, Candidate, Memory, choose, costs, prompt_blocks

CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(0, 20), st.booleans(), st.sampled_from((0.0, 0.5, 1.0, 1.5)), st.integers(0, 5)),
    min_size=1,
    max_size=6,
)


@given(CANDIDATES, st.randoms())
def test_every_candidate_is_in_one_rank_and_the_first_is_of_the_cheapest(
    candidates: list[Candidate], draw: random.Random
) -> None:
    ranks = choose(candidates, 5, draw)
    assert sorted(n for rank in ranks for n in rank) == list(range(len(candidates))) and 1 <= len(ranks[0]) <= 2
    cost = costs(candidates, 5)
    assert {cost[n] for n in ranks[0]} == {min(cost)}
    assert [cost[n] for rank in ranks[1:] for n in rank] == sorted(cost[n] for rank in ranks[1:] for n in rank)


def test_a_call_waits_for_its_adapter_less_long_where_a_copy_pushes_no_other_one_out() -> None:
    """With 8 calls in flight at most, as many as a bound of 8 lets wait, a Zipf stream's first task kept one replica idle."""

    def taken(busy: int, fill: float) -> int:
        return choose([Candidate(busy, True, 1.0, 0), Candidate(0, False, fill, 0)], 0, random.Random(0))[0][0]

    assert [taken(busy, 0.5) for busy in (3, 4)] == [0, 1]
    assert [taken(busy, 1.0) for busy in (8, 10)] == [0, 1] and LOAD + GIVE_UP == 8
    lacking = [Candidate(0, False, fill, 0) for fill in (0.5, 0.25, 1.0)]
    assert choose(lacking, 0, random.Random(0)) == [[1], [0, 2]], "the emptiest one loads it"


def test_who_knows_more_of_a_prompt_is_taken_unless_it_is_busier_by_more_than_that_is_worth() -> None:
    def taken(busy: int, shared: int) -> int:
        return choose([Candidate(busy, True, 1.0, shared), Candidate(0, True, 1.0, 0)], 4, random.Random(0))[0][0]

    assert [taken(busy, 4) for busy in (0, 1, 3)] == [0, 0, 1] and [taken(busy, 1) for busy in (0, 1)] == [0, 1]


def test_no_candidate_no_rank() -> None:
    assert choose([], 0, random.Random(1)) == []


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
    assert memory.look(0, set(), "b", [b"1"]) == Candidate(0, False, 1.0, 1)
    assert memory.look(3, {"b"}, "b", [b"1", b"2", b"3"]) == Candidate(3, True, 1.5, 2)
    assert memory.look(0, set(), "d", [b"1"]).num_shared == 0


def test_a_call_for_no_adapter_goes_to_any_replica_however_many_adapters_it_has_and_to_where_its_prompt_was() -> None:
    """Else every one of them, such as the question for its facts, would go to the replica with the fewest adapters."""
    full, empty = Memory(2), Memory(2)
    full.note("a", [])
    seen = [full.look(0, {"b"}, "", []), empty.look(0, set(), "", [])]
    assert {rank[0] for rank in (choose(seen, 0, random.Random(seed))[0] for seed in range(20))} == {0, 1}
    empty.note("", [b"1"])
    assert choose([one.look(0, set(), "", [b"1", b"2"]) for one in (full, empty)], 2, random.Random(0)) == [[1], [0]]
    assert empty.look(0, set(), "a", []).fill == 0, "the base is no adapter"


class Replica:
    """Simulated: steps through its batch, a token of each call a step; adapters and prompts kept by recency."""

    def __init__(self, room: int) -> None:
        self.memory, self.told = Memory(room), set[str]()
        self.adapters: collections.OrderedDict[str, None] = collections.OrderedDict()
        self.prompts: collections.OrderedDict[tuple[str, int], None] = collections.OrderedDict()
        self.waiting: list[list[Any]] = []
        self.batch: list[list[Any]] = []
        self.room, self.is_busy, self.num_loads, self.num_hits = room, False, 0, 0

    @property
    def queue_len(self) -> int:
        return len(self.waiting) + len(self.batch)

    def step_s(self, load_s: float) -> float:
        """Take in what waits; how long the step takes."""
        seconds = 0.0
        for adapter, prompt, *_ in self.waiting:
            self.num_loads += adapter not in self.adapters
            self.num_hits += (adapter, prompt) in self.prompts
            seconds += load_s * (adapter not in self.adapters) + 0.03 * ((adapter, prompt) not in self.prompts)
            for kept, key, limit in ((self.adapters, adapter, self.room), (self.prompts, (adapter, prompt), 12)):
                kept[key] = None  # type: ignore[index]
                kept.move_to_end(key)  # type: ignore[arg-type]
                if len(kept) > limit:
                    kept.popitem(last=False)
        self.batch, self.waiting = self.batch + self.waiting, []
        return seconds + 0.01 + 0.004 * len(self.batch)


class Simulated(NamedTuple):
    """Calls a second, adapter loads and prompt hits."""

    rate: float
    loads: int
    hits: int


def simulate(
    is_ours: bool, num_adapters: int, num_replicas: int, spread: str, clients: int, load_s: float = 0.03
) -> Simulated:
    """1,200 calls of clients that ask without a pause, 4 prompts for each adapter; replicas have room for 8 adapters.

    Replicas tell what they have 0.3 s later, as Serve's do.
    """
    draw, replicas = random.Random(1), [Replica(8) for _ in range(num_replicas)]
    names = [f"task-{n}" for n in range(num_adapters)]
    weights = [1 / (n + 1) if spread == "zipf" else 1.0 for n in range(num_adapters)]
    events: list[tuple[float, int, Replica, set[str] | None]] = []
    order, left, now = itertools.count(), iter(range(1_200)), 0.0

    def ask() -> None:
        if next(left, None) is None:
            return
        adapter, prompt = draw.choices(names, weights)[0], draw.randrange(4)
        blocks = [adapter.encode(), str(prompt).encode()]
        if is_ours:
            seen = [one.memory.look(one.queue_len, one.told, adapter, blocks) for one in replicas]
            drawn = [replicas[n] for n in choose(seen, len(blocks), draw)[0]]
        else:
            fewest = min(len(one.told) for one in replicas)
            pool = [one for one in replicas if adapter in one.told]
            pool = pool or [one for one in replicas if len(one.told) == fewest]
            drawn = draw.sample(pool, min(2, len(pool)))
        chosen = min(drawn, key=lambda one: one.queue_len)
        chosen.memory.note(adapter, blocks)
        chosen.waiting.append([adapter, prompt, 16])
        if not chosen.is_busy:
            begin(chosen)

    def begin(one: Replica) -> None:
        one.is_busy = one.queue_len > 0
        if one.is_busy:
            heapq.heappush(events, (now + one.step_s(load_s), next(order), one, None))
            heapq.heappush(events, (now + 0.3, next(order), one, set(one.adapters)))

    for _ in range(clients):
        ask()
    last = 0.0
    while events:
        now, _, one, told = heapq.heappop(events)
        if told is not None:
            one.told = told
            continue
        last = now
        for call in one.batch:
            call[2] -= 1
        num_done = sum(call[2] == 0 for call in one.batch)
        one.batch = [call for call in one.batch if call[2]]
        for _ in range(num_done):
            ask()
        begin(one)
    return Simulated(1_200 / last, sum(one.num_loads for one in replicas), sum(one.num_hits for one in replicas))


@pytest.mark.parametrize("spread", ["uniform", "zipf"])
@pytest.mark.parametrize(
    ("num_adapters", "num_replicas", "clients"), [(12, 2, 8), (16, 2, 8), (24, 2, 16), (24, 4, 32)]
)
def test_simulated_more_calls_a_second_than_under_the_default(
    num_adapters: int, num_replicas: int, clients: int, spread: str
) -> None:
    """A bound of 8 calls, by which a replica might be busier than another, made it a tenth fewer with 12 adapters, Zipf."""
    ours, default = (simulate(one, num_adapters, num_replicas, spread, clients) for one in (True, False))
    print(
        f"simulated: {num_adapters} adapters, {num_replicas} replicas, {spread}, {clients}: {ours}, default {default}"
    )
    assert ours.rate > default.rate
