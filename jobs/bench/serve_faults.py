"""Every fault of a serving graph, under a client that looks at every answer: what it may see, and that each call is kept.

Faults of the upstream are asked of jobs/bench/fake_llm.py by the request; processes are killed with SIGKILL; the graph
is the real one on Ray Serve with a stub for its engine (jobs/bench/stub_graph.py). A specialist's fault must never show:
the LLM's answer comes instead. Where the LLM itself fails, the client must get the right status, or, once bytes of a
stream are out, an error within it; three of these shapes are litellm #40404's. Every call that ended at a living gateway
is captured once.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import pathlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow.compute as pc

from cluster.calls import read_call_columns
from cluster.errors import StoreError
from cluster.store import Store
from jobs.bench.core_gateway import core_command
from jobs.bench.fake_llm import answer_text
from jobs.bench.http_load import Reply, connect, http_request
from jobs.bench.processes import module, server
from jobs.bench.rollout import text_of
from jobs.bench.stage import make_key, make_stage, publish_stage, task_request
from jobs.bench.stub_graph import BROKEN, SLOW, stub_endpoint, stub_facts, stub_text
from serving.app import ServeArgs

Seen = Literal["answer", "error", "broken stream"]
UPSTREAM_FAULTS: dict[str, tuple[frozenset[int], frozenset[int]]] = {
    "hang": (frozenset({504}), frozenset({504})),
    "hang_mid": (frozenset(), frozenset({200})),
    "cut": (frozenset({502, 503}), frozenset({200})),
    "cut_first": (frozenset({502, 503}), frozenset({502, 503})),
    "empty": (frozenset(), frozenset({502, 503})),
    "malformed": (frozenset({502}), frozenset({200})),
    "unfinished": (frozenset(), frozenset({200})),
    "error_event": (frozenset(), frozenset({200})),
    "s429": (frozenset({429}), frozenset({429})),
    "s500": (frozenset({500, 502}), frozenset({500, 502})),
}
"""Fate of the request -> the statuses that are right where it is unary, and where it is streamed; none: not tried."""
_ENDS_OUT_OF_ORDER = frozenset({"hang_mid", "cut", "unfinished", "error_event"})
"""Streams that began: an error must be within them, and no [DONE] after half an answer that claims to be whole."""
_FLUSH_S = 1.0
_SETTLE_S = 4.0
_QUEUE_SIZE = 6
_NUM_TRIALS, _QUICK_TRIALS = 5, 1
_UPSTREAM = {"timeout_s": 2.0, "first_token_timeout_s": 1.5, "max_attempts": 1, "breaker_failures": 1_000}


class Trial(NamedTuple):
    """One request under a fault."""

    fault: str
    call_id: str | None
    wrong: str | None
    """What the client should not have seen."""


def measure_faults(say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Try every fault.

    Returns:
        `fault_trials`, `fault_client_errors` (answers that were not what the fault allows), `captured_exactly_once`, and
        what was found of each fault.
    """
    num = _QUICK_TRIALS if quick else _NUM_TRIALS
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch:
        folder = pathlib.Path(scratch)
        with server(module("jobs.bench.fake_llm"), folder / "llm.log") as (_, llm):
            apart = [_try_dead_upstream(folder / "dead", num), _try_store_away(folder / "away", llm)]
            store = Store(str(folder / "store"))
            key = make_key(store)
            _publish(store, "first", ("good", SLOW, BROKEN))
            args = {
                "store": store.uri,
                "upstream": [{"base_url": f"{llm}/v1", **_UPSTREAM}],
                "gateway": {"specialist_timeout_s": 1.0},
                "capture": {"flush_interval_s": _FLUSH_S},
            }
            with stub_endpoint(ServeArgs.model_validate(args)) as url:
                client = _Client(url, key)
                found = asyncio.run(_try_all(client, store, num, say))
    trials = [trial for one in (*apart, found) for trial in one.trials]
    is_exact = all(one.is_exact for one in (*apart, found))
    return {**summarize_trials(trials), "captured_exactly_once": is_exact, **found.facts}


class _Found(NamedTuple):
    trials: list[Trial]
    is_exact: bool
    facts: dict[str, Any]


