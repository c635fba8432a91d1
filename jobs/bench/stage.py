"""A store with keys and a release on stage, for benchmarks of serving: tasks by prompt, their adapters, their gates.

Nothing here is trained: adapters are folders with a name in them, and gates are made up, because what is measured is how
a gateway treats them. Where answers matter the engine of jobs/bench/stub_graph.py says which adapter it was.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from cluster import registry
from cluster.access import KEYS_FILE, ApiKeys, keys_folder
from cluster.prompts import PromptFormat
from cluster.records import Gate, Release, Specialist
from cluster.route_model import RouteModel
from cluster.signature import signature_of
from cluster.store import Store

BASE = "bases/stub"
FINGERPRINT = "stub-engine"
CLIENT = "bench"
_FORMAT = PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100)


def make_stage(folder: pathlib.Path) -> tuple[str, str]:
    """A new store with one key and, on stage, a release that knows one task; its address, and the key.

    The task has no specialist, so that no engine is started; a request of no task is routed as beside any other release.
    """
    folder.mkdir(parents=True)
    store = Store(str(folder / "store"))
    RouteModel({signature_of(task_request("triage", 0)): "triage"}, {}).save(store, "routes/unused")
    release = Release(
        specialists={},
        refused={"triage": "too few calls"},
        route_model="routes/unused",
        snapshot="none",
        created_ts=1.0,
    )
    registry.promote(store, registry.publish_release(store, release))
    return store.uri, make_key(store)


def make_key(store: Store) -> str:
    """A key of an agent."""
    keys = keys_folder(store.uri)
    assert keys is not None, f"{store.uri}: a local store"
    return ApiKeys(keys / KEYS_FILE).create(CLIENT, "agent")


def publish_stage(
    store: Store,
    name: str,
    tasks: Mapping[str, tuple[str, float, dict[str, Any]]],
    *,
    has_routes: bool = True,
    **served: Any,
) -> str:
    """Publish a release and promote it.

    Args:
        name: sets it apart from releases with the same tasks.
        tasks: for each task its adapter's store path, its threshold, and a request that is routed to it.
        served: of `_specialist`, where it is another engine than the stub.
        has_routes: whether its route model can be read; else one of its files is not what it was.

    Returns:
        The release's name.
    """
    routes = f"routes/{name}"
    for path in {served.get("base", BASE), *(adapter for adapter, _, _ in tasks.values())}:
        if not store.is_published(path):
            _publish_name(store, path)
    RouteModel({signature_of(request): task for task, (_, _, request) in tasks.items()}, {}).save(store, routes)
    if not has_routes:
        store.write_bytes(f"{routes}/route_model.json", b"{}")
    release = Release(
        specialists={
            task: _specialist(task, adapter, threshold, **served) for task, (adapter, threshold, _) in tasks.items()
        },
        refused={},
        route_model=routes,
        snapshot=name,
        created_ts=1.0,
    )
    sha = registry.publish_release(store, release)
    registry.promote(store, sha)
    return sha


def task_request(task: str, number: int, **extra: Any) -> dict[str, Any]:
    """A request that the route model of `publish_stage` knows by its system prompt."""
    messages = [
        {"role": "system", "content": f"Name the intent of the customer, as {task} does."},
        {"role": "user", "content": f"#{number}#"},
    ]
    return {"model": "scripted", "messages": messages, **extra}


def _publish_name(store: Store, path: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        (pathlib.Path(scratch) / "name").write_text(path)
        store.publish(path, pathlib.Path(scratch), {"kind": "bench"})


def _specialist(
    task: str,
    adapter: str,
    threshold: float,
    *,
    base: str = BASE,
    fingerprint: str = FINGERPRINT,
    prompt_format: PromptFormat = _FORMAT,
) -> Specialist:
    gate = Gate(
        reference="llm",
        population="none: made for a benchmark",
        epsilon=0.05,
        delta=0.05,
        threshold=threshold,
        num_calibration=100,
        num_accepted=80,
        num_disagreements=0,
        upper_bound=0.03,
        coverage=0.8,
        fingerprint=fingerprint,
    )
    return Specialist(
        task_id=task,
        sha="f" * 64,
        base=base,
        adapter=adapter,
        prompt_format=prompt_format.model_dump(mode="json"),
        gate=gate,
        report=f"reports/{task}",
        max_answer_tokens=16,
    )
