"""The report's pictures: tasks by volume, coverage against disagreement, learning curves; inline SVG with a text for all.

Names come from traffic: they are drawn as plain printable ASCII, and escaped wherever they stand as text. Decisions
differ in hatching and in the written label too, for readers and printers without colour.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.records import TaskSpec
from cluster.route_model import NUM_BUCKETS, hashed_features
from training.evaluation import Evaluation
from training.reliability import EPSILONS
from training.replaceability import PAPER_GUESSES, Replaceability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOVES, STAYS = "moved", "stays on the LLM"
_MAX_BARS = 40
_MAX_NAME = 48
_COLOURS = {MOVES: "#0072b2", STAYS: "#e69f00"}
_HATCHES = {MOVES: "", STAYS: "///"}
_CURVE_STYLES = ("-", "--", ":", "-.")


class Row(NamedTuple):
    """One task with what was decided about it."""

    number: int
    task: TaskSpec
    evaluation: Evaluation | None
    reason: str | None
    """Why it stays on the LLM; None where it moves."""

    @property
    def decision(self) -> str:
        return STAYS if self.reason else MOVES


def draw_volume(rows: Sequence[Row]) -> str:
    """Bars of captured calls by task, in the order of `rows`, at most 40; nothing without tasks."""
    if not rows:
        return ""
    from matplotlib.figure import Figure

    drawn = rows[:_MAX_BARS]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    places, calls = range(len(drawn)), [row.task.num_calls for row in drawn]
    for decision in (MOVES, STAYS):
        chosen = [place for place in places if drawn[place].decision == decision]
        looks = {"color": _COLOURS[decision], "hatch": _HATCHES[decision], "edgecolor": "white"}
        axes.barh(chosen, [calls[place] for place in chosen], label=decision, **looks)
    for place in places:
        axes.annotate(
            f"{calls[place]} ({drawn[place].decision})",
            (calls[place], place),
            (4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(list(places), [_drawable(f"{row.number}. {row.task.name}") for row in drawn], parse_math=False)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.set_xlim(0, 1.45 * max(1, *calls))
    axes.set_xlabel("captured calls")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    left_out = f" The {len(rows) - len(drawn)} smallest tasks are not drawn." if len(rows) > len(drawn) else ""
    alt = "Bars of captured calls per task: " + "; ".join(
        f"{r.task.name}, {r.task.num_calls}, {r.decision}" for r in drawn
    )
    return picture(figure, alt, f"Tasks by volume and decision.{left_out}")


def draw_map(rows: Sequence[Row]) -> str:
    """Tasks in two dimensions by the words of their templates: near ones say like things; nothing below three tasks.

    Principal components of hashed features of the static lines, tools and names; area by captured calls.
    """
    if len(rows) < 3:
        return ""
    import numpy as np
    from matplotlib.figure import Figure

    points = np.zeros((len(rows), NUM_BUCKETS), dtype=np.float32)
    for place, row in enumerate(rows):
        buckets, values = hashed_features("\n".join([*row.task.static_lines, *row.task.tool_names, row.task.name]))
        points[place, buckets] = values / max(float(np.linalg.norm(values)), 1e-6)
    points -= points.mean(axis=0)
    left, sizes, _ = np.linalg.svd(points, full_matrices=False)
    places = left[:, :2] * sizes[:2]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for decision, mark in ((MOVES, "o"), (STAYS, "s")):
        chosen = [i for i, row in enumerate(rows) if row.decision == decision]
        area = [30 + 600 * rows[i].task.share_calls for i in chosen]
        axes.scatter(*places[chosen].T, s=area, marker=mark, color=_COLOURS[decision], alpha=0.7, label=decision)
    for row, place in zip(rows[:_MAX_BARS], places, strict=False):
        axes.annotate(str(row.number), place, textcoords="offset points", xytext=(6, 4), fontsize="small")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.15)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    alt = "Map of tasks; " + "; ".join(f"{r.number} is {r.task.name}, {r.decision}" for r in rows[:_MAX_BARS])
    return picture(figure, alt, "Task map: tasks whose templates say like things stand near; area by captured calls.")


def draw_coverage(row: Row) -> str:
    """Disagreement against coverage on validation, with its 95% interval, epsilon and the chosen threshold."""
    assert row.evaluation is not None
    curve, gate = row.evaluation.curve, row.evaluation.gate
    if not curve:
        return "<p>No validation answer could be used, so there is no curve.</p>"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    coverage, disagreement, lower, upper = (
        [point[key] for point in curve] for key in ("coverage", "disagreement", "lower", "upper")
    )
    axes.fill_between(coverage, lower, upper, color="#0072b2", alpha=0.18, label="95% interval")
    axes.plot(coverage, disagreement, color="#0072b2", marker=".", label="disagreement")
    axes.axhline(gate.epsilon, color="black", linestyle="--", label=f"epsilon {number(gate.epsilon)}")
    for epsilon in set(EPSILONS) - {gate.epsilon}:
        axes.axhline(epsilon, color="#888888", linestyle=":", linewidth=0.8)
        axes.annotate(number(epsilon), (1.0, epsilon), fontsize="x-small", color="#666666", ha="right", va="bottom")
    chosen = _chosen_point(row)
    where = "no threshold was opened"
    if chosen:
        where = f"threshold {number(gate.threshold)}: coverage {percent(chosen['coverage'])}"
        where += f", disagreement {percent(chosen['disagreement'])}"
        mark = {"marker": "D", "markersize": 9, "color": "#d55e00", "markeredgecolor": "black", "linestyle": "none"}
        axes.plot([chosen["coverage"]], [chosen["disagreement"]], label=f"threshold {number(gate.threshold)}", **mark)
    top = min(1.0, max(3 * gate.epsilon, 1.5 * max(disagreement)))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.03 * top, top)
    axes.set_xlabel("coverage: share of validation calls accepted")
    axes.set_ylabel("disagreement among them")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize="small")
    last = curve[-1]
    alt = (
        f"Disagreement against coverage on validation for {row.task.name}; epsilon {number(gate.epsilon)}; {where}; at "
    )
    alt += f"coverage {percent(last['coverage'])} disagreement is {percent(last['disagreement'])}"
    return picture(figure, alt, f"On validation, {where}.")


def draw_reliability(row: Row) -> str:
    """Agreement by confidence on validation, with 95% intervals; nothing in reports that were written without it."""
    assert row.evaluation is not None
    bins, threshold = row.evaluation.reliability, row.evaluation.gate.threshold
    if not bins:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places, shares = [one.confidence for one in bins], [one.num_agreements / one.num_calls for one in bins]
    below = [share - one.interval[0] for share, one in zip(shares, bins, strict=True)]
    above = [one.interval[1] - share for share, one in zip(shares, bins, strict=True)]
    axes.plot([0, 1], [0, 1], color="#888888", linestyle=":", label="agrees as often as it says")
    axes.errorbar(places, shares, yerr=[below, above], color="#0072b2", marker="o", capsize=3, label="validation calls")
    if threshold is not None:
        axes.axvline(threshold, color="#d55e00", linestyle="--", label=f"threshold {number(threshold)}")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that agrees")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize="small")
    alt = f"Share of validation answers that agree, by confidence, for {row.task.name}: " + "; ".join(
        f"{number(place)}: {percent(share)} of {one.num_calls}"
        for place, share, one in zip(places, shares, bins, strict=True)
    )
    return picture(figure, alt, "Reliability: agreement by confidence on validation, with 95% intervals.")


def draw_agents(agents: Sequence[Replaceability]) -> str:
    """Replaceable share of each agent with its interval, above the paper's guesses; nothing without agents."""
    if not agents:
        return ""
    from matplotlib.figure import Figure

    drawn = agents[:_MAX_BARS]
    figure = Figure(figsize=(9, 1.6 + 0.32 * (len(drawn) + len(PAPER_GUESSES))), layout="constrained")
    axes = figure.add_subplot()
    places, shares = range(len(drawn)), [one.share for one in drawn]
    reach = [[one.share - one.interval[0] for one in drawn], [one.interval[1] - one.share for one in drawn]]
    axes.barh(places, shares, xerr=reach, capsize=4, color=_COLOURS[MOVES], label="measured, with 95% interval")
    guessed = [len(drawn) + place for place in range(len(PAPER_GUESSES))]
    look = {"color": "white", "edgecolor": "black", "hatch": "///"}
    axes.barh(guessed, list(PAPER_GUESSES.values()), label="the paper's guess, of another agent", **look)
    names = [*(_drawable(one.agent) for one in drawn), *PAPER_GUESSES]
    axes.set_yticks([*places, *guessed], names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the agent's LLM calls that small models can answer")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    alt = "Replaceable share of each agent's calls: " + "; ".join(
        f"{one.agent} {percent(one.share)}, {percent(one.interval[0])} to {percent(one.interval[1])}" for one in drawn
    )
    alt += "; the paper's guesses: " + ", ".join(f"{name} {percent(share)}" for name, share in PAPER_GUESSES.items())
    return picture(figure, alt, "Replaceability of each agent, beside what the paper guessed of three others.")


