"""A specialist's stage -> which calls of its task it answers, and which of its answers are checked.

Pure. `shadow`: none, and it is compared on every call that it could have been asked. `canary`: those of a share of the sessions,
drawn by the session alone, so that a conversation stays with one of the two and a larger share holds the smaller one.
Stages stand in the release and nowhere else (cluster/records.py `Rollout`); who moves them is serving/steward.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from pydantic import Field

from cluster.config import Config
from cluster.records import Rollout, RouteDecision, Specialist, Stage

SHADOW_REASON = "shadow stage"
CANARY_REASON = "canary stage: a session outside its share"


class RolloutConfig(Config):
    """Where a new specialist begins; evidence moves it on to live."""

    start: Stage = "shadow"
    """Stage of the specialists that a promoted release has and the one before had not. `shadow`: the LLM answers and they
    are compared; `canary`: they answer a share of the sessions; `live`: they answer at once, on the gate's word alone."""
    canary_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the sessions that a specialist answers in its canary stage."""
    audit_share: float = Field(default=0.5, ge=0, le=1)
    """Share of a canary's calls that the LLM is asked in the background too, so that evidence comes soon."""

    def at(self, stage: Stage | None = None) -> Rollout | None:
        """A specialist's place at a stage, or where it starts; None is live."""
        stage = stage or self.start
        if stage == "live":
            return None
        return Rollout(stage=stage, canary_share=self.canary_share, audit_share=self.audit_share)


def in_canary(session_id: str, task_id: str, share: float) -> bool:
    """Whether a session is one of the share. Tasks draw independently: no session is the canary of everything."""
    digest = hashlib.blake2b(f"{task_id}/{session_id}".encode(), key=b"understudy canary", digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def hold_back(
    specialist: Specialist, rollout: Rollout | None, session_id: Callable[[], str], *, release: str
) -> RouteDecision | None:
    """The decision that the LLM answers a call that `specialist` could be asked; None lets the specialist answer.

    Args:
        rollout: its stage; None is live.
        session_id: called in a canary alone, as it may cost reading the conversation.
    """
    if rollout is None:
        return None
    if rollout.stage == "shadow":
        reason = SHADOW_REASON
    elif in_canary(session_id(), specialist.task_id, rollout.canary_share):
        return None
    else:
        reason = CANARY_REASON
    return RouteDecision(
        action="llm", reason=reason, task_id=specialist.task_id, specialist=specialist.name, release=release
    )
