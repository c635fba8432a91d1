"""`understudy catalog`: the base models that selection knows, filtered by what a task or a policy asks of them.

A fact that a filter compares with and that was not found leaves its model out, as it does in a selection. Every fact's
address and the date it was read stand in --json; the table shows values alone.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from training.catalog import HubModel, ScratchModel, context_window, load_catalog, missed_policy, num_parameters


def add_verb(verbs: Any) -> None:
    """Add the verb to `understudy`'s subparsers."""
    verb = verbs.add_parser(
        "catalog",
        help="list the base models that may be chosen from",
        sections=(),
        examples=["understudy catalog --max-parameters 2e9 --license MIT --license Apache-2.0 --tool-use --json"],
    )
    verb.add_argument("--max-parameters", type=float, metavar="N", help="weights at most, such as 2e9")
    verb.add_argument("--license", action="append", metavar="L", help="allowed licence, such as MIT; may be repeated")
    verb.add_argument("--tool-use", action="store_true", help="only those trained to call functions")
    verb.add_argument("--min-context", type=int, default=0, metavar="N", help="tokens of prompt and answer at least")
    verb.add_argument("--json", action="store_true", help="whole entries with the source of every fact")
    verb.set_defaults(run=_run)


def list_models(
    *,
    max_parameters: float | None = None,
    licenses: tuple[str, ...] | None = None,
    needs_tool_use: bool = False,
    min_context: int = 0,
) -> list[HubModel | ScratchModel]:
    """Entries of the shipped catalog that pass the filters, in its order. Scratch entries have no licence to refuse.

    Args:
        licenses: compared without case; None allows any, an unknown one too.
    """
    return [
        entry
        for entry in load_catalog().entries
        if _fits(entry, max_parameters, min_context) and not missed_policy(entry, needs_tool_use, licenses)
    ]


def format_table(entries: list[HubModel | ScratchModel]) -> str:
    """One line a model, columns aligned; `-` where a fact was not found."""
    header = ("name", "parameters", "licence", "context", "tools", "released", "read on")
    rows = [header, *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _run(options: argparse.Namespace) -> None:
    entries = list_models(
        max_parameters=options.max_parameters,
        licenses=tuple(options.license) if options.license else None,
        needs_tool_use=options.tool_use,
        min_context=options.min_context,
    )
    if options.json:
        print(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=1))
        return
    print(format_table(entries))
    print(f"{len(entries)} of {len(load_catalog().entries)} models; sources: understudy catalog --json")


def _fits(entry: HubModel | ScratchModel, max_parameters: float | None, min_context: int) -> bool:
    size, window = num_parameters(entry), context_window(entry)
    is_small = max_parameters is None or (size is not None and size <= max_parameters)
    return is_small and (not min_context or (window is not None and window >= min_context))


def _row(entry: HubModel | ScratchModel) -> tuple[str, ...]:
    size, window = num_parameters(entry), context_window(entry)
    sizes = (f"{size / 1e6:,.1f}M" if size else "-", f"{window:,}" if window else "-")
    if isinstance(entry, ScratchModel):
        return (entry.name, sizes[0], "your own", sizes[1], "learned", "-", "-")
    facts = (entry.parameters, entry.license, entry.context_window_tokens, entry.has_tool_use, entry.released)
    read_on = max((fact.read_on.isoformat() for fact in facts if fact), default="-")
    tools = "-" if entry.has_tool_use is None else ("yes" if entry.has_tool_use.value else "no")
    license = entry.license.value if entry.license else "-"
    released = entry.released.value if entry.released else "-"
    return (entry.name, sizes[0], license, sizes[1], tools, released, read_on)
