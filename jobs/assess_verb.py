"""`understudy assess SOURCE | CALLS...`: its flags, and what it prints. Knows nothing of how calls are judged (jobs/assess.py)."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from typing import Any

from cluster.errors import ConfigError, InputError

MAX_SITES_SHOWN = 20
_SETTINGS = ("store", "discover", "gate", "specialists.max_model_tokens", "curate.keep_faces_person")


def add_verb(verbs: Any) -> None:
    """Add `assess` to the verbs of the command line."""
    verb = verbs.add_parser(
        "assess",
        help="how much of an agent's calls small models could take, before any training",
        sections=_SETTINGS,
        examples=[
            "understudy assess logs/calls.jsonl --agent desk --report out/assess.html",
            "understudy assess store=store gate.epsilon=0.02 --json out/assess.json",
            "understudy assess path/to/agent/src",
        ],
    )
    verb.add_argument(
        "paths",
        nargs="*",
        help="files or folders of captured calls, as `ingest` reads them; or a folder of Python source; and key=value words. "
        "Without a path the calls of the store",
    )
    verb.add_argument("--agent", metavar="NAME", help="which agent made the calls (default: as the logs say)")
    verb.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write all that was found here")
    verb.add_argument("--report", type=pathlib.Path, metavar="PATH", help="write the page with pictures here")
    verb.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from jobs.recipe import load_recipe

    words = [word for word in options.paths if "=" in word and not pathlib.Path(word).exists()]
    paths = [pathlib.Path(word) for word in options.paths if word not in words]
    recipe = load_recipe(words)
    for flag, path in (("--json", options.json), ("--report", options.report)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{flag} {path}: no file can be written there; allowed: a path in a folder that exists")
    if len(paths) == 1 and paths[0].is_dir() and any(paths[0].rglob("*.py")):
        _assess_source(paths[0], options)
        return
    _assess_calls(
        _read_files(paths, options.agent) if paths else _read_store(recipe.store, options.agent), recipe, options
    )


def _assess_source(folder: pathlib.Path, options: argparse.Namespace) -> None:
    from jobs.assess_page import SOURCE_HEADER, source_rows, write_source_page
    from jobs.assess_source import CANNOT_SHOW, find_source_sites
    from jobs.tables import show_table

    if options.agent:
        raise ConfigError("--agent: source code has no calls to name; next: leave --agent out")
    sites, num_unread = find_source_sites(folder)
    show_table(SOURCE_HEADER, source_rows(sites), sys.stdout)
    print(f"{len(sites)} places; {num_unread} files could not be parsed. What source code cannot show:")
    for sentence in CANNOT_SHOW:
        print(f"- {sentence}")
    found = {"sites": [one.model_dump(mode="json") for one in sites], "num_unread_files": num_unread}
    _write_json(options.json, {**found, "cannot_show": list(CANNOT_SHOW)})
    if options.report:
        write_source_page(options.report, sites, CANNOT_SHOW)


def _assess_calls(calls: list[Any], recipe: Any, options: argparse.Namespace) -> None:
    from jobs.assess import assess, criterion
    from jobs.assess_page import PAPER_HEADER, SITE_HEADER, paper_rows, sentence_of, site_rows, write_page
    from jobs.provenance import provenance
    from jobs.tables import show_table

    reports = assess(calls, recipe, functools.partial(print, file=sys.stderr, flush=True))
    for one in reports:
        print(f"\n{sentence_of(one)}")
        rows = site_rows(one)
        show_table(SITE_HEADER, rows[:MAX_SITES_SHOWN], sys.stdout)
        if len(rows) > MAX_SITES_SHOWN:
            print(f"{len(rows) - MAX_SITES_SHOWN} smaller sites are in --json and --report")
        print("These calls cannot show:")
        for sentence in one.cannot_show:
            print(f"- {sentence}")
    print("\nWhat counts:")
    for sentence in criterion(recipe):
        print(f"- {sentence}")
    print()
    show_table(PAPER_HEADER, paper_rows(reports), sys.stdout)
    _write_json(
        options.json,
        {
            "criterion": criterion(recipe),
            "agents": [one.model_dump(mode="json") for one in reports],
            "provenance": provenance(sys.argv[1:]),
        },
    )
    if options.report:
        write_page(options.report, reports, criterion(recipe))


def _read_files(paths: list[pathlib.Path], agent: str | None) -> list[Any]:
    """The calls of log files; nothing is stored, so pseudonyms are of a key that everyone knows."""
    from cluster.access import Pseudonyms
    from cluster.records import AgentCall
    from training.formats import AUTO, LogReader, find_files
    from training.log_records import ReadRules

    reader = LogReader(Pseudonyms(b"assessment: pseudonyms are not kept"), 0.0, AUTO, ReadRules(agent=agent))
    files = reader.prepare(find_files(paths))
    calls = [item for file in files for item in reader.read(file) if isinstance(item, AgentCall)]
    if not calls:
        raise InputError(f"{paths[0]}: no call in it; allowed: logs that `understudy ingest --dry-run` reads")
    return calls


def _read_store(uri: str, agent: str | None) -> list[Any]:
    """The store's own calls, each once; those that ask a specialist in the background are nobody's."""
    from cluster.access import require_role
    from cluster.calls import iterate_calls
    from cluster.store import Store

    require_role(uri, "curator")
    calls = {call.call_id: call for call in iterate_calls(Store(uri)) if not call.audit_of}
    found = [call for call in calls.values() if agent in (None, call.agent)]
    if not found:
        of = f" of agent {agent!r}" if agent else ""
        raise InputError(
            f"store={uri}: no calls{of}; allowed: captured calls; next: understudy ingest PATH store={uri}"
        )
    return found


def _write_json(path: pathlib.Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")
