"""`understudy calls`: list, show, count and cost of the stored calls, and --sql over their metadata.

    understudy calls list --agent desk --since 2026-01-01
    understudy calls cost --by task
    understudy calls show CALL_ID
    understudy calls --sql "SELECT day, sum(cost_usd) FROM calls GROUP BY day ORDER BY day"

Knows nothing of how the questions are answered (jobs/calls.py does).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from cluster.errors import InputError

if TYPE_CHECKING:
    from jobs.calls import Answer

ACTIONS = ("list", "show", "count", "cost")
GROUPS = ("task", "agent", "day", "model", "served_by", "client", "status")
DEFAULT_ROWS = 20
DEFAULT_GROUPS = 50
DEFAULT_SQL_ROWS = 1_000
_FILTERS = ("agent", "task", "day", "since", "until", "status", "served_by", "client", "session")


def add_verb(verbs: Any) -> None:
    """Add `calls` to the verbs of the command line."""
    verb = verbs.add_parser(
        "calls",
        help="list, count, price and show the stored calls",
        examples=[
            "understudy calls list --agent desk --since 2026-01-01",
            "understudy calls cost --by task --json",
            "understudy calls show CALL_ID",
            'understudy calls --sql "SELECT day, sum(cost_usd) FROM calls GROUP BY day ORDER BY day"',
        ],
    )
    verb.add_argument(
        "words", nargs="*", metavar="WORD", help="list, show CALL_ID (curators), count or cost; and key=value"
    )
    verb.add_argument("--by", choices=GROUPS, default="agent", help="what count and cost group by (default agent)")
    verb.add_argument("--sql", metavar="SELECT", help="one SELECT over the table calls: metadata, never content")
    verb.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"rows ({DEFAULT_ROWS} of list, {DEFAULT_GROUPS} of count and cost, {DEFAULT_SQL_ROWS} of --sql)",
    )
    verb.add_argument("--json", action="store_true", help="rows as JSON")
    verb.add_argument("--agent", metavar="NAME")
    verb.add_argument("--task", metavar="TASK_ID")
    verb.add_argument("--day", metavar="YYYY-MM-DD", help="UTC")
    verb.add_argument("--since", metavar="TIME", help="date or ISO 8601 time, UTC, included")
    verb.add_argument("--until", metavar="TIME", help="as --since, itself left out")
    verb.add_argument("--status", metavar="STATUS", help="a number, ok or failed")
    verb.add_argument("--served-by", choices=("llm", "gold", "specialist"))
    verb.add_argument("--client", metavar="NAME", help="the client's own name, not its pseudonym")
    verb.add_argument("--session", metavar="NAME", help="a session of --client")
    verb.add_argument("--audits", action="store_true", help="also the background audits, which are no client traffic")
    verb.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from cluster.access import require_role
    from cluster.store import Store
    from jobs import calls
    from jobs.recipe import load_recipe

    words = [word for word in options.words if "=" not in word]
    action, call_id = _action(words, options.sql)
    if options.limit is not None and not 1 <= options.limit <= 1_000_000:
        raise InputError(f"--limit {options.limit}: out of range; allowed: 1 to 1000000; next: --limit 100")
    uri = load_recipe([word for word in options.words if "=" in word]).store
    require_role(uri, "viewer")
    store = Store(uri)
    if action == "show":
        print(json.dumps(calls.show_call(store, call_id).model_dump(mode="json"), indent=1, ensure_ascii=True))
        return
    filters = calls.Filters(**{name: getattr(options, name) for name in _FILTERS}, audits=options.audits)
    if action == "sql":
        if filters != calls.Filters():
            raise InputError("--sql: takes no filter; allowed: a WHERE of its own; next: leave the filters out")
        answer = calls.query_calls(store, options.sql, options.limit or DEFAULT_SQL_ROWS)
    elif action == "list":
        answer = calls.list_calls(store, filters, options.limit or DEFAULT_ROWS)
    else:
        ask = calls.count_calls if action == "count" else calls.price_calls
        answer = ask(store, filters, options.by, options.limit or DEFAULT_GROUPS)
    _show(answer, options.json)


def _action(words: list[str], sql: str | None) -> tuple[str, str]:
    """What to do, and the id of the call to show."""
    allowed = f"allowed: {', '.join(ACTIONS)}, or --sql SELECT; next: understudy calls list"
    if sql is not None:
        if words:
            raise InputError(f"WORD={words[0]!r}: beside --sql; allowed: one of both; next: leave it out")
        return "sql", ""
    if not words or words[0] not in ACTIONS:
        raise InputError(f"WORD={words[0] if words else ''!r}: no such action; {allowed}")
    num_wanted = 2 if words[0] == "show" else 1
    if len(words) != num_wanted:
        raise InputError(f"calls {words[0]}: takes {num_wanted - 1} names, got {len(words) - 1}; {allowed}")
    return words[0], words[-1]


def _show(answer: Answer, as_json: bool) -> None:
    from jobs.tables import show_table

    if as_json:
        print(json.dumps([dict(zip(answer.head, row, strict=True)) for row in answer.rows], default=str, indent=1))
    else:
        show_table(answer.head, answer.rows, sys.stdout)
    if answer.is_cut:
        print(f"only the first {len(answer.rows)} rows; more with --limit", file=sys.stderr)
