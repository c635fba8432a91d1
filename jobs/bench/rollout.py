"""Thousands of requests while releases are promoted and rolled back under them: none may fail, none may mix two releases.

The graph is the real one on Ray Serve, its engine a stub (jobs/bench/stub_graph.py) that has room for the adapters of two
releases and loads the others. Every release routes the same prompts to tasks of its own names, with adapters and a
threshold of its own, and half the answers are below it: so the headers and the text of one answer tell whether router,
adapter and threshold came from the release that the answer names.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster import registry
from cluster.sse import SseReader
from cluster.store import Store
from jobs.bench.fake_llm import answer_text
from jobs.bench.http_load import Reply, Turn, http_request, load, spread_ms
from jobs.bench.processes import module, server
from jobs.bench.stage import make_key, publish_stage, task_request
from jobs.bench.stub_graph import stub_confidence, stub_endpoint, stub_facts, stub_text
from serving.app import ServeArgs
from serving.reassembly import reassemble

KINDS = ("orders", "refunds", "unknown")
"""Of prompts; no release knows the last."""
RELEASES = {"a": 30, "b": 50, "c": 70, "d": 90}
"""Threshold of each, in hundredths."""
NUM_REQUESTS, NUM_QUICK = 10_000, 1_000
_CONCURRENCY = 8
_NUM_DISTINCT = 120
_CHANGE_INTERVAL_S = 2.5
"""A gateway polls once a second, so that every change is served for a while."""
_MAX_SECONDS, _QUICK_SECONDS = 280.0, 40.0


def measure_rollout(say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Send the requests while releases change.

    Returns:
        `rollout_requests`, `rollout_failed` (no answer, or an error) and `rollout_mixed` (an answer that no one release
        explains), what was changed meanwhile, and how long answers took.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch:
        folder = pathlib.Path(scratch)
        store = Store(str(folder / "store"))
        key = make_key(store)
        names = {_publish(store, name): name for name in RELEASES}
        with server(module("jobs.bench.fake_llm"), folder / "llm.log") as (_, llm):
            args = {"store": store.uri, "upstream": [{"base_url": f"{llm}/v1"}], "specialists": {"max_adapters": 4}}
            with stub_endpoint(ServeArgs.model_validate(args)) as url:
                say(f"{url}: serving")
                return asyncio.run(_run(store, url, key, names, quick)) | {"engine": "stub", **stub_facts()}


async def _run(store: Store, url: str, key: str, names: Mapping[str, str], quick: bool) -> dict[str, Any]:
    seen: dict[str, int] = {}
    mixed: list[str] = []

    def checked(number: int, reply: Reply) -> str | None:
        if reply.status != 200:
            return f"status {reply.status}: {reply.body[:200]!r}"
        release = reply.headers.get("x-understudy-release", "")
        seen[release] = seen.get(release, 0) + 1
        wrong = what_is_mixed(number, reply, names.get(release))
        if wrong:
            mixed.append(wrong)
        return None

    requests = [http_request(url, json.dumps(request_of(number)).encode(), key) for number in range(_NUM_DISTINCT)]
    changing = asyncio.create_task(_change_releases(store, list(names)))
    turn: Turn = await load(
        url,
        requests,
        checked,
        concurrency=_CONCURRENCY,
        max_requests=NUM_QUICK if quick else NUM_REQUESTS,
        max_seconds=_QUICK_SECONDS if quick else _MAX_SECONDS,
    )
    changing.cancel()
    changes = (await asyncio.gather(changing, return_exceptions=True))[0]
    return {
        "rollout_requests": len(turn.whole_ms) + sum("Error" in one for one in turn.errors),
        "rollout_failed": len(turn.errors),
        "rollout_mixed": len(mixed),
        "first_failure": next(iter([*turn.errors, *mixed]), None),
        "changes": changes if isinstance(changes, dict) else repr(changes),
        "answers_by_release": {names.get(sha, sha): count for sha, count in seen.items()},
        "seconds": round(turn.seconds, 1),
        **spread_ms(turn.whole_ms),
    }


async def _change_releases(store: Store, shas: Sequence[str]) -> dict[str, int]:
    """Promote and roll back in turn until cancelled; returns how often."""
    done = {"promoted": 0, "rolled_back": 0}
    try:
        while True:
            for step in range(3 * len(shas)):
                await asyncio.sleep(_CHANGE_INTERVAL_S)
                if step % 3 == 2:
                    await asyncio.to_thread(registry.roll_back, store)
                    done["rolled_back"] += 1
                else:
                    await asyncio.to_thread(registry.promote, store, shas[(step - step // 3) % len(shas)])
                    done["promoted"] += 1
    except asyncio.CancelledError:
        return done


def request_of(number: int) -> dict[str, Any]:
    """The request of that number: its kind by thirds, half of them streamed, odd ones with a confident answer."""
    return task_request(KINDS[number % 3], number, **({"stream": True} if number // 3 % 2 else {}))


def what_is_mixed(number: int, reply: Reply, release: str | None) -> str | None:
    """How an answer to request `number` differs from what one release gives; None where it does not.

    Args:
        release: the name of the release that the answer names; None where that is none of ours.
    """
    if release is None:
        return f"request {number}: names a release that was never promoted"
    kind = KINDS[number % 3]
    expected: dict[str, str | None] = dict.fromkeys(("task", "confidence"))
    if kind == "unknown":
        expected["route"], text = "llm", answer_text(f"#{number}#")
    else:
        adapter = adapter_of(release, kind)
        is_kept = number % 2 == 1
        expected |= {"task": f"{kind}-{release}", "confidence": f"{stub_confidence(adapter, number):.6f}"}
        expected["route"] = "accept" if is_kept else "escalate"
        text = stub_text(adapter, number) if is_kept else answer_text(f"#{number}#")
    found = {name: reply.headers.get(f"x-understudy-{name}") for name in expected}
    if found != expected:
        return f"request {number}, release {release}: {found} instead of {expected}"
    said = text_of(reply)
    return None if said == text else f"request {number}, release {release}: {said!r} instead of {text!r}"


def text_of(reply: Reply) -> str | None:
    """What the assistant said, in one piece or streamed."""
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        reader = SseReader()
        body = reassemble([*reader.feed(reply.body), *reader.end()])
    else:
        body = json.loads(reply.body)
    return body["choices"][0]["message"]["content"] if body and body.get("choices") else None


def adapter_of(release: str, kind: str) -> str:
    """Store path of the adapter that a release has for a kind of prompt."""
    return f"adapters/t{RELEASES[release]}-{kind}-{release}"


def _publish(store: Store, release: str) -> str:
    tasks = {
        f"{kind}-{release}": (adapter_of(release, kind), RELEASES[release] / 100, task_request(kind, 0))
        for kind in KINDS[:2]
    }
    return publish_stage(store, release, tasks)


if __name__ == "__main__":
    import sys

    began = time.perf_counter()
    found = measure_rollout(lambda text: print(text, file=sys.stderr, flush=True), "--quick" in sys.argv)
    print(json.dumps(found | {"bench_seconds": round(time.perf_counter() - began)}, indent=1))
