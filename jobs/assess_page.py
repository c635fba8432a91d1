"""An assessment -> one page with pictures, and a table for a terminal. Decides nothing; every text from outside is escaped."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence

from jobs.assess import AgentReport, SiteReport
from jobs.assess_shares import VERDICTS, Verdict
from jobs.assess_source import SourceSite
from training.page import make_page, make_table
from training.pictures import percent
from training.replaceability import PAPER_GUESSES

_COLOURS: dict[Verdict, str] = {"shown": "#0072b2", "plausible": "#56b4e9", "unknown": "#d9d9d9", "stays": "#e69f00"}
_MEANING: dict[Verdict, str] = {
    "shown": "a repeater of known answers passes the gate",
    "plausible": "not ruled out, closed or structured, recurs, fits",
    "unknown": "seen too seldom to say",
    "stays": "stays on the LLM",
}
_LEFT, _WIDE, _ROW = 190, 560, 34
_MAX_SITES = 200
SITE_HEADER = (
    "site",
    "calls",
    "share",
    "answers",
    "prompt p50 / p99",
    "fits",
    "differs",
    "closed",
    "repeater",
    "verdict",
)
SOURCE_HEADER = ("where", "function", "library", "model", "prompt", "tools", "answers", "temperature")


def write_page(path: pathlib.Path, reports: Sequence[AgentReport], criterion: Sequence[str]) -> None:
    """Write the page of captured calls, replacing it and creating its folder."""
    parts = [
        *(f'<p class="lead">{html.escape(sentence_of(one))}</p>' for one in reports),
        _draw_shares(reports),
        make_table("Beside the paper's estimates (arXiv 2506.02153, appendix B)", PAPER_HEADER, paper_rows(reports)),
        "<p>The paper's numbers are its authors' judgement after reading the agents' code; they took templated text and "
        "routine code for replaceable, which no comparison with the LLM's answers can certify.</p>",
        f"<h2>What counts</h2><ul>{''.join(f'<li>{html.escape(one)}</li>' for one in criterion)}</ul>",
        *(_agent_section(one) for one in reports),
    ]
    _write(path, "Assessment of captured calls", parts)


def write_source_page(path: pathlib.Path, sites: Sequence[SourceSite], cannot_show: Sequence[str]) -> None:
    """Write the page of call sites in source code, replacing it and creating its folder."""
    parts = [
        f'<p class="lead">{len(sites)} places that call a language model.</p>',
        make_table("Call sites in the source", SOURCE_HEADER, source_rows(sites)),
        f"<h2>What source code cannot show</h2><ul>{''.join(f'<li>{html.escape(one)}</li>' for one in cannot_show)}</ul>",
    ]
    _write(path, "Call sites of an agent", parts)


def sentence_of(report: AgentReport) -> str:
    """What was found of one agent, in one sentence."""
    shares, (low, high) = report.shares, report.replaceable.interval
    return (
        f"{report.agent}: of {report.num_calls} calls {percent(shares['shown'].share)} are shown to be replaceable, "
        f"{percent(shares['plausible'].share)} more are not ruled out, of {percent(shares['unknown'].share)} nothing is "
        f"known, and {percent(shares['stays'].share)} stay (95% interval of what may be replaceable {percent(low)} to "
        f"{percent(high)})."
    )


PAPER_HEADER = ("agent", "calls", *VERDICTS, "may be replaceable", "paper's estimate")


def paper_rows(reports: Sequence[AgentReport]) -> list[list[str]]:
    """Each agent's shares beside the paper's estimate, and the paper's other agents, of which there are no calls."""
    rows = []
    for one in reports:
        shares = [_with_interval(one.shares[v].share, one.shares[v].interval) for v in VERDICTS]
        low, high = one.replaceable.interval
        guess = one.replaceable.guess
        rows.append([one.agent, str(one.num_calls), *shares, f"{percent(low)} to {percent(high)}", _guess(guess)])
    named = {one.replaceable.guess for one in reports}
    others = [(name, guess) for name, guess in PAPER_GUESSES.items() if guess not in named]
    return rows + [[name, "none here", *["-"] * 4, "-", _guess(guess)] for name, guess in others]


def site_rows(report: AgentReport) -> list[list[str]]:
    """One row for each call site, most calls first."""
    return [_site_row(site) for site in report.sites]


