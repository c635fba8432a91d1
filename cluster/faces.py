"""Which calls speak to a person: the rule that capture, ingestion, serving and validation share.

What a person reads (the last message of a turn) is another kind of traffic than what a program reads: by default it is
neither learned from (`curate.keep_faces_person`) nor moved (`faces.move`). Some is known before anybody answers (header,
agent), some only by the answer. Knows nothing of routes or storage. Source: arXiv 2506.02153 section 6, S1 (log all
calls that are not human-computer interaction).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster.config import Config

FACES_HEADER = "x-faces-person"
"""Request header, `true` or `false`: the client's own word, which overrides every rule."""
FACES_REASON = "faces a person"
"""Reason of a route decision that leaves a call to the LLM on this ground."""


class FacesConfig(Config):
    """Which calls speak to a person, and whether they may move to a specialist."""

    agents: tuple[str, ...] = ()
    """Agents that speak to a person, as patterns such as `support-*`; case counts, `*` `?` and `[abc]` stand for others."""
    last_of_turn: bool = True
    """Whether an answer without a tool call, where tools were offered, ends a turn and so speaks to a person."""
    move: bool = False
    """Whether specialists may answer such calls. Gates count with it: set it before a conversion, not after; it needs
    curate.keep_faces_person, for without such calls among its examples no gate says anything about them."""


def faces_before(agent: str, header: str | None, config: FacesConfig) -> bool | None:
    """What is known before the answer; None where the answer decides.

    Args:
        header: value of FACES_HEADER; what is neither true nor false counts as absent.
    """
    said = {"true": True, "false": False}.get((header or "").strip().lower())
    if said is not None:
        return said
    return True if any(fnmatch.fnmatchcase(agent, pattern) for pattern in config.agents) else None


def ends_turn(request: Mapping[str, Any], message: Mapping[str, Any] | None) -> bool:
    """Whether this answer is the last of a turn: tools were offered and none is called.

    An answer in JSON that the request asked for is for a program, whatever else was offered.
    """
    if message is None or not (request.get("tools") or request.get("functions")):
        return False
    response_format = request.get("response_format")
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    return kind in (None, "text") and not (message.get("tool_calls") or message.get("function_call"))


class Facing(NamedTuple):
    """The rule as it stands for one call before it is answered."""

    config: FacesConfig
    before: bool | None
    """What is known already; None where the answer decides."""

    def faces(self, request: Mapping[str, Any], message: Mapping[str, Any] | None) -> bool:
        """Whether the call speaks to a person, now that it is answered."""
        return self.before if self.before is not None else self.config.last_of_turn and ends_turn(request, message)

    @property
    def bars_call(self) -> bool:
        """Whether no specialist may be asked."""
        return bool(self.before) and not self.config.move

    def bars_answer(self, request: Mapping[str, Any], message: Mapping[str, Any] | None) -> bool:
        """Whether a specialist's answer must not be kept."""
        decides = self.before is None and self.config.last_of_turn and not self.config.move
        return self.bars_call or (decides and ends_turn(request, message))


def faces_person(
    request: Mapping[str, Any],
    message: Mapping[str, Any] | None,
    *,
    agent: str,
    config: FacesConfig,
    header: str | None = None,
) -> bool:
    """Whether a call that was answered with `message` (None: not at all) speaks to a person."""
    return Facing(config, faces_before(agent, header, config)).faces(request, message)


def facing_of(
    request: Mapping[str, Any], answer: Mapping[str, Any] | None, *, is_facing: bool, config: FacesConfig
) -> Facing:
    """The rule as serving has it for a call like a stored one, as far as its mark and its answer tell.

    A marked call whose answer ends a turn may have been known by its header too; it is taken for one that its answer
    made known, which asks the specialist and so leaves out no call that serving asks about.
    """
    is_by_answer = config.last_of_turn and ends_turn(request, answer)
    return Facing(config, None if is_facing == is_by_answer else is_facing)
