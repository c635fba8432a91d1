"""`understudy doctor`: its flags and what it prints. Knows nothing of what is looked at (jobs/doctor/ does)."""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.doctor.check import Check


def add_verb(verbs: Any, words: dict[str, Any]) -> None:
    """Add `doctor` to the verbs of the command line."""
    doctor = verbs.add_parser(
        "doctor",
        help="check machine, packages, Ray, engine, store, LLM and keys, and say what to do",
        sections=("store", "upstream", "capture"),
        examples=[
            "understudy doctor",
            "understudy doctor store=store upstream.0.base_url=https://api.openai.com/v1",
            "understudy doctor --address http://127.0.0.1:8265 --write store=/shared/store",
            "understudy doctor --json recipe=local",
        ],
    )
    doctor.add_argument("words", **words)
    doctor.add_argument(
        "--address", metavar="ADDRESS", help="also http://HOST:PORT of a cluster's dashboard, or HOST:PORT of its head"
    )
    doctor.add_argument("--write", action="store_true", help="try to write a small file to the store, and remove it")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    found = []
    for check in _checks(options):
        found.append(check)
        # As it goes: importing the engine alone takes seconds.
        print(_show(check), file=sys.stderr if options.json else sys.stdout, flush=True)
    counts = collections.Counter(check.status for check in found)
    if options.json:
        print(json.dumps({"counts": dict(counts), "checks": [check.model_dump() for check in found]}, indent=1))
    else:
        print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['failed']} failed")
    return 1 if counts["failed"] else 0


def _checks(options: argparse.Namespace) -> Iterator[Check]:
    """What is quick comes first."""
    from jobs.doctor.cluster import check_cluster
    from jobs.doctor.engine import check_engine
    from jobs.doctor.journal import check_journal
    from jobs.doctor.keys import check_keys
    from jobs.doctor.llm import check_llm
    from jobs.doctor.machine import check_machine
    from jobs.doctor.packages import check_packages
    from jobs.doctor.store import check_store
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.words)
    yield from check_machine(recipe)
    yield from check_packages()
    yield from check_store(recipe, may_write=options.write)
    yield from check_keys(recipe)
    yield from check_journal(recipe)
    yield from check_llm(recipe)
    yield from check_cluster(options.address)
    yield from check_engine(recipe)


def _show(check: Check) -> str:
    line = f"{check.status:<8}{check.area}: {check.name}: {check.found}"
    return f"{line}\n        next: {check.next}" if check.next else line
