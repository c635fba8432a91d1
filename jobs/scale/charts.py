"""An experiment's pictures: lines with intervals, as inline SVG with a text for those who do not see them.

Names come from traffic: they are drawn as plain printable ASCII. Series differ in marker and dash too, for readers and
printers without colour.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from training.pictures import number

_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^v<>P*X"
_MAX_NAME = 40


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
        laws: name of a series -> its fitted curve, drawn without points.
        levels: label -> height of a horizontal line.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    plot = figure.add_subplot()
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
        plot.axhline(height, color="black", linestyle="--", linewidth=0.8)
        plot.annotate(
            drawable(label), (0.01, height), xycoords=("axes fraction", "data"), fontsize="small", va="bottom"
        )
    plot.set_xscale("log" if axes.is_x_log else "linear")
    plot.set_yscale("log" if axes.is_y_log else "linear")
    plot.set_ylim(axes.y_limits) if axes.y_limits else None
    plot.set_xlabel(axes.x)
    plot.set_ylabel(axes.y)
    plot.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    drawn = io.StringIO()
    # Text stays text, and ids are those of this picture.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    told = "; ".join(
        f"{name}: " + ", ".join(f"{number(dot.y)} at {number(dot.x)}" for dot in dots) for name, dots in series.items()
    )
    alt = html.escape(f"{caption} {axes.y} by {axes.x}. {told}", quote=True)
    return (
        f'<figure role="img" aria-label="{alt}">{svg[svg.index("<svg") :]}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def drawable(name: str) -> str:
    """The picture's font lacks many characters, and a dollar sign would begin a formula."""
    plain = "".join(c if c.isascii() and c.isprintable() and c != "$" else "?" for c in name)
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 3] + "..."