def _chosen_point(row: Row) -> Mapping[str, float] | None:
    """The drawn point that accepts most among those the threshold allows; the curve is thinned, so it may lie above."""
    assert row.evaluation is not None
    threshold = row.evaluation.gate.threshold
    if row.decision != MOVES or threshold is None:
        return None
    return min(
        (p for p in row.evaluation.curve if p["threshold"] >= threshold), key=lambda p: p["threshold"], default=None
    )


def draw_losses(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Learning curves: training loss by step, validation loss as dots where a checkpoint was written.

    Args:
        curves: name of a run -> points of step, loss and, at checkpoints, validation_loss.
    """
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(list(drawn.items())[:_MAX_BARS]):
        steps, losses = ([point[key] for point in points] for key in ("step", "loss"))
        style = _CURVE_STYLES[place // 10 % len(_CURVE_STYLES)]
        (line,) = axes.plot(steps, losses, style, label=_drawable(name))
        held_out = [(p["step"], p["validation_loss"]) for p in points if p.get("validation_loss") is not None]
        axes.plot(*zip(*held_out, strict=True), "o", color=line.get_color()) if held_out else None
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the answer's tokens")
    axes.legend(fontsize="small", frameon=False)
    alt = "Loss from the first to the last point: " + "; ".join(
        f"{name} {number(points[0]['loss'])} to {number(points[-1]['loss'])}" for name, points in drawn.items()
    )
    return picture(figure, alt, "Learning curves; dots are validation loss at checkpoints.")


def picture(figure: Figure, alt: str, caption: str) -> str:
    """A figure as an inline SVG with its alternative text and caption; the same figure gives the same bytes."""
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "understudy"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    data = base64.b64encode(drawn.getvalue()).decode("ascii")
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _drawable(name: str) -> str:
    """The picture's font lacks many characters, and a missing one is a warning; the task's number still tells it."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in name)
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 3] + "..."


def percent(share: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "-" if share is None else f"{100 * share:.1f}%"


def number(value: float | None) -> str:
    """Four figures, or a dash."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
