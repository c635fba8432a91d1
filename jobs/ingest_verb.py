"""`understudy ingest PATH...`: its flags, its progress bar and its tables. Knows nothing of logs (jobs/ingest.py does)."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import secrets
import sys
from typing import TYPE_CHECKING, Any

from cluster.errors import InputError

if TYPE_CHECKING:
    from jobs.ingest import IngestCounts, Progress

MAX_AGENTS_SHOWN = 20
FORMATS = ("auto", "understudy", "openai", "otel", "litellm", "langfuse")


def add_verb(verbs: Any) -> None:
    """Add `ingest` to the verbs of the command line."""
    verb = verbs.add_parser(
        "ingest",
        help="read call logs into the store",
        sections=("store", "faces"),
        examples=[
            "understudy ingest --dry-run logs/ store=store",
            "understudy ingest spans.json.gz --format otel --client-field metadata.user_id --agent desk store=store",
        ],
    )
    verb.add_argument("paths", nargs="+", help="log files or folders of them (also .gz, .zst), and key=value words")
    verb.add_argument("--format", choices=FORMATS, default="auto", help="who wrote the logs (default: told by content)")
    origin = verb.add_mutually_exclusive_group()
    origin.add_argument("--client", metavar="NAME", help="whose calls these are, all of them")
    origin.add_argument(
        "--client-field", metavar="PATH", help="dotted path of the client in each record, such as metadata.user_id"
    )
    verb.add_argument("--agent", metavar="NAME", help="which agent made the calls (default: as the logs say)")
    verb.add_argument("--dry-run", action="store_true", help="tell what would be read; write nothing")
    verb.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from jobs.ingest import ingest
    from jobs.recipe import load_recipe
    from training.log_records import ReadRules

    for name in ("client", "client_field", "agent"):
        if getattr(options, name) == "":
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} '': empty; allowed: a name; next: understudy ingest PATH {flag} NAME")
    recipe = load_recipe([word for word in options.paths if _is_setting(word)])
    paths = [pathlib.Path(word) for word in options.paths if not _is_setting(word)]
    if not paths:
        raise InputError("PATH: none given; allowed: log files or folders; next: understudy ingest FILE.jsonl")
    rules = ReadRules(client=options.client, client_field=options.client_field, agent=options.agent, faces=recipe.faces)
    store, pseudonyms = _open(recipe.store, options.dry_run)
    bar = _Bar(paths)
    try:
        counts = ingest(
            store, paths, pseudonyms, bar.advance, format=options.format, rules=rules, dry_run=options.dry_run
        )
    finally:
        bar.close()
    _show(counts, options.dry_run)
    print(json.dumps(counts.model_dump(mode="json"), indent=1))


def _is_setting(word: str) -> bool:
    """key=value, unless a file of that name exists."""
    return "=" in word and not pathlib.Path(word).exists()


def _open(uri: str, is_dry: bool) -> tuple[Any, Any]:
    """The store and its pseudonyms; a dry run makes neither, and counts under a key of the moment."""
    from cluster.access import Pseudonyms, load_pseudonym_key, require_role
    from cluster.store import Store, check_store_address

    if not is_dry:
        # What is read in is learned from.
        require_role(uri, "curator")
        return Store(uri), Pseudonyms(load_pseudonym_key(uri))
    is_absent = "://" not in check_store_address(uri) and not pathlib.Path(uri).expanduser().exists()
    return None if is_absent else Store(uri), Pseudonyms(secrets.token_bytes(32))


class _Bar:
    """Bytes read of all files, on a terminal's stderr; silent elsewhere."""

    def __init__(self, paths: list[pathlib.Path]) -> None:
        from tqdm import tqdm

        from training.formats import find_files

        sizes = [file.stat().st_size for file in find_files(paths) if file.is_file()]
        self._bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None, file=sys.stderr, leave=False)
        self._read: dict[str, int] = {}
        self.advance: Progress = self._advance

    def _advance(self, file: str, num_records: int, num_bytes: int) -> None:
        self._bar.update(num_bytes - self._read.get(file, 0))
        self._read[file] = num_bytes
        self._bar.set_postfix_str(f"{pathlib.Path(file).name}: {num_records} records")

    def close(self) -> None:
        self._bar.close()


def _show(counts: IngestCounts, is_dry: bool) -> None:
    """Tables for a person, on stderr: stdout is for what reads the counts."""
    from jobs.tables import show_table

    fields = ("num_records", "ingested", "already_present", "quarantined", "skipped")
    rows: list[list[Any]] = [
        [file, one.format, *(getattr(one, name) for name in fields)] for file, one in counts.by_file.items()
    ]
    rows += [["all files", "", *(getattr(counts, name) for name in fields)]] if len(rows) > 1 else []
    head = ("file", "format", "records", "would ingest" if is_dry else "ingested", "present", "quarantined", "skipped")
    show_table(head, rows, sys.stderr)
    reasons = [["quarantined", reason, number] for reason, number in counts.quarantine_reasons.items()]
    reasons += [["skipped", reason, number] for reason, number in counts.skip_reasons.items()]
    if reasons:
        show_table(("left out", "reason", "records"), reasons, sys.stderr)
    if counts.client_fallbacks:
        print(
            f"--client-field: absent in {counts.client_fallbacks} records; their source's client is taken",
            file=sys.stderr,
        )
    if is_dry:
        agents = [list(item) for item in counts.agents.items()]
        rest = agents[MAX_AGENTS_SHOWN:]
        others = [[f"{len(rest)} others", sum(number for _, number in rest)]] if rest else []
        show_table(("agent", "calls"), agents[:MAX_AGENTS_SHOWN] + others, sys.stderr)
        times = " to ".join(_time(ts) for ts in (counts.first_ts, counts.last_ts) if ts is not None) or "none"
        print(
            f"clients: {counts.num_clients}, sessions: {counts.num_sessions}, time: {times}, "
            f"without a time: {counts.untimed}, failed: {counts.failed}, to a person: {counts.faces_person}; "
            "nothing was written",
            file=sys.stderr,
        )


def _time(ts: float) -> str:
    return datetime.datetime.fromtimestamp(ts, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
