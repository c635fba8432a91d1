"""How much of each agent's LLM calls small models can answer: one share with an interval, beside the guesses of the paper.

Facts come by call site (or task) and agent, from whoever measured them: a gate's calibration calls after a conversion, or
an estimate before one. A site that was measured has the share of its calls that is kept within the promise; one that is
known to stay has none; of one that nothing is known of no call counts, and the interval reaches to all of them. Weights
are the agent's own captured calls: the interval speaks of these calls, not of another month's mix. Pure.

Sources: Belcak et al., arXiv 2506.02153, section 5 and appendix B (40 to 70% of the LLM calls of three agents, guessed from
reading their code); Zou and Donner 2008, "Construction of confidence limits about effect measures", Statistics in Medicine
27 (limits of a sum from those of its independent parts); Clopper and Pearson 1934.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import NamedTuple

from cluster.records import Record
from training.gate import clopper_pearson_interval

PAPER_GUESSES = MappingProxyType({"MetaGPT": 0.60, "Open Operator": 0.40, "Cradle": 0.70})
"""Share of the agent's LLM calls that the paper's authors think small models could take."""


class SiteFacts(NamedTuple):
    """What is known of one agent's calls at one call site."""

    agent: str
    site: str
    """Call site or task, for people."""
    num_calls: int
    """The agent's captured calls there, at least 0: its weight."""
    num_measured: int = 0
    """Independent calls, at most one per session, on which keeping was measured; 0 where it was not."""
    num_kept: int = 0
    """Of these, the ones that a small model may answer within the promise."""
    stays: str = ""
    """Why none of its calls moves, where that is known; then nothing was measured, and none is replaceable."""


class Replaceability(Record):
    """How much of one agent's calls small models can answer."""

    agent: str
    num_calls: int
    share: float
    """Of the agent's calls, in [0, 1]; what nothing is known of counts as not replaceable."""
    interval: tuple[float, float]
    """95% unless another level was asked for."""
    share_known: float
    """Of the agent's calls, those at sites that were measured or are known to stay."""
    guess: float | None = None
    """The paper's, where it names this agent."""


def replaceability(facts: Iterable[SiteFacts], level: float = 0.95) -> list[Replaceability]:
    """One number for each agent, most calls first.

    Args:
        level: of each agent's interval, in (0, 1).
    """
    by_agent: dict[str, list[SiteFacts]] = defaultdict(list)
    for one in facts:
        assert 0 <= one.num_kept <= one.num_measured and one.num_calls >= 0, one
        assert not (one.stays and one.num_measured), one
        by_agent[one.agent].append(one)
    found = [_of_agent(agent, sites, level) for agent, sites in by_agent.items()]
    return sorted(found, key=lambda one: (-one.num_calls, one.agent))


def guess_for(agent: str) -> float | None:
    """The paper's guess for an agent of this name, however it is written; None for all others."""
    plain = {_plain(name): guess for name, guess in PAPER_GUESSES.items()}
    return plain.get(_plain(agent))


def _of_agent(agent: str, sites: Sequence[SiteFacts], level: float) -> Replaceability:
    num_calls = sum(site.num_calls for site in sites)
    share = below = above = known = 0.0
    for site in sites:
        weight = site.num_calls / num_calls if num_calls else 0.0
        if site.stays:
            known += weight
            continue
        low, high = clopper_pearson_interval(site.num_kept, site.num_measured, level) if site.num_measured else (0, 1)
        kept = site.num_kept / site.num_measured if site.num_measured else 0.0
        known += weight if site.num_measured else 0.0
        share += weight * kept
        if site.num_measured:
            below += (weight * (kept - low)) ** 2
            above += (weight * (high - kept)) ** 2
    # Ignorance is no sampling error: it adds up in full.
    unknown = max(0.0, 1.0 - known) if num_calls else 1.0
    interval = (max(0.0, share - math.sqrt(below)), min(1.0, share + math.sqrt(above) + unknown))
    facts = {"share": share, "interval": interval, "share_known": known, "guess": guess_for(agent)}
    return Replaceability(agent=agent, num_calls=num_calls, **facts)


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())
