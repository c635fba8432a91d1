"""What tasks were found, and a page for each: volume, cost, template, neighbours, events (`understudy tasks [TASK_ID]`).

Reads what the last discovery stored under tasks/. Metadata and the template (lines that every redacted train prompt
repeats) are for everybody who may read the store; examples need the role of a curator. Knows nothing of how tasks are
found.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.access import require_role
from cluster.errors import InputError
from cluster.records import TaskSpec
from cluster.signature import last_user_text
from cluster.store import Store
from jobs.splits import load_usefulness
from jobs.validate import AGREEMENT_FILE
from training.arm_tables import notes_of, tables_of
from training.discover import EVENTS_FOLDER, IDENTITY_FILE, TASKS_FOLDER
from training.evaluation import Evaluation
from training.identity import Identity, similarity
from training.replacing import restore_text
from training.snapshot import load_split, read_mapping
from training.usefulness import describe_usefulness
from training.worth import Rates, weigh

_NUM_NEIGHBOURS = 3
_NUM_EXAMPLES = 3
_MAX_SHOWN_CHARS = 400


def list_tasks(store: Store) -> list[TaskSpec]:
    """Tasks of the last discovery, most calls first.

    Raises:
        InputError: no discovery was saved here.
    """
    specs = [TaskSpec.model_validate(store.read_json(f"{TASKS_FOLDER}/{name}.json")) for name in _saved(store)["tasks"]]
    return sorted(specs, key=lambda task: (-task.num_calls, task.task_id))


def describe_task(
    store: Store, task_id: str, *, with_examples: bool = False, is_restored: bool = False
) -> dict[str, Any]:
    """One task's page as JSON.

    Args:
        is_restored: surrogates in the examples give way to what they stand for.

    Raises:
        InputError: no such task, or nothing was kept that examples could be restored with.
        ConfigError: examples are asked for and this person is no curator.
    """
    saved = _saved(store)
    identities = {name: Identity.model_validate(value) for name, value in saved["tasks"].items()}
    if task_id not in identities:
        raise InputError(f"task {task_id}: not found; allowed: {', '.join(sorted(identities))}; next: understudy tasks")
    page = store.read_json(f"{TASKS_FOLDER}/{task_id}.json")
    del page["static_lines"]
    page["template"] = list(identities[task_id].template)
    page["slots"] = [slot.model_dump() for slot in identities[task_id].slots]
    page["neighbours"] = _neighbours(identities, task_id)
    page["events"] = events_of(store, task_id)
    page["validation_agreement"] = _agreement_of(store, task_id)
    page["arms"] = _arms_of(store, page["validation_agreement"])
    page["usefulness"] = [
        describe_usefulness(one) for one in load_usefulness(store).values() if task_id in one.task_ids
    ]
    if with_examples:
        require_role(store.uri, "curator")
        page["examples"] = _examples(store, saved["snapshot"], task_id, is_restored)
    return page


def events_of(store: Store, task_id: str) -> list[dict[str, Any]]:
    """What happened to a task from run to run, with the snapshot of each."""
    logs = (store.read_json(path) for path in store.list(EVENTS_FOLDER, ".json"))
    found = [{"snapshot": log["snapshot"], **event} for log in logs for event in log["events"]]
    return [event for event in found if task_id == event["task_id"] or task_id in event["others"]]


def _agreement_of(store: Store, task_id: str) -> dict[str, Any] | None:
    """{agreement, snapshot} of the task's last specialist on validation; None before there was one."""
    return store.read_json(AGREEMENT_FILE).get(task_id) if store.exists(AGREEMENT_FILE) else None


def _arms_of(store: Store, found: dict[str, Any] | None) -> dict[str, Any] | None:
    """{tables, notes} of the task's last specialist; None before its report had them."""
    if not found or "report" not in found or not store.exists(found["report"]):
        return None
    evaluation = Evaluation.model_validate(store.read_json(found["report"]))
    worth = weigh(evaluation, Rates.model_validate(found["rates"]), found["margin"])
    tables = [one._asdict() for one in tables_of(evaluation, worth)]
    return {"tables": tables, "notes": notes_of(worth) if worth else []}


def _saved(store: Store) -> dict[str, Any]:
    if not store.exists(IDENTITY_FILE):
        raise InputError(f"store {store.uri}: no tasks yet; next: understudy convert store={store.uri}")
    return store.read_json(IDENTITY_FILE)


def _neighbours(identities: dict[str, Identity], task_id: str) -> list[dict[str, Any]]:
    own = identities[task_id]
    likeness = {name: similarity(own.lines, other.lines) for name, other in identities.items() if name != task_id}
    nearest = sorted((name for name, value in likeness.items() if value > 0), key=lambda name: (-likeness[name], name))
    return [{"task_id": name, "similarity": round(likeness[name], 3)} for name in nearest[:_NUM_NEIGHBOURS]]


def _examples(store: Store, snapshot: str, task_id: str, is_restored: bool) -> list[dict[str, str]]:
    """Train examples, redacted or as they were said: what the user said last, and the answer."""
    mapping = read_mapping(store, snapshot) if is_restored else {}
    if is_restored and not mapping:
        raise InputError(
            f"--restored: snapshot {snapshot} keeps nothing that surrogates stand for; allowed: one curated with "
            "curate.redact.reversible=true; next: understudy calls show CALL_ID"
        )
    assigned = store.read_table(f"{TASKS_FOLDER}/assignment-{snapshot}.parquet").to_pydict()
    own = {e for e, task in zip(assigned["example_id"], assigned["task_id"], strict=True) if task == task_id}
    chosen = [e for e in load_split(store, snapshot, "train", as_served=False) if e.example_id in own][:_NUM_EXAMPLES]
    rows = []
    for example in chosen:
        said = {"user": last_user_text(example.request), "answer": json.dumps(example.target)}
        made = mapping.get(example.session_id, {})
        rows.append({name: restore_text(text, made)[:_MAX_SHOWN_CHARS] for name, text in said.items()})
    return rows