def source_rows(sites: Sequence[SourceSite]) -> list[list[str]]:
    """One row for each place in the source."""
    return [
        [
            f"{one.path}:{one.line}",
            one.function,
            one.library,
            one.model or "computed",
            one.prompt,
            ", ".join(one.tools) if one.tools else one.tools_are,
            one.answers,
            "-" if one.temperature is None else f"{one.temperature:g}",
        ]
        for one in sites
    ]


def _site_row(site: SiteReport) -> list[str]:
    differs = "-" if site.conflict is None else f"{percent(site.conflict)} of {site.num_repeated}"
    agreement = site.stand_in and site.stand_in.agreement
    return [
        f"{site.name} ({site.site})",
        str(site.num_calls),
        percent(site.share),
        f"{site.kind} {percent(site.kind_share)}",
        f"{site.prompt_tokens_p50} / {site.prompt_tokens_p99}",
        percent(site.fitting_share),
        differs,
        percent(site.closed_share),
        percent(agreement),
        f"{site.verdict}: {site.reason}",
    ]


def _agent_section(report: AgentReport) -> str:
    rows = site_rows(report)
    more = f"<p>{len(rows) - _MAX_SITES} smaller sites are in the JSON.</p>" if len(rows) > _MAX_SITES else ""
    windows = [[f"{int(w):,}", percent(share)] for w, share in report.not_ruled_out_by_window.items()]
    left = [[reason, str(n)] for reason, n in [*report.left_out.items(), *report.not_counted.items()]]
    cannot = "".join(f"<li>{html.escape(one)}</li>" for one in report.cannot_show)
    return "".join(
        (
            f"<h2>{html.escape(report.agent)}</h2>",
            make_table(f"Call sites of {report.agent}", SITE_HEADER, rows[:_MAX_SITES]) + more,
            make_table("Shown or not ruled out, if the window were another", ("tokens", "share"), windows),
            make_table("Calls left out", ("reason", "calls"), left) if left else "",
            f"<h3>What these calls cannot show</h3><ul>{cannot}</ul>",
        )
    )


def _draw_shares(reports: Sequence[AgentReport]) -> str:
    """A bar for each agent, its verdicts side by side; a mark where the paper's estimate lies."""
    height = _ROW * len(reports) + 70
    parts = [_legend()]
    for place, one in enumerate(reports):
        top, left = 40 + place * _ROW, float(_LEFT)
        parts.append(_label(_LEFT - 8, top + 16, one.agent[:24], "end"))
        for verdict in VERDICTS:
            wide = _WIDE * one.shares[verdict].share
            parts.append(f'<rect x="{left:.1f}" y="{top}" width="{wide:.1f}" height="22" fill="{_COLOURS[verdict]}"/>')
            if wide > 40:
                parts.append(_label(left + wide / 2, top + 16, percent(one.shares[verdict].share), "middle"))
            left += wide
        if one.replaceable.guess is not None:
            x = _LEFT + _WIDE * one.replaceable.guess
            parts.append(f'<path d="M{x:.1f} {top - 3}v28" stroke="#000" stroke-width="2"/>')
            parts.append(_label(x + 4, top + 34, "paper's estimate", "start"))
    alt = html.escape(" ".join(map(sentence_of, reports)))
    meaning = "; ".join(f"{verdict}: {_MEANING[verdict]}" for verdict in VERDICTS)
    return (
        f'<figure><svg role="img" aria-label="{alt}" viewBox="0 0 {_LEFT + _WIDE + 20} {height}" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="13">{"".join(parts)}</svg>'
        f"<figcaption>Share of each agent's calls by verdict. {meaning}.</figcaption></figure>"
    )


def _legend() -> str:
    parts, left = [], 8
    for verdict in VERDICTS:
        parts.append(f'<rect x="{left}" y="6" width="14" height="14" fill="{_COLOURS[verdict]}"/>')
        parts.append(_label(left + 20, 18, verdict, "start"))
        left += 120
    return "".join(parts)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _with_interval(share: float, interval: tuple[float, float] | None) -> str:
    """A verdict on no site has no calls in any draw, and on all sites has all: that is no narrow interval, but none."""
    is_drawn = interval is not None and interval[0] < interval[1]
    return percent(share) + (f" ({percent(interval[0])} to {percent(interval[1])})" if interval and is_drawn else "")


def _guess(guess: float | None) -> str:
    return "-" if guess is None else f"{guess:.0%}"


def _write(path: pathlib.Path, title: str, parts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make_page(title, "\n".join(parts)), encoding="utf-8", errors="replace")
