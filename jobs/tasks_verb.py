"""`understudy tasks [TASK_ID]`: its flags and what it prints. Knows nothing of how tasks are read (jobs/tasks.py does)."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.records import TaskSpec


def add_verb(verbs: Any) -> None:
    """Add `tasks` to the command line."""
    tasks = verbs.add_parser(
        "tasks",
        help="the tasks that were found, or one of them",
        examples=["understudy tasks store=store", "understudy tasks TASK_ID --examples", "understudy tasks --json"],
    )
    tasks.add_argument("words", nargs="*", metavar="TASK_ID | key=value", help="one task, and words such as store=...")
    tasks.add_argument("--examples", action="store_true", help="show redacted examples of a task; needs role curator")
    tasks.add_argument(
        "--restored", action="store_true", help="the same as it was said, where curate.redact.reversible kept that"
    )
    tasks.add_argument("--json", action="store_true", help="print JSON")
    tasks.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from cluster.access import require_role
    from cluster.store import Store
    from jobs.recipe import load_recipe
    from jobs.tasks import describe_task, list_tasks

    names = [word for word in options.words if "=" not in word]
    if len(names) > 1:
        raise ConfigError(
            f"tasks {' '.join(names)}: {len(names)} tasks; allowed: one; next: understudy tasks {names[0]}"
        )
    uri = load_recipe([word for word in options.words if "=" in word]).store
    require_role(uri, "viewer")
    store = Store(uri)
    if (options.examples or options.restored) and not names:
        raise ConfigError(
            "--examples: no task named; allowed: with one TASK_ID; next: understudy tasks TASK_ID --examples"
        )
    if names:
        with_examples = options.examples or options.restored
        page = describe_task(store, names[0], with_examples=with_examples, is_restored=options.restored)
        if options.json:
            print(json.dumps(page, indent=1, ensure_ascii=False))
            return
        print(_show_page(page))
        _show_arms(page["arms"])
        return
    tasks = list_tasks(store)
    print(json.dumps([t.model_dump(mode="json") for t in tasks], indent=1) if options.json else _show_table(tasks))


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


def _show_arms(arms: dict[str, Any] | None) -> None:
    if arms is None:
        return
    from jobs.tables import show_table

    for table in arms["tables"]:
        print(f"\n{table['caption']}:")
        show_table(table["header"], table["rows"], sys.stdout)
    for note in arms["notes"]:
        print(f"\n{note}")


def _show_slot(slot: dict[str, Any]) -> str:
    place = f"after {_printable(slot['after'])!r}" if slot["after"] else "at the beginning"
    return (
        f"{place}: {slot['num_distinct']} different in {slot['num_calls']} calls, "
        f"{slot['median_characters']} characters at the median"
    )


def _show_agreement(found: dict[str, Any] | None) -> str:
    if not found:
        return "no specialist was trained"
    told = f"{found['agreement']:.1%} (snapshot {found['snapshot']})"
    teacher = found.get("teacher")
    if not teacher:
        return told
    low, high = teacher["interval"]
    share = teacher["num_agreements"] / teacher["num_answered"]
    return f"{told}; the LLM with itself {share:.1%} of {teacher['num_answered']} ({low:.1%} to {high:.1%})"


def _printable(text: str) -> str:
    """Text from traffic must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
