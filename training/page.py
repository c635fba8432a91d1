"""Pieces of a page that stands alone: no script, no outside resource, every text escaped. Knows nothing of what it shows."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.pictures import number, percent

_STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #bbb; }
h1, h2, h3 { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; max-width: 28rem; }
.lead { font-size: 1.2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; min-width: 4rem; }
th { background: #f2f2f2; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
"""


def make_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Escapes every cell; the wrapper scrolls sideways on small screens, by keyboard too."""
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in header)
    body = "".join("<tr>" + "".join(f"<td><bdi>{escape(one)}</bdi></td>" for one in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def make_page(title: str, body: str) -> str:
    """The whole document around its body. `body` is HTML, `title` text."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def escape(value: object) -> str:
    """Text as HTML."""
    return html.escape(str(value), quote=True)


def cell(value: Any, is_share: bool = False) -> str:
    """One table cell for a number, text, list or mapping of a summary."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return " to ".join(cell(inner, is_share) for inner in value) if len(value) == 2 else ", ".join(map(cell, value))
    if is_share or isinstance(value, float):
        return percent(value) if is_share else number(value)
    return str(value)
