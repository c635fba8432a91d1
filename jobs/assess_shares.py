"""Verdicts on call sites -> shares of an agent's calls, with intervals over draws of whole sessions.

A session's calls hang together, so sessions are drawn with replacement, not calls. In each draw a site recurs or not by
its calls in that draw, and keeps a share of them that is drawn as it was measured; what else was decided of it is held,
as it would have to be learned anew. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from cluster.records import Record

Verdict = Literal["shown", "plausible", "unknown", "stays"]
VERDICTS: tuple[Verdict, ...] = ("shown", "plausible", "unknown", "stays")
NUM_DRAWS = 1_000
_TAILS = (0.025, 0.975)


class Share(Record):
    """Part of an agent's calls."""

    share: float
    interval: tuple[float, float] | None
    """95%; None with fewer than two sessions."""


class SiteCalls(NamedTuple):
    """The calls of one site and what was decided of it."""

    sessions: Sequence[str]
    """[calls], the session of each."""
    num_tokens: Sequence[int]
    """[calls], prompt and answer of each."""
    can_move: Sequence[bool]
    """[calls], whether the answer of each is of a form that could be replaced."""
    coverage: float
    """Share of its fitting calls that is shown to be replaceable."""
    num_measured: int
    """Calls that the coverage was measured on; 0 where it was not."""
    rest_stays: bool
    """Whether its other calls stay; else they are plausible."""


class Tally:
    """All calls of one agent."""

    def __init__(self, sites: Sequence[SiteCalls], staying: Sequence[str], min_calls: int) -> None:
        """
        Args:
            staying: sessions of the calls that stay whatever their site is, one for each call.
            min_calls: calls from which a site recurs.
        """
        self._min_calls = min_calls
        self._drawn: dict[int, np.ndarray] = {}
        names = sorted({s for site in sites for s in site.sessions} | set(staying))
        places = {name: place for place, name in enumerate(names)}
        self.num_sessions = len(names)
        self._site = np.repeat(np.arange(len(sites)), [len(site.sessions) for site in sites])
        self._session = np.array([places[s] for site in sites for s in site.sessions], int)
        self._tokens = np.array([n for site in sites for n in site.num_tokens], int)
        self._can_move = np.array([can for site in sites for can in site.can_move], bool)
        self._rest_stays = np.array([site.rest_stays for site in sites], bool)
        self._coverage = np.array([site.coverage for site in sites], float)
        self._num_measured = np.array([max(1, site.num_measured) for site in sites], int)
        self._staying = np.bincount([places[s] for s in staying], minlength=len(names))

    def point(self, window: int) -> dict[Verdict, float]:
        """The shares of the calls as they are; they add up to 1, or are all 0 without calls.

        Args:
            window: most tokens of prompt and answer together.
        """
        shares = self._weigh(np.ones((1, self.num_sessions)), self._coverage[None], window)[0]
        return {verdict: float(share) for verdict, share in zip(VERDICTS, shares, strict=True)}

    def shares(self, window: int) -> dict[str, Share]:
        """Each verdict's share with its interval."""
        point = self.point(window)
        return {v: Share(share=point[v], interval=self.interval_of(window, (v,))) for v in VERDICTS}

    def interval_of(self, window: int, verdicts: Sequence[Verdict]) -> tuple[float, float] | None:
        """95% interval of some verdicts' share together; the same draws whatever is asked."""
        if self.num_sessions < 2:
            return None
        columns = [VERDICTS.index(verdict) for verdict in verdicts]
        low, high = np.quantile(self._draws(window)[:, columns].sum(axis=1), _TAILS)
        return float(low), float(min(1.0, high))

    def _draws(self, window: int) -> np.ndarray:
        """Shares [NUM_DRAWS, verdicts], drawn once for each window."""
        if window not in self._drawn:
            generator = np.random.default_rng(0)
            chances = np.full(self.num_sessions, 1 / self.num_sessions)
            weights = generator.multinomial(self.num_sessions, chances, size=NUM_DRAWS)
            kept = generator.binomial(self._num_measured, self._coverage, size=(NUM_DRAWS, len(self._coverage)))
            self._drawn[window] = self._weigh(weights, kept / self._num_measured, window)
        return self._drawn[window]

    def _weigh(self, weights: np.ndarray, coverage: np.ndarray, window: int) -> np.ndarray:
        """Shares [draws, verdicts] where each session counts as often as `weights` [draws, sessions] says.

        Args:
            coverage: [draws, sites].
        """
        fits = (self._tokens <= window) & self._can_move
        shares = np.zeros((len(weights), len(VERDICTS)))
        num_sites = len(self._coverage)
        for row, own, kept in zip(shares, weights, coverage, strict=True):
            per_call = own[self._session]
            calls = np.bincount(self._site, per_call, num_sites)
            recurs = calls >= self._min_calls
            fitting = np.bincount(self._site, per_call * fits, num_sites) * recurs
            shown = fitting * kept
            plausible = np.where(self._rest_stays, 0.0, fitting - shown)
            unknown = calls * ~recurs
            stays = (calls - shown - plausible - unknown).sum() + own @ self._staying
            row[:] = (shown.sum(), plausible.sum(), unknown.sum(), stays)
        totals = shares.sum(axis=1, keepdims=True)
        return np.divide(shares, totals, out=np.zeros_like(shares), where=totals > 0)
