"""The arms of one task as rows of text, the same in the report's page and in a terminal.

Nothing is decided here; what is not known is a dash, and why it is not stands in `notes_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from training.arms import LLM_ARM, Arm
from training.evaluation import Evaluation
from training.pictures import number, percent
from training.replaceability import PAPER_GUESSES, Moved, Replaceability
from training.worth import MATCHED_AT, UTILISATIONS, Control, Regret, Worth


class Table(NamedTuple):
    """Cells of one table."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def quality_table(evaluation: Evaluation) -> Table:
    """What each arm kept and how often it was right."""
    by_llm = evaluation.gate.reference == "llm"
    pairs = next((arm.against_gold for arm in evaluation.arms if arm.against_gold), None)
    gold = "-" if pairs is None else _share(pairs.both + pairs.only_llm, pairs.num_calls)
    llm = ("LLM (reference)" if by_llm else LLM_ARM, *["-"] * 4, "0 by definition" if by_llm else "not measured", "-")
    header = ("Arm", "Test calls", "Coverage", "Answers kept", "Disagreements", "Disagreement", "95% interval")
    rows = ((*llm, gold), *(_quality(arm) for arm in evaluation.arms))
    return Table("Arms on the test split", (*header, "Right by gold"), rows)


def cost_table(worth: Worth) -> Table:
    """What a right answer of each arm costs, by how much of its hours a replica is used."""
    header = ("Arm", "Test calls", "Right", *(f"USD per 1,000 right at {percent(u)} used" for u in UTILISATIONS))
    rows = tuple(
        (
            one.name,
            str(one.num_calls),
            "-" if one.num_right is None else _share(one.num_right, one.num_calls),
            *(number(None if usd is None else 1000 * usd) for usd in one.usd_per_right),
        )
        for one in worth.costs
    )
    by = "gold says" if worth.truth == "gold" else "the LLM says"
    return Table(f"Cost per right answer (right: as {by})", header, rows)


def noninferiority_table(worth: Worth) -> Table:
    """Each arm against the LLM, both by gold; no rows without gold."""
    header = ("Arm", "Calls with gold", "LLM right", "Arm right", "Margin", "p", "Non-inferior")
    rows = tuple(
        (
            one.name,
            str(one.num_calls),
            percent(one.llm_share),
            percent(one.arm_share),
            percent(one.margin),
            number(one.p_value),
            "yes" if one.holds else "not shown",
        )
        for one in worth.noninferiority
    )
    return Table("Non-inferior to the LLM by gold (paired, Tango)", header, rows)


def notes_of(worth: Worth) -> list[str]:
    """Sentences: the random router, the oracle, and what prices are missing."""
    lines = [_control(worth.control)] if worth.control else []
    lines += [_regret(worth.regret)] if worth.regret else []
    if not worth.noninferiority:
        lines.append("Non-inferiority by gold: not tested, no test call has a gold answer beside the LLM's.")
    return [*lines, *_missing(worth)]


def moved_tables(moved: Moved) -> list[Table]:
    """What a release moves, and how replaceable each agent is."""
    header = ("Of all captured", "Moved off the LLM", "95% interval")
    rows = tuple((name, *_moved(one)) for name, one in moved.totals.items())
    agents = tuple(
        (one.agent, str(one.num_calls), *_moved(one), percent(one.share_known), percent(one.guess))
        for one in moved.agents
    )
    guesses = ", ".join(f"{name} {percent(share)}" for name, share in PAPER_GUESSES.items())
    about = ("Agent", "Calls", "Replaceable", "95% interval", "Of its calls measured or known to stay", "Paper's guess")
    return [
        Table("Calls, tokens and money", header, rows),
        Table(f"Replaceability of each agent (the paper's guesses: {guesses})", about, agents),
    ]


def _moved(one: Replaceability) -> tuple[str, str]:
    return percent(one.share), f"{percent(one.interval[0])} to {percent(one.interval[1])}"


def _quality(arm: Arm) -> tuple[str, ...]:
    interval = f"{percent(arm.interval[0])} to {percent(arm.interval[1])}" if arm.num_kept else "no answers kept"
    counts = (str(arm.num_calls), percent(arm.coverage), str(arm.num_kept), str(arm.num_disagreements))
    pairs = arm.against_gold
    gold = "-" if pairs is None else _share(pairs.both + pairs.only_arm, pairs.num_calls)
    return (arm.name, *counts, percent(arm.disagreement), interval, gold)


def _control(control: Control) -> str:
    low, high = (100 * end for end in control.interval)
    gain = 100 * (control.gate_right - control.random_right)
    matched = f"costs as much at {percent(MATCHED_AT)} used" if control.matched_by == "cost" else "keeps as many calls"
    return (
        f"Random router that {matched}: sends {percent(control.share_sent)} of calls to the specialist by lot and is right in "
        f"{percent(control.random_right)}; the gate in {percent(control.gate_right)}, {gain:+.1f} points (95% interval "
        f"{low:+.1f} to {high:+.1f})."
    )


def _regret(regret: Regret) -> str:
    needless, wrong = (f"{percent(a)} to {percent(b)}" for a, b in (regret.needless_interval, regret.wrong_interval))
    usd = "" if regret.usd_per_call is None else f" It costs {1000 * regret.usd_per_call:+.4f} USD per 1,000 calls."
    return (
        f"Regret to the oracle router: {percent(regret.needless)} of calls go to the LLM though the specialist is right "
        f"(95% interval {needless}), {percent(regret.wrong)} are kept wrong though the LLM is right ({wrong}); the oracle "
        f"sends {percent(regret.oracle_to_llm)} to the LLM, the gate {percent(regret.gate_to_llm)}.{usd}"
    )


def _missing(worth: Worth) -> list[str]:
    rates = worth.rates
    lines = []
    if not rates.replica_usd_per_hour:
        lines.append("A specialist's cost is not known: set prices.replica_usd_per_hour.")
    if not rates.tokens_per_s:
        lines.append("A specialist's cost is not known: no tokens a second were measured by this validation.")
    if worth.costs[0].usd_per_call[0] is None:
        lines.append(
            "The LLM's cost is not known: set upstream.0.prompt_usd_per_million and upstream.0.completion_usd_per_million."
        )
    if rates.tokens_per_s:
        what = "replica" if rates.num_replicas == 1 else f"{rates.num_replicas} replicas"
        price = f" at {rates.replica_usd_per_hour:g} USD an hour" if rates.replica_usd_per_hour else ""
        lines.append(f"The validation engine took {rates.tokens_per_s:,.0f} tokens a second ({what}{price}).")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({percent(part / whole)})" if whole else "-"


def tables_of(evaluation: Evaluation, worth: Worth | None) -> Sequence[Table]:
    """All tables of one task that have rows."""
    found = [quality_table(evaluation)]
    if worth is not None:
        found += [cost_table(worth), noninferiority_table(worth)]
    return [table for table in found if table.rows]
