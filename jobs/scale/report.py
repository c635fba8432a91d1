"""What an experiment leaves in OUT: cells.parquet, laws.json, report.html, and a table on the terminal.

The page stands alone: no script, no outside resource, pictures inline. Its first sentence says what was found. It takes
names, counts and rates and never sees a message.
"""

from __future__ import annotations

import html
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import provenance
from jobs.tables import show_table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1rem; color: #555; } .lead { font-size: 1.25rem; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td { white-space: nowrap; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; min-width: 21rem; max-width: 48rem; height: auto; }
figcaption { color: #555; font-size: 0.9rem; } .wide { overflow-x: auto; } pre { overflow-x: auto; font-size: 0.8rem; }
p, li { overflow-wrap: anywhere; } ul { padding-left: 1.2rem; } summary { cursor: pointer; }
"""


class Findings(NamedTuple):
    """What an experiment found."""

    sentence: str
    """What was found, in one sentence."""
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Of the table."""
    laws: Mapping[str, Any]
    """Fitted laws with their intervals, as JSON."""
    records: Sequence[Mapping[str, Any]]
    """Flat rows of all that was measured, for Parquet."""
    pictures: Sequence[str] = ()
    notes: Sequence[str] = ()
    """Sentences on how the numbers came about, and what they cannot show."""
    is_simulated: bool = False


def write_findings(out: pathlib.Path, name: str, findings: Findings, words: Sequence[str]) -> None:
    """Write the files of OUT, replacing those of an earlier run, and print the table.

    Args:
        words: the command line that made it.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = {"command": " ".join(words), "machine": provenance.machine(), "packages": provenance.code()["packages"]}
    pq.write_table(pa.Table.from_pylist(_columns(findings.records)), out / "cells.parquet")
    table = [dict(zip(findings.head, row, strict=True)) for row in findings.rows]
    told = {"experiment": name, "quick": "--quick" in words, "found": findings.sentence, "laws": findings.laws}
    told |= {"table": table, "notes": list(findings.notes), "provenance": facts}
    (out / "laws.json").write_text(json.dumps(told, indent=1) + "\n")
    (out / "report.html").write_text(_page(name, findings, facts), encoding="utf-8", errors="replace")
    show_table(findings.head, findings.rows, sys.stdout)
    for note in findings.notes:
        print(f"note: {note}")
    print(findings.sentence)
    print(f"{out}/report.html", flush=True)


def _columns(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every record with every column; what is no plain value goes in as JSON."""
    names = list(dict.fromkeys(name for record in records for name in record))
    plain = (str, int, float, bool, type(None))
    return [
        {n: record.get(n) if isinstance(record.get(n), plain) else json.dumps(record.get(n)) for n in names}
        for record in records
    ]


def _page(name: str, findings: Findings, facts: Mapping[str, Any]) -> str:
    machine = facts["machine"]
    made = (
        f"{facts['command']} on {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python "
        f"{machine['python']}, {machine['date']}; commit {machine['git_sha'] or 'unknown'}, source {machine['source_sha256'][:12]}; "
        + ", ".join(f"{package} {version}" for package, version in facts["packages"].items())
    )
    head = "".join(f"<th scope=col>{html.escape(one)}</th>" for one in findings.head)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(_told(cell))}</td>' for cell in row)}</tr>" for row in findings.rows
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in findings.notes)
    mark = "<p><strong>Simulated in part:</strong> see the notes.</p>" if findings.is_simulated else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>understudy scale {html.escape(name)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>understudy scale {html.escape(name)}</h1><p class="lead">{html.escape(findings.sentence)}</p>{mark}{"".join(findings.pictures)}'
        f'<h2>Table</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
        f"<h2>Notes</h2><ul>{notes}</ul><details><summary>What is in laws.json beside the table</summary>"
        f"<pre>{html.escape(json.dumps(findings.laws, indent=1))}</pre></details>"
        f"<h2>How it was made</h2><p>{html.escape(made)}</p></body></html>\n"
    )


def _told(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
