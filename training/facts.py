"""One stored call -> what the call index keeps of it, and the content that may be learned from.

Every hash of words is keyed. A message that recurs (a conversation's beginning, a system prompt) is looked at once.
Knows nothing of other calls: what they have in common is found by query (training/cleaning.py).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import numpy as np

from cluster.records import AgentCall
from cluster.signature import last_user_text, message_text, signature_of
from training.call_index import CallFacts, CallIndex
from training.leakage import ANSWER_FIELDS, MIN_SHARED_CHARS
from training.near_duplicates import Shingler
from training.quality import answer_class, find_faults, find_flags
from training.splits import position_of
from training.validity import FACES_PERSON, find_problem

_MAX_CACHED_MESSAGES = 20_000
_GIVEN_ROLES = ("user", "tool", "function")
"""What the agent was given by others; its own prompts and answers plant nothing."""


class FactReader:
    """Reads calls into one index."""

    def __init__(
        self, index: CallIndex, secret: bytes, *, keep_faces_person: bool, max_prompt_chars: int, num_shards: int
    ) -> None:
        """
        Args:
            secret: keys every hash; equal secrets give equal decisions.
        """
        self._index, self._num_shards = index, num_shards
        self._keep_faces_person, self._max_prompt_chars = keep_faces_person, max_prompt_chars
        self._key = hmac.digest(secret, b"hashes of curation", "sha256")
        self._shingler = Shingler(hmac.digest(secret, b"words of curation", "sha256"))
        self._known: dict[bytes, tuple[int, str]] = {}

    def read(self, seq: int, call: AgentCall) -> CallFacts:
        """The call's row; its `shard` is None where it cannot be an example."""
        problem = find_problem(call, keep_faces_person=self._keep_faces_person, max_prompt_chars=self._max_prompt_chars)
        route = call.route
        is_audited = call.audit_of or (call.served_by == "specialist" and call.is_reference)
        facts = CallFacts(
            seq=seq,
            call_id=call.call_id,
            session=call.session_id,
            client=call.client_id,
            ts=call.ts,
            audit_of=call.audit_of,
            audited_task=((route and route.task_id) or "") if is_audited else None,
            is_biased=bool(route and route.specialist and not call.is_reference),
            reward=_reward_of(call),
            reason=problem and problem.reason,
            detail=problem and problem.detail,
        )
        return facts if problem else facts._replace(**self._describe(call))

    def _describe(self, call: AgentCall) -> dict[str, Any]:
        request, message = call.request, call.message or {}
        digests = [_message_digest(m, self._key) for m in request["messages"]]
        described = [self._message_of(m, digest) for m, digest in zip(request["messages"], digests, strict=True)]
        rest = {field: request[field] for field in ANSWER_FIELDS[1:] if request.get(field) is not None}
        answer = self._hash(_dump(_without_ids(message)))
        kind, fault = find_faults(message, request)
        if call.faces_person and not self._keep_faces_person:
            fault = fault or FACES_PERSON
        last_text = " ".join(last_user_text(request).split())
        flags = sorted({flag for _, text in described for flag in text.split("\n") if flag})
        return {
            "reference": "gold" if call.served_by == "gold" else "llm",
            "faces_person": call.faces_person,
            "cost_usd": call.cost_usd,
            "latency_ms": call.latency_ms,
            "shard": int(position_of(f"{call.client_id}/{call.session_id}", b"shard") * self._num_shards),
            "site": self._index.site_of(signature_of(request)),
            "request": self._hash(b"".join(digests) + (_dump(rest) if rest else b"")),
            "answer": answer,
            "answer_class": answer_class(message, kind, answer),
            "last_text": self._hash(last_text.encode(errors="surrogatepass"))
            if len(last_text) >= MIN_SHARED_CHARS
            else None,
            "messages": np.array([number for number, _ in described], np.int64).tobytes(),
            "num_question": _num_question(request["messages"]),
            "fault": fault,
            "flags": "\n".join(flags),
        }

    def _message_of(self, message: dict[str, Any], digest: bytes) -> tuple[int, str]:
        """Number and flags of a message, remembered."""
        known = self._known.get(digest)
        if known is None:
            if len(self._known) >= _MAX_CACHED_MESSAGES:
                self._known.clear()
            known = self._known[digest] = self._index.message_of(digest, lambda: self._read_message(message))
        return known

    def _read_message(self, message: dict[str, Any]) -> tuple[bytes, str]:
        text = message_text(message)
        flags = find_flags(text) if message.get("role") in _GIVEN_ROLES else ()
        calls = (call.get("function") or {} for call in message.get("tool_calls") or ())
        said = [text, *(f"{function.get('name')} {function.get('arguments')}" for function in calls)]
        return self._shingler.shingle("\n".join(said)).tobytes(), "\n".join(flags)

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._key, digest_size=16).digest()


def _message_digest(message: dict[str, Any], key: bytes) -> bytes:
    """Equal for messages that say the same, whatever the order of their keys."""
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str):
        data = f"{message.get('role')}\n{content}".encode(errors="surrogatepass")
    else:
        data = b"\n" + _dump(message)
    return hashlib.blake2b(data, key=key, digest_size=16).digest()


def _dump(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="surrogatepass")


def _num_question(messages: list[dict[str, Any]]) -> int:
    """Messages from the last user message to the end; one where no user speaks."""
    return next((n for n, message in enumerate(reversed(messages), 1) if message.get("role") == "user"), 1)


def _without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the ids of its tool calls, which are made up anew each time."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [{**call, "id": ""} for call in message["tool_calls"]]}


def _reward_of(call: AgentCall) -> float | None:
    """What the outcome says in a number; None where it says nothing."""
    outcome = call.outcome or {}
    rewards = (outcome.get(name) for name in ("reward", "score", "correct"))
    return next((float(value) for value in rewards if isinstance(value, bool | int | float)), None)
