"""A conversion's tasks, evaluations and losses -> one HTML page for the people who decide whether calls may move.

The page stands alone: no script, no outside resource (its own policy forbids both), pictures inline. Task names come
from traffic, so every text is escaped and pictures draw names as plain printable ASCII. It takes names, counts and
rates and never sees a message. Nothing is decided here: thresholds, bounds and intervals are shown as certified.

Source of the interval for a difference: Newcombe 1998, "Interval estimation for the difference between independent
proportions", Statistics in Medicine 17, method 10.
"""

from __future__ import annotations

import base64
import html
import io
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.records import TaskSpec
from training.evaluation import Arm, Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_BARS = 40
_MAX_NAME = 48
_SPECIALIST_ARMS = ("specialist", "specialist + gate")
_MOVES, _STAYS = "moved", "stays on the LLM"
_COLOURS = {_MOVES: "#0072b2", _STAYS: "#e69f00"}
_HATCHES = {_MOVES: "", _STAYS: "///"}
"""Decisions differ in hatching and in the written label too, for readers and printers without colour."""

_SUMMARY_LABELS = {
    "calls": "Calls measured",
    "share_off_llm": "Share of calls off the LLM",
    "agreement_accepted": "Agreement of accepted answers with the reference",
    "agreement_interval": "95% interval of that agreement",
    "cost_ratio": "Cost, as a multiple of the LLM alone",
    "p50_ms": "Median latency, ms",
    "p99_ms": "99th percentile latency, ms",
    "client_errors": "Errors shown to clients",
}
_PERCENT_KEYS = ("share_off_llm", "agreement_accepted", "agreement_interval")

_STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #bbb; }
h1, h2, h3, td { overflow-wrap: anywhere; }
.lead { font-size: 1.2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; min-width: 4rem; }
th { background: #f2f2f2; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
"""


class _Row(NamedTuple):
    """One task with what was decided about it."""

    number: int
    task: TaskSpec
    evaluation: Evaluation | None
    reason: str | None
    """Why it stays on the LLM; None where it moves."""

    @property
    def decision(self) -> str:
        return _STAYS if self.reason else _MOVES


def write_report(
    path: pathlib.Path,
    *,
    tasks: Sequence[TaskSpec],
    evaluations: Sequence[Evaluation],
    refused: Mapping[str, str],
    unassigned: Mapping[str, int],
    losses: Mapping[str, Mapping],
    summary: Mapping[str, Any] | None,
    notes: Sequence[str],
) -> None:
    """Write the page to `path`, replacing it and creating its folder.

    Args:
        evaluations: at most one per task of `tasks`.
        refused: task_id -> reason; a reason here outweighs an open gate.
        unassigned: reason -> calls that belong to no task.
        losses: task_id -> last metrics of its fine-tune.
        summary: what was measured while serving, such as cost_ratio, share_off_llm, p50_ms, p99_ms; None before that.
        notes: sentences on how the numbers came about, shown as they are.
    """
    rows = _decide(tasks, evaluations, refused)
    names = {row.task.task_id: f"{row.number}. {row.task.name}" for row in rows}
    parts = [
        f'<p class="lead">{_text(_headline(rows))}</p>',
        "<h2>Tasks</h2>",
        _task_table(rows),
        _volume_picture(rows),
        *(_task_section(row) for row in rows if row.evaluation),
        _losses_section({names.get(task_id, task_id): metrics for task_id, metrics in losses.items()}),
        _unassigned_section(unassigned),
        _summary_section(summary),
        _notes_section(notes),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page("\n".join(part for part in parts if part)), encoding="utf-8", errors="replace")


def newcombe_interval(errors_a: int, calls_a: int, errors_b: int, calls_b: int) -> tuple[float, float]:
    """95% interval for rate a minus rate b of independent samples; both must have calls."""
    rate_a, (low_a, high_a) = errors_a / calls_a, _wilson(errors_a, calls_a)
    rate_b, (low_b, high_b) = errors_b / calls_b, _wilson(errors_b, calls_b)
    difference = rate_a - rate_b
    return (
        difference - math.hypot(rate_a - low_a, high_b - rate_b),
        difference + math.hypot(high_a - rate_a, rate_b - low_b),
    )


def _wilson(errors: int, calls: int) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.975)
    centre = errors + z * z / 2
    spread = z * math.sqrt(errors * (calls - errors) / calls + z * z / 4)
    return (centre - spread) / (calls + z * z), (centre + spread) / (calls + z * z)


def _decide(tasks: Sequence[TaskSpec], evaluations: Sequence[Evaluation], refused: Mapping[str, str]) -> list[_Row]:
    found = {e.task_id: e for e in evaluations}
    assert found.keys() | refused.keys() <= {t.task_id for t in tasks}, "evaluated or refused, but not a task"
    rows = []
    for number, task in enumerate(sorted(tasks, key=lambda t: (-t.num_calls, t.task_id)), 1):
        evaluation = found.get(task.task_id)
        reason = refused.get(task.task_id)
        if reason is None and (evaluation is None or not evaluation.gate.is_open):
            reason = (evaluation.gate.refused if evaluation else None) or "not evaluated"
        rows.append(_Row(number, task, evaluation, reason))
    return rows


def _headline(rows: Sequence[_Row]) -> str:
    moved = [row for row in rows if row.decision == _MOVES]
    if not moved:
        return f"No calls moved: all {len(rows)} tasks stay on the LLM."
    share = sum(row.task.share_calls for row in moved)
    kept = sum(row.task.share_calls * row.evaluation.gate.coverage for row in moved if row.evaluation)
    return (
        f"{len(moved)} of {len(rows)} tasks moved to a specialist. They make up {_percent(share)} of the captured calls, "
        f"and by calibration their specialists answer about {_percent(kept)} of all calls; the rest goes to the LLM."
    )


def _task_table(rows: Sequence[_Row]) -> str:
    header = ["No.", "Task", "Kind", "Calls", "Share", "Decision", "Threshold", "Coverage"]
    header += ["Certified bound", "Epsilon", "Delta", "Why it stays"]
    cells = []
    for row in rows:
        gate = row.evaluation.gate if row.evaluation else None
        moved = gate if row.decision == _MOVES else None
        promise = [_number(gate.epsilon), _number(gate.delta)] if gate else ["-", "-"]
        certified = ["-", "-", "-"]
        if moved:
            certified = [_number(moved.threshold), _percent(moved.coverage), _percent(moved.upper_bound)]
        about = [str(row.number), row.task.name, row.task.kind, str(row.task.num_calls), _percent(row.task.share_calls)]
        cells.append([*about, row.decision, *certified, *promise, row.reason or "-"])
    table = _table("Tasks by volume", header, cells)
    return table + (
        "<p>The bound promises: among accepted answers the share that disagrees with the reference is at most this, except "
        "with probability delta. Coverage is the share of calibration calls at or above the threshold.</p>"
    )


def _volume_picture(rows: Sequence[_Row]) -> str:
    if not rows:
        return ""
    from matplotlib.figure import Figure

    drawn = rows[:_MAX_BARS]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    places, calls = range(len(drawn)), [row.task.num_calls for row in drawn]
    for decision in (_MOVES, _STAYS):
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
    return _picture(figure, alt, f"Tasks by volume and decision.{left_out}")


def _task_section(row: _Row) -> str:
    assert row.evaluation is not None
    gate = row.evaluation.gate
    facts = (
        f"Reference: {gate.reference}. Promise about: {gate.population}. Calibration: {gate.num_calibration} calls, "
        f"{gate.num_accepted} accepted, {gate.num_disagreements} of them disagree."
    )
    stays = f"<p><strong>Stays on the LLM:</strong> <bdi>{_text(row.reason)}</bdi></p>" if row.reason else ""
    heading = f"<h2>{row.number}. <bdi>{_text(row.task.name)}</bdi></h2>"
    return f"{heading}{stays}<p>{_text(facts)}</p>{_curve_picture(row)}{_arm_table(row)}{_gain(row.evaluation.arms)}"


def _curve_picture(row: _Row) -> str:
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
    axes.axhline(gate.epsilon, color="black", linestyle="--", label=f"epsilon {_number(gate.epsilon)}")
    chosen = _chosen_point(row)
    where = "no threshold was opened"
    if chosen:
        where = f"threshold {_number(gate.threshold)}: coverage {_percent(chosen['coverage'])}"
        where += f", disagreement {_percent(chosen['disagreement'])}"
        mark = {"marker": "D", "markersize": 9, "color": "#d55e00", "markeredgecolor": "black", "linestyle": "none"}
        axes.plot([chosen["coverage"]], [chosen["disagreement"]], label=f"threshold {_number(gate.threshold)}", **mark)
    top = min(1.0, max(3 * gate.epsilon, 1.5 * max(disagreement)))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.03 * top, top)
    axes.set_xlabel("coverage: share of validation calls accepted")
    axes.set_ylabel("disagreement among them")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize="small")
    last = curve[-1]
    alt = f"Disagreement against coverage on validation for {row.task.name}; epsilon {_number(gate.epsilon)}; {where}; at "
    alt += f"coverage {_percent(last['coverage'])} disagreement is {_percent(last['disagreement'])}"
    return _picture(figure, alt, f"On validation, {where}.")


def _chosen_point(row: _Row) -> Mapping[str, float] | None:
    """The drawn point that accepts most among those the threshold allows; the curve is thinned, so it may lie above."""
    assert row.evaluation is not None
    threshold = row.evaluation.gate.threshold
    if row.decision != _MOVES or threshold is None:
        return None
    return min(
        (p for p in row.evaluation.curve if p["threshold"] >= threshold), key=lambda p: p["threshold"], default=None
    )


def _arm_table(row: _Row) -> str:
    assert row.evaluation is not None
    header = ["Arm", "Test calls", "Coverage", "Answers kept", "Disagreements", "Disagreement", "95% interval"]
    by_definition = row.evaluation.gate.reference == "llm"
    llm = [
        "LLM (reference)" if by_definition else "LLM",
        *["-"] * 4,
        "0 by definition" if by_definition else "not measured",
    ]
    cells = [[*llm, "-"]]
    for arm in row.evaluation.arms:
        interval = f"{_percent(arm.interval[0])} to {_percent(arm.interval[1])}" if arm.num_kept else "no answers kept"
        counts = [str(arm.num_calls), _percent(arm.coverage), str(arm.num_kept), str(arm.num_disagreements)]
        cells.append([arm.name, *counts, _percent(arm.disagreement), interval])
    return _table(f"Arms on the test split, {row.number}. {row.task.name}", header, cells)


def _gain(arms: Sequence[Arm]) -> str:
    """How much more the specialist agrees than its base, in percentage points."""
    specialist = next((arm for arm in arms if arm.name == _SPECIALIST_ARMS[0] and arm.num_kept), None)
    base = next((arm for arm in arms if arm.name not in _SPECIALIST_ARMS and arm.num_kept), None)
    if specialist is None or base is None:
        return "<p>Gain of the specialist over its base: not measured.</p>"
    gain = base.num_disagreements / base.num_kept - specialist.num_disagreements / specialist.num_kept
    counts = (base.num_disagreements, base.num_kept, specialist.num_disagreements, specialist.num_kept)
    low, high = (100 * end for end in newcombe_interval(*counts))
    return (
        f"<p>Gain of the specialist over <bdi>{_text(base.name)}</bdi>: {100 * gain:+.1f} percentage points of "
        f"agreement (95% interval {low:+.1f} to {high:+.1f}, Newcombe, arms treated as independent). All intervals here "
        "treat test calls as independent; where a conversation has several, they are somewhat too narrow.</p>"
    )


def _losses_section(losses: Mapping[str, Mapping]) -> str:
    if not losses:
        return ""
    keys = list(dict.fromkeys(str(key) for metrics in losses.values() for key in metrics))
    cells = [[name, *(_value(metrics.get(key)) for key in keys)] for name, metrics in losses.items()]
    return "<h2>Fine-tunes</h2>" + _table("Last metrics of each fine-tune", ["Task", *keys], cells)


def _unassigned_section(unassigned: Mapping[str, int]) -> str:
    cells = [[reason, str(calls)] for reason, calls in sorted(unassigned.items(), key=lambda item: (-item[1], item[0]))]
    table = _table("Calls that belong to no task and stay on the LLM", ["Reason", "Calls"], cells)
    return "<h2>Unassigned calls</h2>" + (table if cells else "<p>Every call belongs to a task.</p>")


def _summary_section(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""
    ordered = [key for key in _SUMMARY_LABELS if key in summary] + [
        key for key in summary if key not in _SUMMARY_LABELS
    ]
    cells = [[_SUMMARY_LABELS.get(key, key), _value(summary[key], key in _PERCENT_KEYS)] for key in ordered]
    return "<h2>Money and latency</h2>" + _table("Measured while serving", ["Measure", "Value"], cells)


def _notes_section(notes: Sequence[str]) -> str:
    items = "".join(f"<li><bdi>{_text(note)}</bdi></li>" for note in notes)
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Escapes every cell; the wrapper scrolls sideways on small screens, by keyboard too."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td><bdi>{_text(cell)}</bdi></td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}"><table><caption>{_text(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _picture(figure: Figure, alt: str, caption: str) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    data = base64.b64encode(drawn.getvalue()).decode("ascii")
    return f'<figure><img alt="{_text(alt)}" src="data:image/png;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>'


def _page(body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Conversion report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>Conversion report</h1>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _drawable(name: str) -> str:
    """The picture's font lacks many characters, and a missing one is a warning; the task's number still tells it."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in name)
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 3] + "..."


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _value(value: Any, is_share: bool = False) -> str:
    """One table cell for a number, text, list or mapping of a summary."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return (
            " to ".join(_value(inner, is_share) for inner in value)
            if len(value) == 2
            else ", ".join(map(_value, value))
        )
    if is_share or isinstance(value, float):
        return _percent(value) if is_share else _number(value)
    return str(value)
