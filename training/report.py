"""A conversion's tasks, evaluations and losses -> one HTML page for the people who decide whether calls may move.

The page stands alone: no script, no outside resource (its own policy forbids both), pictures inline. Task names come
from traffic, so every text is escaped and pictures draw names as plain printable ASCII. It takes names, counts and
rates and never sees a message. Nothing is decided here: thresholds, bounds and intervals are shown as certified.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cluster.records import TaskSpec
from training.arm_tables import moved_tables, notes_of, tables_of
from training.evaluation import Evaluation, gain_over_base, validation_agreement
from training.forecast import describe
from training.page import cell, escape, make_page, make_table
from training.pictures import (
    MOVES,
    Row,
    draw_agents,
    draw_coverage,
    draw_losses,
    draw_map,
    draw_reliability,
    draw_volume,
    number,
    percent,
)
from training.reliability import coverage_by_epsilon
from training.replaceability import Moved
from training.selection import Selection
from training.snapshot import CurationCounts
from training.text_graders import SelfAgreement, describe_errors
from training.usefulness import Usefulness, describe_usefulness
from training.worth import Worth

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
    selection: Selection | None = None,
    curation: CurationCounts | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}),
    usefulness: Sequence[Usefulness] = (),
    worth: Mapping[str, Worth] = MappingProxyType({}),
    moved: Moved | None = None,
    teacher: Mapping[str, SelfAgreement] = MappingProxyType({}),
) -> None:
    """Write the page to `path`, replacing it and creating its folder.

    Args:
        evaluations: at most one per task of `tasks`.
        refused: task_id -> reason; a reason here outweighs an open gate.
        unassigned: reason -> calls that belong to no task.
        losses: task_id -> last metrics of its fine-tune.
        summary: what was measured while serving, such as cost_ratio, share_off_llm, p50_ms, p99_ms; None before that.
        notes: sentences on how the numbers came about, shown as they are.
        selection: how the base was chosen; None where no task could be learned.
        curation: what became of every captured call; None leaves the section out.
        left_out: task_id -> which calls of a learned task stay on the LLM.
        usefulness: what was measured of tasks that might be several.
        worth: task_id -> costs of its arms, and how they stand beside the LLM, a random router and an oracle.
        moved: share of calls, tokens and money, and of each agent's calls; None leaves the section out.
        teacher: task_id -> how often the LLM agrees with itself, where that was measured.
    """
    rows = _decide(tasks, evaluations, refused)
    names = {row.task.task_id: f"{row.number}. {row.task.name}" for row in rows}
    parts = [
        f'<p class="lead">{escape(_headline(rows, moved))}</p>',
        _moved_section(moved),
        "<h2>Tasks</h2>",
        _task_table(rows),
        draw_volume(rows),
        draw_map(rows),
        _curation_section(curation),
        _agreement_section(rows, left_out, usefulness, teacher),
        *(_task_section(row, worth.get(row.task.task_id)) for row in rows if row.evaluation),
        _selection_section(selection),
        _losses_section({names.get(task_id, task_id): metrics for task_id, metrics in losses.items()}),
        _unassigned_section(unassigned),
        _summary_section(summary),
        _notes_section(notes),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        make_page("Conversion report", "\n".join(part for part in parts if part)), encoding="utf-8", errors="replace"
    )


def _decide(tasks: Sequence[TaskSpec], evaluations: Sequence[Evaluation], refused: Mapping[str, str]) -> list[Row]:
    found = {e.task_id: e for e in evaluations}
    assert found.keys() | refused.keys() <= {t.task_id for t in tasks}, "evaluated or refused, but not a task"
    rows = []
    for place, task in enumerate(sorted(tasks, key=lambda t: (-t.num_calls, t.task_id)), 1):
        evaluation = found.get(task.task_id)
        reason = refused.get(task.task_id)
        if reason is None and (evaluation is None or not evaluation.gate.is_open):
            reason = (evaluation.gate.refused if evaluation else None) or "not evaluated"
        rows.append(Row(place, task, evaluation, reason))
    return rows


def _headline(rows: Sequence[Row], measured: Moved | None) -> str:
    moved = [row for row in rows if row.decision == MOVES]
    if not moved:
        return f"No calls moved: all {len(rows)} tasks stay on the LLM."
    share = sum(row.task.share_calls for row in moved)
    kept = sum(row.task.share_calls * row.evaluation.gate.coverage for row in moved if row.evaluation)
    told = f"about {percent(kept)}"
    total = measured and measured.totals.get("calls")
    if total:
        told = f"{percent(total.share)} (95% interval {percent(total.interval[0])} to {percent(total.interval[1])})"
    return (
        f"{len(moved)} of {len(rows)} tasks moved to a specialist. They make up {percent(share)} of the captured calls, "
        f"and by calibration their specialists answer {told} of all calls; the rest goes to the LLM."
    )


def _moved_section(moved: Moved | None) -> str:
    if moved is None:
        return ""
    totals = "".join(make_table(one.caption, one.header, one.rows) for one in moved_tables(moved))
    told = (
        "By calibration: of every task that moved, the share of calibration calls that its gate keeps, weighed by what was "
        "captured; tokens and money take kept calls to be like the others of their task. Intervals are of these "
        "calls, not of another month's mix. The paper (arXiv 2506.02153) guessed the shares of three agents by reading their "
        "code; no guess is known of others."
    )
    return f"<h2>What moves</h2>{draw_agents(moved.agents)}{totals}<p>{escape(told)}</p>"


def _task_table(rows: Sequence[Row]) -> str:
    header = ["No.", "Task", "Kind", "Calls", "Share", "Decision", "Why it stays", "Threshold", "Coverage"]
    header += ["Certified bound", "Epsilon", "Delta"]
    cells = []
    for row in rows:
        gate = row.evaluation.gate if row.evaluation else None
        moved = gate if row.decision == MOVES else None
        promise = [number(gate.epsilon), number(gate.delta)] if gate else ["-", "-"]
        certified = ["-", "-", "-"]
        if moved:
            certified = [number(moved.threshold), percent(moved.coverage), percent(moved.upper_bound)]
        about = [str(row.number), row.task.name, row.task.kind, str(row.task.num_calls), percent(row.task.share_calls)]
        cells.append([*about, row.decision, row.reason or "-", *certified, *promise])
    table = make_table("Tasks by volume", header, cells)
    return table + (
        "<p>The bound promises: among accepted answers the share that disagrees with the reference is at most this, except "
        "with probability delta. Coverage is the share of calibration calls at or above the threshold.</p>"
    )


def _agreement_section(
    rows: Sequence[Row],
    left_out: Mapping[str, str],
    usefulness: Sequence[Usefulness],
    teacher: Mapping[str, SelfAgreement],
) -> str:
    """How often specialists agree on validation, and why tasks are together or apart."""
    measured = {task_id: describe_usefulness(one) for one in usefulness for task_id in one.task_ids}
    cells = []
    for row in rows:
        task_id = row.task.task_id
        told = [measured.get(task_id, "-"), left_out.get(task_id, "-")]
        if row.evaluation or told != ["-", "-"]:
            share = percent(validation_agreement(row.evaluation)) if row.evaluation else "-"
            cells.append([f"{row.number}. {row.task.name}", share, _ceiling(teacher.get(task_id)), *told])
    header = ["Task", "Validation agreement", "The LLM with itself (ceiling)", "Together or apart", "Calls left out"]
    return (
        "<h2>Agreement on validation</h2>" + make_table("Specialists on validation calls", header, cells)
        if cells
        else ""
    )


def _ceiling(one: SelfAgreement | None) -> str:
    if one is None:
        return "not measured"
    low, high = one.interval
    share = percent(one.num_agreements / one.num_answered)
    return f"{share} of {one.num_answered} ({percent(low)} to {percent(high)})"


def _task_section(row: Row, worth: Worth | None) -> str:
    assert row.evaluation is not None
    gate = row.evaluation.gate
    facts = (
        f"Reference: {gate.reference}. Promise about: {gate.population}. Calibration: {gate.num_calibration} calls, "
        f"{gate.num_accepted} accepted, {gate.num_disagreements} of them disagree."
    )
    if gate.num_counted:
        facts += (
            f" Counted for the bound, by a draw that knows no answer: {gate.num_counted}, of which "
            f"{gate.num_counted_disagreements} disagree."
        )
    stays = f"<p><strong>Stays on the LLM:</strong> <bdi>{escape(row.reason)}</bdi></p>" if row.reason else ""
    heading = f"<h2>{row.number}. <bdi>{escape(row.task.name)}</bdi></h2>"
    arms = [
        make_table(f"{one.caption}, {row.number}. {row.task.name}", one.header, one.rows)
        for one in tables_of(row.evaluation, worth)
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in (notes_of(worth) if worth else ()))
    arms.append(f"<ul>{notes}</ul>" if notes else "")
    if row.evaluation.grader_errors:
        notes = escape(describe_errors(row.evaluation.grader_errors))
        arms.append(f"<p>{notes}</p>")
    parts = [
        draw_coverage(row),
        _epsilons(row),
        draw_reliability(row),
        *arms,
        _gain(row.evaluation),
        _extraction(row.evaluation),
    ]
    return f"{heading}{stays}<p>{escape(facts)}</p>{''.join(parts)}"


def _epsilons(row: Row) -> str:
    """How much could be kept within other promises, as validation has it."""
    assert row.evaluation is not None
    found = coverage_by_epsilon(row.evaluation.curve)
    cells = [[percent(epsilon), percent(likely), percent(sure)] for epsilon, likely, sure in found]
    header = ["Epsilon", "Coverage within it", "Coverage within it, upper end of the 95% interval"]
    caption = f"Coverage for every epsilon, by validation (no promise), {row.number}. {row.task.name}"
    return make_table(caption, header, cells) if row.evaluation.curve else ""


def _extraction(evaluation: Evaluation) -> str:
    found = evaluation.extraction
    if found is None:
        return ""
    low, high = found.interval
    return (
        f"<p>Memorised: of {found.num_planted} secrets planted in its train split it says {found.num_said} "
        f"(95% interval {percent(low)} to {percent(high)}).</p>"
    )


def _gain(evaluation: Evaluation) -> str:
    gain = gain_over_base(evaluation)
    if gain is None:
        return "<p>Gain of the specialist over its base: not measured.</p>"
    points, low, high = (100 * share for share in (gain.gain, *gain.interval))
    return (
        f"<p>Gain of the specialist over <bdi>{escape(gain.base_arm)}</bdi>: {points:+.1f} percentage points of "
        f"agreement (95% interval {low:+.1f} to {high:+.1f}, Newcombe, arms treated as independent). All intervals here "
        "treat test calls as independent; where a conversation has several, they are somewhat too narrow.</p>"
    )


def _curation_section(counts: CurationCounts | None) -> str:
    if counts is None:
        return ""
    header = ["Split", "Sessions", "Calls", "Examples"]
    cells = [
        [split, *(str(of.get(split, 0)) for of in (counts.num_sessions, counts.num_source_calls, counts.num_examples))]
        for split in counts.num_examples
    ]
    drawn = ", ".join(f"{num} {how}" for how, num in counts.test_drawn.items() if num)
    clients = (
        f"The calls are of {counts.num_clients} clients."
        if counts.num_clients > 1
        else "The whole store has one client: where a task needs several, its sessions are counted instead."
    )
    facts = (
        f"{counts.num_calls} calls, {sum(counts.dropped.values())} of them left out. Sessions drawn for or against "
        f"test: {drawn}; drawn by time, test is the newest sessions. {clients} Requests of train with several answers: "
        f"{counts.num_train_requests_with_several_answers}."
    )
    parts = [f"<h2>Curation</h2><p>{escape(facts)}</p>", make_table("Calls by split", header, cells)]
    for caption, numbers in (
        ("Calls left out", counts.dropped),
        ("Calls with a flag, kept for a person to look at", counts.flagged),
        ("Personal values replaced in what is learned from", counts.redacted),
    ):
        rows = [[name, str(num)] for name, num in sorted(numbers.items(), key=lambda item: (-item[1], item[0]))]
        parts.append(
            make_table(
                caption,
                [
                    "Reason" if numbers is counts.dropped else "Kind",
                    "Calls" if numbers is not counts.redacted else "Values",
                ],
                rows,
            )
            if rows
            else ""
        )
    return "".join(parts)


def _selection_section(selection: Selection | None) -> str:
    if selection is None:
        return ""
    cells = []
    for one in selection.candidates:
        few_shot = percent(one.few_shot.score) if one.few_shot else "-"
        scores = [percent(one.rungs[0].score), few_shot, percent(one.rungs[-1].score)] if one.rungs else ["-"] * 3
        cells.append([one.name, one.status, _millions(one.parameters), *scores, one.reason])
    header = ["Name", "Status", "Parameters", "Zero-shot", "Few-shot", "Probe", "Reason"]
    told = [selection.rule, selection.budget, describe(selection.forecast) if selection.forecast else ""]
    sentences = "".join(f"<p>{escape(line)}</p>" for line in told if line)
    return f"<h2>Base model</h2>{sentences}" + make_table("Candidates for the base model", header, cells)


def _millions(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:,.1f}M"


def _losses_section(losses: Mapping[str, Mapping]) -> str:
    if not losses:
        return ""
    keys = [k for k in dict.fromkeys(str(key) for metrics in losses.values() for key in metrics) if k != "curve"]
    cells = [[name, *(cell(metrics.get(key)) for key in keys)] for name, metrics in losses.items()]
    curves = draw_losses({name: metrics.get("curve") or () for name, metrics in losses.items()})
    return f"<h2>Fine-tunes</h2>{curves}" + make_table("Last metrics of each fine-tune", ["Task", *keys], cells)


def _unassigned_section(unassigned: Mapping[str, int]) -> str:
    cells = [[reason, str(calls)] for reason, calls in sorted(unassigned.items(), key=lambda item: (-item[1], item[0]))]
    table = make_table("Calls that belong to no task and stay on the LLM", ["Reason", "Calls"], cells)
    return "<h2>Unassigned calls</h2>" + (table if cells else "<p>Every call belongs to a task.</p>")


def _summary_section(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""
    others = [key for key in summary if key not in _SUMMARY_LABELS and key != "tasks"]
    ordered = [*(key for key in _SUMMARY_LABELS if key in summary), *others]
    cells = [[_SUMMARY_LABELS.get(key, key), cell(summary[key], key in _PERCENT_KEYS)] for key in ordered]
    return "<h2>Money and latency</h2>" + make_table("Measured while serving", ["Measure", "Value"], cells)


def _notes_section(notes: Sequence[str]) -> str:
    items = "".join(f"<li><bdi>{escape(note)}</bdi></li>" for note in notes)
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""