class _Client:
    """Sends one request at a time on a connection of its own."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key
        self.num_sent = 0

    async def ask(self, request: Mapping[str, Any]) -> Reply:
        """The answer; one of status 0 where none came whole, so that a dropped connection is a trial that failed."""
        try:
            exchange = await connect(self.url)
        except OSError as error:
            return Reply(0, {}, type(error).__name__.encode(), 0.0, 0.0)
        self.num_sent += 1
        try:
            return await exchange.ask(http_request(self.url, json.dumps(request).encode(), self.key))
        except OSError as error:
            return Reply(0, {}, type(error).__name__.encode(), 0.0, 0.0)
        finally:
            exchange.close()

    async def leave(self, request: Mapping[str, Any], after_s: float | None = None) -> None:
        """Ask, and be gone before the answer is whole: after so many seconds, or once some of it is here."""
        exchange = await connect(self.url)
        self.num_sent += 1
        asking = asyncio.create_task(exchange.ask(http_request(self.url, json.dumps(request).encode(), self.key)))
        while after_s is None and not exchange.has_begun:
            await asyncio.sleep(0.001)
        await asyncio.sleep(after_s or 0.0)
        exchange.close()
        await asyncio.gather(asking, return_exceptions=True)


async def _try_all(client: _Client, store: Store, num: int, say: Callable[[str], object]) -> _Found:
    trials: list[Trial] = []
    steps = (_try_upstream, _try_specialists, _try_leaving, _try_engine_killed)
    for step in steps:
        trials += await step(client, num)
        say(f"{step.__name__}: {len(trials)} trials, {sum(one.wrong is not None for one in trials)} wrong")
    trials += await _try_missing_routes(client, store, num)
    await asyncio.sleep(_SETTLE_S)
    stored = collections.Counter(_stored(store))
    is_exact = is_captured_once(stored, (one.call_id for one in trials), client.num_sent)
    facts = {"num_sent": client.num_sent, "num_stored": sum(stored.values())}
    killed = await _try_gateway_killed(client, store, num)
    trials += killed.trials
    say(f"{len(trials)} trials, {sum(one.wrong is not None for one in trials)} wrong; exactly once: {is_exact}")
    return _Found(trials, is_exact and killed.is_exact, {**facts, **killed.facts})


async def _try_upstream(client: _Client, num: int) -> list[Trial]:
    trials = []
    for fate, allowed in UPSTREAM_FAULTS.items():
        for is_stream, statuses in zip((False, True), allowed, strict=True):
            for number in range(num if statuses else 0):
                request = task_request("nothing known", number, user=f"fate:{fate}", stream=is_stream)
                reply = await client.ask(request)
                name = f"upstream {fate}, {'stream' if is_stream else 'unary'}"
                trials.append(_trial(name, reply, wrong_of_upstream(reply, fate, statuses)))
    return trials


def wrong_of_upstream(reply: Reply, fate: str, statuses: Iterable[int]) -> str | None:
    """What is wrong with the answer to a request whose LLM failed; None where all is as it must be."""
    if reply.status not in statuses:
        return f"status {reply.status} instead of {sorted(statuses)}: {reply.body[:200]!r}"
    if reply.status != 200:
        error = json.loads(reply.body).get("error")
        return None if isinstance(error, dict) and error.get("message") else f"not OpenAI's shape: {reply.body[:200]!r}"
    has_error = b'"error"' in reply.body
    if fate in _ENDS_OUT_OF_ORDER and not has_error:
        return f"a stream that broke off says nothing of it: {reply.body[-200:]!r}"
    return None


async def _try_specialists(client: _Client, num: int) -> list[Trial]:
    """A good one's kept answer, and three whose trouble must not show: unsure, slow, with an adapter that does not load."""
    trials = []
    for is_stream in (False, True):
        for number in range(1, 2 * num, 2):
            for task, expected in (("good", "accept"), (SLOW, "fall_back"), (BROKEN, "llm")):
                reply = await client.ask(task_request(task, number, stream=is_stream))
                text = (
                    stub_text(_adapter("first", task), number) if expected == "accept" else answer_text(f"#{number}#")
                )
                wrong = wrong_of_answer(reply, text) or _wrong_route(reply, expected)
                trials.append(_trial(f"specialist {task}", reply, wrong))
            reply = await client.ask(task_request("good", number + 1, stream=is_stream))
            wrong = wrong_of_answer(reply, answer_text(f"#{number + 1}#")) or _wrong_route(reply, "escalate")
            trials.append(_trial("specialist unsure", reply, wrong))
    return trials


async def _try_leaving(client: _Client, num: int) -> list[Trial]:
    for number in range(num):
        # One that is gone before its request has been read was no call.
        await client.leave(task_request("nothing known", number, stream=True, user="fate:hang_mid"))
        await client.leave(task_request(SLOW, number), 0.5)
    return [Trial("client gone", None, None) for _ in range(2 * num)]


