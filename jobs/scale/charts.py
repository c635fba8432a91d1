"""An experiment's pictures: lines with intervals, as inline SVG with a text for those who do not see them.

Names come from traffic: they are drawn as plain printable ASCII. Series differ in marker and dash too, for readers and
printers without colour.
"""

from __future__ import annotations

import html
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from training.pictures import number

_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^v<>P*X"
_MAX_NAME = 40
_WIDTH, _ROOM, _NAME_HEIGHT = 6.6, 3.6, 0.2
"""Inches; narrow, so that letters can be read where a page is."""
_NAMES_A_ROW = 2
_MOST_TICKS, _APART = 8, 1.3


class Dot(NamedTuple):
    """A measured point with the ends of its interval."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Axes(NamedTuple):
    """What a picture's axes say."""

    x: str
    y: str
    is_x_log: bool = False
    is_y_log: bool = False
    y_limits: tuple[float, float] | None = None


def draw_lines(
    series: Mapping[str, Sequence[Dot]],
    axes: Axes,
    caption: str,
    *,
    laws: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Points with intervals by series.

    Args:
        laws: name of a series -> its fitted curve, drawn instead of a line from point to point.
        levels: label -> height of a horizontal line.
    """
    figure, plot = _figure(_ROOM, len(series) + len(levels or {}))
    for place, (name, dots) in enumerate(series.items()):
        curve = (laws or {}).get(name)
        style = "none" if curve else _STYLES[place // 10 % len(_STYLES)]
        marks = {"marker": _MARKERS[place % len(_MARKERS)], "linestyle": style, "color": f"C{place % 10}"}
        xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
        spans = [
            [dot.y - (dot.y if dot.low is None else min(dot.low, dot.y)) for dot in dots],
            [(dot.y if dot.high is None else max(dot.high, dot.y)) - dot.y for dot in dots],
        ]
        plot.errorbar(xs, ys, yerr=spans, capsize=3, markersize=5, label=drawable(name), **marks)
        if curve:
            plot.plot(*zip(*curve, strict=True), color=f"C{place % 10}", linewidth=1)
    for label, height in (levels or {}).items():
        plot.axhline(height, color="black", linestyle="--", linewidth=0.8, label=drawable(label))
    plot.set_xscale("log" if axes.is_x_log else "linear")
    plot.set_yscale("log" if axes.is_y_log else "linear")
    plot.set_ylim(axes.y_limits) if axes.y_limits else None
    plot.set_xlabel(axes.x)
    plot.set_ylabel(axes.y)
    if axes.is_x_log:
        _plain_ticks(plot.xaxis, [dot.x for dots in series.values() for dot in dots])
    if axes.is_y_log:
        _plain_ticks(plot.yaxis, [dot.y for dots in series.values() for dot in dots])
    told = "; ".join(
        f"{name}: " + ", ".join(f"{number(dot.y)} at {number(dot.x)}" for dot in dots) for name, dots in series.items()
    )
    return _finish(figure, caption, f"{axes.y} by {axes.x}. {told}")


def draw_groups(
    series: Mapping[str, Mapping[str, Dot]],
    label: str,
    caption: str,
    *,
    is_log: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """Points with intervals by series and named group, a row a group: names have no order that a line could follow.

    Args:
        series: name -> group -> its point, whose x is not looked at.
        label: of the axis that values are read off.
    """
    groups = list(dict.fromkeys(group for points in series.values() for group in points))
    figure, plot = _figure(0.8 + 0.5 * len(groups), len(series))
    for place, (name, points) in enumerate(series.items()):
        shift = 0.5 * ((place + 0.5) / len(series) - 0.5)
        rows = [groups.index(group) + shift for group in points]
        spans = [
            [dot.y - (dot.y if dot.low is None else min(dot.low, dot.y)) for dot in points.values()],
            [(dot.y if dot.high is None else max(dot.high, dot.y)) - dot.y for dot in points.values()],
        ]
        marks = {"marker": _MARKERS[place % len(_MARKERS)], "linestyle": "none", "color": f"C{place % 10}"}
        values = [dot.y for dot in points.values()]
        plot.errorbar(values, rows, xerr=spans, capsize=3, markersize=5, label=drawable(name), **marks)
    plot.set_yticks(range(len(groups)), ["\n".join(_wrap(drawable(group))) for group in groups])
    plot.set_ylim(len(groups) - 0.5, -0.5)
    plot.set_xscale("log" if is_log else "linear")
    plot.set_xlim(limits) if limits else None
    plot.set_xlabel(label)
    if is_log:
        _plain_ticks(plot.xaxis, [dot.y for points in series.values() for dot in points.values()])
    told = "; ".join(
        f"{name}: " + ", ".join(f"{number(dot.y)} of {group}" for group, dot in points.items())
        for name, points in series.items()
    )
    return _finish(figure, caption, f"{label}. {told}")


def _figure(room: float, num_names: int) -> tuple[Any, Any]:
    """A figure whose plot is `room` inches high, with room for the names of its series below it."""
    from matplotlib.figure import Figure

    rows = -(-num_names // _NAMES_A_ROW)
    figure = Figure(figsize=(_WIDTH, room + 0.6 + _NAME_HEIGHT * rows), layout="constrained")
    plot = figure.add_subplot()
    plot.grid(alpha=0.25)
    return figure, plot


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis as plain numbers: at the values where these are few and apart, else at round ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    own = sorted(set(values))
    is_few = 1 < len(own) <= _MOST_TICKS and all(b >= _APART * a for a, b in itertools.pairwise(own))
    between = (1, 2, 5) if own[-1] > 10 * own[0] else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(FixedLocator(own) if is_few else LogLocator(subs=between, numticks=_MOST_TICKS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def _finish(figure: Any, caption: str, told: str) -> str:
    """The figure as SVG, with its caption and, for those who do not see it, its numbers."""
    import matplotlib

    figure.legend(loc="outside lower left", frameon=False, ncols=_NAMES_A_ROW, fontsize="small")
    drawn = io.StringIO()
    # Text stays text, and ids are those of this picture.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    alt = html.escape(f"{caption} {told}", quote=True)
    return (
        f'<figure role="img" aria-label="{alt}"><div class="wide">{svg[svg.index("<svg") :]}</div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def plain(value: float) -> str:
    """A number as an axis and a sentence tell it.

    Example:
        >>> plain(138_462.5), plain(2051), plain(0.2826), plain(1)
        ('138,462', '2,051', '0.283', '1')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _wrap(name: str) -> list[str]:
    return textwrap.wrap(name, _MAX_NAME // 2) or [""]


def drawable(name: str) -> str:
    """The picture's font lacks many characters, and a dollar sign would begin a formula."""
    plain = "".join(c if c.isascii() and c.isprintable() and c != "$" else "?" for c in name)
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 3] + "..."
