"""A store with a task in every state: what the gateway's page is tested with."""

from __future__ import annotations

import time

from fakes import ROUTES, make_specialist

from cluster import registry
from cluster.conversions import ConversionProgress, RunProgress, write_conversion
from cluster.events import Cause
from cluster.records import Release, Rollout, Specialist, TaskSpec
from cluster.store import Store
from serving.evidence import Comparison, begin, count
from serving.steward import DEMOTED, STATE_FILE, State

CONTENT = "SECRET-SAID-BY-A-CLIENT"
"""Stands wherever the store has content; the page must never have it."""
NAMES = {
    "triage": "classify support tickets by urgency",
    "invoice": "extract the fields of an invoice",
    "refund": "decide on a refund",
    "summary": "summarise a conversation",
    "greeting": "answer a greeting",
    "search": "plan a search",
}
TASKS = {"triage": "live", "invoice": "canary", "refund": "shadow", "summary": "refused", "greeting": "demoted", "search": "new"}  # fmt: skip


def stage(store: Store) -> str:
    """Serve a release with every state, beside what the store has served; returns its name."""
    specialists = {task: _specialist(store, task) for task in ("triage", "invoice", "refund")}
    release = Release(
        specialists=specialists,
        refused={
            "summary": "too few calibration calls: needs 40 more examples; of 19 sessions not even all can certify epsilon 0.05",
            "greeting": f"{DEMOTED}31 of 200 audited conversations differ from the LLM, evidence 44.1 against at most 0.05",
        },
        route_model=ROUTES,
        snapshot="two",
        created_ts=1_700_000_000.0,
        rollout={"invoice": Rollout(stage="canary"), "refund": Rollout(stage="shadow")},
    )
    sha = registry.publish_release(store, release)
    registry.promote(store, sha, cause=Cause(kind="advance", by="steward", evidence=_change(specialists["invoice"])))
    for place, (task, name) in enumerate(NAMES.items()):
        store.write_json(f"tasks/{task}.json", _spec(task, name, 4_000 // (place + 1)).model_dump(mode="json"))
    store.write_json(
        "tasks/identity.json", {"snapshot": "two", "tasks": {task: {"template": [CONTENT]} for task in NAMES}}
    )
    evidence = {one.name: begin(one, release.stage_of(task), 0.05, 0.0) for task, one in specialists.items()}
    name = specialists["triage"].name
    seen = [Comparison(f"c{n}", n, f"s{n}", "audit", name, n % 60 != 0) for n in range(1, 241)]
    state = State(evidence=count(evidence, seen, now=1_000.0, idle_s=300.0))
    store.write_json(STATE_FILE, state.model_dump(mode="json"))
    write_conversion(store, conversion())
    return sha


def conversion(**changes: object) -> ConversionProgress:
    """One that fine-tunes two tasks now."""
    now = time.time()
    runs = (
        RunProgress(name="search", step=120, num_steps=400, loss=0.412, agreement=0.83, tokens_per_s=2_140.0),
        RunProgress(name="summary", step=0, num_steps=400),
    )
    seconds = {"curate": 12.4, "discover": 31.0, "select": 0.2, "base": 240.0}
    facts = {"started_ts": now - 400, "updated_ts": now, "state": "running", "stage": "finetune"}
    return ConversionProgress.model_validate({**facts, "seconds": seconds, "runs": runs, **changes})


def other_release(store: Store) -> str:
    """Publish one more release, which nothing serves."""
    served = registry.current(store)
    assert served is not None
    return registry.publish_release(store, registry.derive(*served, refuse={"refund": "a person said so"}))


def _specialist(store: Store, task: str) -> Specialist:
    path = f"reports/{task}.json"
    one = make_specialist().model_copy(update={"task_id": task, "report": path})
    arms = [
        {"name": name, "num_calls": 200, "coverage": coverage, "num_kept": kept, "num_disagreements": wrong,
         "disagreement": wrong / kept, "interval": [wrong / kept / 2, wrong / kept * 2], "said": CONTENT}
        for name, coverage, kept, wrong in (("base", 1.0, 200, 61), ("specialist", 1.0, 200, 17), ("specialist + gate", 0.81, 162, 3))
    ]  # fmt: skip
    curve = [{"threshold": 1 - n / 20, "coverage": n / 20, "disagreement": n * n / 4_000} for n in range(1, 21)]
    report = {"task_id": task, "gate": one.gate.model_dump(), "arms": arms, "curve": curve, "examples": [CONTENT]}
    store.write_json(path, report)
    return one


def _spec(task: str, name: str, num_calls: int) -> TaskSpec:
    return TaskSpec(
        task_id=task,
        name=name,
        signature="s",
        kind="label",
        reference="llm",
        num_calls=num_calls,
        share_calls=num_calls / 10_000,
        share_cost=num_calls / 12_000,
        num_examples={"train": num_calls},
        num_clients=7,
        num_sessions=num_calls // 2,
        static_lines=(CONTENT,),
        description=CONTENT,
    )


def _change(one: Specialist) -> dict[str, dict[str, object]]:
    facts = {"specialist": one.name, "from": "shadow", "to": "canary", "num_compared": 120, "num_disagreements": 1}
    return {one.task_id: facts}