async def _try_engine_killed(client: _Client, num: int) -> list[Trial]:
    """Kill the engine's only replica while it answers, and go on asking until it is back."""
    trials = []
    for number in range(num):
        facts = await asyncio.to_thread(stub_facts)
        asking = [asyncio.create_task(client.ask(task_request(SLOW, one))) for one in range(3)]
        await asyncio.sleep(0.2)
        os.kill(facts["pid"], signal.SIGKILL)
        asking += [asyncio.create_task(client.ask(task_request("good", 1, stream=bool(one % 2)))) for one in range(4)]
        for task, marks in zip(asking, (0, 1, 2, 1, 1, 1, 1), strict=True):
            reply = await task
            kept = stub_text(_adapter("first", "good"), marks)
            wrong = wrong_of_answer(reply, answer_text(f"#{marks}#"), kept)
            trials.append(_trial("engine killed", reply, wrong))
        await _until_engine_is_back(client, number)
    return trials


async def _until_engine_is_back(client: _Client, number: int) -> None:
    for _ in range(900):
        reply = await client.ask(task_request("good", 2 * number + 1))
        if reply.headers.get("x-understudy-route") == "accept":
            return
        await asyncio.sleep(0.2)
    raise RuntimeError("the engine's replica did not come back in three minutes")


async def _try_missing_routes(client: _Client, store: Store, num: int) -> list[Trial]:
    """A release whose route model cannot be read is promoted: the one before goes on serving."""
    before = await client.ask(task_request("good", 1))
    release = before.headers.get("x-understudy-release")
    _publish(store, "second", ("good",), has_routes=False)
    await asyncio.sleep(2.5)
    trials = []
    for number in range(1, 2 * num, 2):
        reply = await client.ask(task_request("good", number))
        wrong = wrong_of_answer(reply, stub_text(_adapter("first", "good"), number))
        if reply.headers.get("x-understudy-release") != release:
            wrong = "another release is served"
        trials.append(_trial("route model missing", reply, wrong))
    return [_trial("route model missing", before, None), *trials]


async def _try_gateway_killed(client: _Client, store: Store, num: int) -> _Found:
    """Kill the gateway under load; what clients saw finished and the store lacks may have ended within a flush."""
    trials, ended, lost_ages, downs, is_once = [], {}, [], [], True
    for number in range(num):
        pid = await asyncio.to_thread(_gateway_pid)
        stop = time.perf_counter() + 2.5

        async def ask_on(first: int, stop: float = stop) -> None:
            while time.perf_counter() < stop:
                reply = await client.ask(task_request("nothing known", first))
                if not reply.status:
                    # Who is connected to a gateway that is killed is cut off, and nobody listens until it is back.
                    await asyncio.sleep(0.05)
                    continue
                wrong = None if reply.status >= 500 else wrong_of_answer(reply, answer_text(f"#{first}#"))
                trials.append(_trial("gateway killed", reply, wrong))
                ended[reply.headers.get("x-understudy-call-id", "")] = time.perf_counter()

        asking = [asyncio.create_task(ask_on(number * 10 + one)) for one in range(4)]
        await asyncio.sleep(1.7)
        os.kill(pid, signal.SIGKILL)
        killed_at = time.perf_counter()
        await asyncio.gather(*asking)
        downs.append(await _until_gateway_is_back(client, killed_at))
        await asyncio.sleep(_SETTLE_S)
        stored = collections.Counter(_stored(store))
        is_once = is_once and all(number == 1 for number in stored.values())
        lost_ages += [killed_at - at for call_id, at in ended.items() if call_id not in stored]
        ended.clear()
    facts = {
        "gateway_down_s": [round(one, 1) for one in downs],
        "gateway_lost_calls": len(lost_ages),
        "gateway_oldest_lost_s": round(max(lost_ages, default=0.0), 2),
    }
    return _Found(trials, is_once, facts)


async def _until_gateway_is_back(client: _Client, since: float) -> float:
    for _ in range(600):
        reply = await client.ask(task_request("nothing known", 1))
        if reply.status == 200:
            return time.perf_counter() - since
        await asyncio.sleep(0.2)
    raise RuntimeError("the gateway did not come back in two minutes")


def _try_dead_upstream(folder: pathlib.Path, num: int) -> _Found:
    """A gateway whose only LLM refuses connections: 503 for all, each captured once."""
    address, key = make_stage(folder)
    with server(core_command(address, "http://127.0.0.1:9"), folder / "core.log") as (_, url):
        client, trials = _Client(url, key), []
        for number in range(2 * num):
            reply = asyncio.run(client.ask(task_request("nothing known", number, stream=bool(number % 2))))
            trials.append(_trial("upstream refuses", reply, wrong_of_upstream(reply, "refuse", {503})))
        time.sleep(_SETTLE_S)
        stored = collections.Counter(_stored(Store(address)))
    return _Found(trials, is_captured_once(stored, (one.call_id for one in trials), client.num_sent), {})


