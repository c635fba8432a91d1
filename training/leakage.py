"""Train calls that say what a held-out call says: they leave train, so that no score rewards remembering.

Compared are whole requests, against validation, calibration and test, and the last user text alone, against
calibration and test of any task: tasks share a base model, so a text learned with one task's answer is known to all.
Short texts ("yes") and texts that many sessions say (an opening, a fixed instruction) are the traffic's habit and
tell nothing; they stay. The splits are by session, so only calls of other sessions are ever compared.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.records import AgentCall, Split
from cluster.signature import last_user_text

ANSWER_FIELDS = ("messages", "tools", "functions", "tool_choice", "response_format")
"""Parts of a request that its answer depends on; the others (model, sampling, user) are left out."""
LEAKED = "request also in validation, calibration or test"
SHARED_TEXT = "last user text also in calibration or test"
MIN_SHARED_CHARS = 20
"""Shorter texts are said by many and mean little."""
MAX_SHARING_SESSIONS = 5
MAX_SHARING_SHARE = 0.01
"""A text that more sessions say than both bounds allow is a habit."""


def without_leaks(by_split: Mapping[Split, Sequence[AgentCall]], dropped: Counter[str]) -> list[AgentCall]:
    """Train without what is held out, counted in `dropped`."""
    held_out = {
        request_hash(call.request) for split in ("validation", "calibration", "test") for call in by_split[split]
    }
    spoken = _shared_texts(by_split)
    kept = []
    for call in by_split["train"]:
        if request_hash(call.request) in held_out:
            dropped[LEAKED] += 1
        elif _text_of(call) in spoken:
            dropped[SHARED_TEXT] += 1
        else:
            kept.append(call)
    return kept


def answer_fields(request: dict[str, Any]) -> dict[str, Any]:
    """The request without what its answer does not depend on."""
    return {field: request[field] for field in ANSWER_FIELDS if request.get(field) is not None}


def request_hash(request: dict[str, Any]) -> bytes:
    """Equal for requests that ask the same, whatever the order of their keys."""
    asked = json.dumps(answer_fields(request), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(asked.encode(errors="surrogatepass"), digest_size=16).digest()


def _shared_texts(by_split: Mapping[Split, Sequence[AgentCall]]) -> set[str]:
    """The texts of calibration and test that are long enough and that few sessions say."""
    sessions: dict[str, set[str]] = defaultdict(set)
    for calls in by_split.values():
        for call in calls:
            sessions[_text_of(call)].add(call.session_id)
    num_sessions = len(set().union(*sessions.values()))
    most = max(MAX_SHARING_SESSIONS, MAX_SHARING_SHARE * num_sessions)
    texts = {_text_of(call) for split in ("calibration", "test") for call in by_split[split]}
    return {text for text in texts if len(text) >= MIN_SHARED_CHARS and len(sessions[text]) <= most}


def _text_of(call: AgentCall) -> str:
    return " ".join(last_user_text(call.request).split())
