"""`understudy tasks [TASK_ID]`: what tasks were found, and a page for each: volume, cost, template, neighbours, events.

Reads what the last discovery stored under tasks/. Metadata and the template (lines that every redacted train prompt
repeats) are for everybody who may read the store; examples need the role of a curator. Knows nothing of how tasks are
found.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from cluster.access import require_role
from cluster.errors import ConfigError, InputError
from cluster.records import TaskSpec
from cluster.signature import last_user_text
from cluster.store import Store
from jobs.recipe import load_recipe
from jobs.splits import load_usefulness
from jobs.validate import AGREEMENT_FILE
from training.discover import EVENTS_FOLDER, IDENTITY_FILE, TASKS_FOLDER
from training.identity import Identity, similarity
from training.replacing import restore_text
from training.snapshot import load_split, read_mapping
from training.usefulness import describe_usefulness

_NUM_NEIGHBOURS = 3
_NUM_EXAMPLES = 3
_MAX_SHOWN_CHARS = 400


def add_verb(verbs: Any) -> None:
    """Add `tasks` to the command line."""
    tasks = verbs.add_parser("tasks", help="the tasks that were found, or one of them")
    tasks.add_argument("words", nargs="*", metavar="TASK_ID | key=value", help="one task, and words such as store=...")
    tasks.add_argument("--examples", action="store_true", help="show redacted examples of a task; needs role curator")
    tasks.add_argument(
        "--restored", action="store_true", help="the same as it was said, where curate.redact.reversible kept that"
    )
    tasks.add_argument("--json", action="store_true", help="print JSON")
    tasks.set_defaults(run=_run)


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


def _run(options: argparse.Namespace) -> None:
    names = [word for word in options.words if "=" not in word]
    if len(names) > 1:
        raise ConfigError(
            f"tasks {' '.join(names)}: {len(names)} tasks; allowed: one; next: understudy tasks {names[0]}"
        )
    store = Store(load_recipe([word for word in options.words if "=" in word]).store)
    if (options.examples or options.restored) and not names:
        raise ConfigError(
            "--examples: no task named; allowed: with one TASK_ID; next: understudy tasks TASK_ID --examples"
        )
    if names:
        with_examples = options.examples or options.restored
        page = describe_task(store, names[0], with_examples=with_examples, is_restored=options.restored)
        print(json.dumps(page, indent=1, ensure_ascii=False) if options.json else _show_page(page))
        return
    tasks = list_tasks(store)
    print(json.dumps([t.model_dump(mode="json") for t in tasks], indent=1) if options.json else _show_table(tasks))


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


def _show_table(tasks: list[TaskSpec]) -> str:
    rows = [("task", "name", "kind", "calls", "share of calls", "share of cost", "topics")]
    rows += [
        (
            *(task.task_id, _printable(task.name), task.kind, str(task.num_calls)),
            *(f"{task.share_calls:.1%}", f"{task.share_cost:.1%}", str(len(task.topics) or "-")),
        )
        for task in tasks
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _show_page(page: dict[str, Any]) -> str:
    lines = [
        f"{page['task_id']}: {_printable(page['name'])}",
        f"{page['kind']}; {page['num_calls']} calls, {page['share_calls']:.1%} of all; {page['share_cost']:.1%} of cost",
        f"examples per split: {json.dumps(page['num_examples'])}; tools: {', '.join(page['tool_names']) or 'none'}",
        *([f"about: {_printable(page['description'])}"] if page["description"] else []),
        "validation agreement: " + _show_agreement(page["validation_agreement"]),
        *(f"parts: {line}" for line in page["usefulness"]),
        "template:",
        *(f"  {_printable(line)}" for line in page["template"]),
        "slots:",
        *(f"  {_show_slot(slot)}" for slot in page["slots"]),
        "neighbours:",
        *(f"  {n['task_id']} ({n['similarity']:.0%} of template text in common)" for n in page["neighbours"]),
        "events:",
        *(f"  {e['snapshot']}: {e['kind']} {' '.join(e['others'])} {e['detail']}".rstrip() for e in page["events"]),
    ]
    for example in page.get("examples", ()):
        lines += [f"user: {_printable(example['user'])}", f"answer: {_printable(example['answer'])}"]
    return "\n".join(lines)


def _show_slot(slot: dict[str, Any]) -> str:
    place = f"after {_printable(slot['after'])!r}" if slot["after"] else "at the beginning"
    return (
        f"{place}: {slot['num_distinct']} different in {slot['num_calls']} calls, "
        f"{slot['median_characters']} characters at the median"
    )


def _show_agreement(found: dict[str, Any] | None) -> str:
    return f"{found['agreement']:.1%} (snapshot {found['snapshot']})" if found else "no specialist was trained"


def _printable(text: str) -> str:
    """Text from traffic must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