def _try_store_away(folder: pathlib.Path, llm: str) -> _Found:
    """A store that takes no calls: all are answered; what the queue holds is written once it is back, the rest dropped."""
    address, key = make_stage(folder)
    in_the_way = pathlib.Path(address) / "calls"
    in_the_way.write_text("a file where calls would go")
    capture = {"flush_interval_s": 0.2, "queue_size": _QUEUE_SIZE}
    with server(core_command(address, llm, capture=capture), folder / "core.log") as (_, url):
        client, trials = _Client(url, key), []
        for number in range(2 * _QUEUE_SIZE):
            reply = asyncio.run(client.ask(task_request("nothing known", number, stream=bool(number % 2))))
            trials.append(_trial("store away", reply, wrong_of_answer(reply, answer_text(f"#{number}#"))))
        in_the_way.unlink()
        time.sleep(_SETTLE_S)
        stored = collections.Counter(_stored(Store(address)))
    return _Found(trials, is_captured_once(stored, (one.call_id for one in trials[:_QUEUE_SIZE]), _QUEUE_SIZE), {})


def wrong_of_answer(reply: Reply, *texts: str) -> str | None:
    """What is wrong with an answer that must be one of `texts`; None where nothing is."""
    if reply.status != 200:
        return f"status {reply.status}: {reply.body[:200]!r}"
    said = text_of(reply)
    return None if said in texts else f"{said!r} instead of {' or '.join(map(repr, texts))}"


def is_captured_once(stored: Mapping[str, int], call_ids: Iterable[str | None], num_sent: int) -> bool:
    """Whether every call that a client knows by its id is stored once, and as many calls as were sent."""
    known = [one for one in call_ids if one]
    return all(stored.get(one) == 1 for one in known) and sum(stored.values()) == num_sent


def summarize_trials(trials: Sequence[Trial]) -> dict[str, Any]:
    """Counts, and by fault how many were tried, how many went wrong, and the first that did."""
    by_fault: dict[str, list[Trial]] = {}
    for trial in trials:
        by_fault.setdefault(trial.fault, []).append(trial)
    wrong = {name: [one.wrong for one in found if one.wrong] for name, found in by_fault.items()}
    return {
        "fault_trials": len(trials),
        "fault_client_errors": sum(map(len, wrong.values())),
        "faults": {
            name: {"trials": len(found), "wrong": len(wrong[name]), "first": next(iter(wrong[name]), None)}
            for name, found in by_fault.items()
        },
    }


def _trial(fault: str, reply: Reply, wrong: str | None) -> Trial:
    return Trial(fault, reply.headers.get("x-understudy-call-id"), wrong)


def _wrong_route(reply: Reply, expected: str) -> str | None:
    route = reply.headers.get("x-understudy-route")
    return None if route == expected else f"route {route} instead of {expected}"


def _adapter(release: str, task: str) -> str:
    return f"adapters/t50-{task}-{release}"


def _publish(store: Store, name: str, tasks: Sequence[str], *, has_routes: bool = True) -> None:
    served = {task: (_adapter(name, task), 0.5, task_request(task, 0)) for task in tasks}
    publish_stage(store, name, served, has_routes=has_routes)


def _stored(store: Store) -> list[str]:
    """Ids of clients' calls; what the gateway asks the LLM again of some accepted ones is no client's."""
    try:
        found = read_call_columns(store, ["call_id", "audit_of"])
    except StoreError:
        return []
    return found.filter(pc.is_null(found["audit_of"]))["call_id"].to_pylist()


def _gateway_pid() -> int:
    """Process of the one gateway replica."""
    import psutil

    found = [one for one in psutil.process_iter(["name", "cmdline"]) if _is_gateway(one.info["cmdline"])]
    ours = [one.pid for one in found if os.getpid() in {parent.pid for parent in one.parents()}]
    assert len(ours) == 1, f"gateway processes: {ours}"
    return ours[0]


def _is_gateway(command: Sequence[str] | None) -> bool:
    return bool(command) and "gateway" in " ".join(command) and command[0].startswith("ray::")


if __name__ == "__main__":
    import sys

    found = measure_faults(lambda text: print(text, file=sys.stderr, flush=True), "--quick" in sys.argv)
    print(json.dumps(found, indent=1))
