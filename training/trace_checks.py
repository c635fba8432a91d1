"""A task's train examples -> those that may be learned again, and the others with the reason: noise and drift are caught here.

Three things that more training would only copy. The LLM changed its answer: a request was answered one way until some time
and another way since, so what it said before is wrong by its own word. The LLM contradicts itself: a request was answered
in several ways at mixed times, so only what it says more often than not can be meant. The template is out of use: the task's
recent calls come from another one. Seen are equal requests and call sites alone: noise in requests that never repeat is
not told from variety, and is left to the gate. Pure; knows nothing of stores.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cluster.answers import grade
from cluster.records import AnswerKind, Example
from cluster.store import content_hash

CHANGED = "the LLM has answered this request otherwise since"
CONTRADICTED = "the LLM answers this request in several ways"
OUTDATED = "template that the task's recent calls do not have"
_ASKED = ("messages", "tools", "tool_choice", "response_format")


class Checked(NamedTuple):
    """What a check of one task's train examples found."""

    kept: list[Example]
    quarantined: dict[str, str]
    """example_id -> CHANGED, CONTRADICTED or OUTDATED."""
    num_repeated: int
    """Calls whose request came more than once."""
    num_contradicted: int
    """Of these, calls that are answered otherwise than most calls of their request, at mixed times."""

    outdated: frozenset[str] = frozenset()
    """Variants of call sites that are out of use."""

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> examples."""
        return dict(sorted(Counter(self.quarantined.values()).items()))


class _Answer(NamedTuple):
    """One way in which a request was answered."""

    examples: list[Example]
    num_calls: int
    first_ts: float
    last_ts: float


def check_traces(
    examples: Sequence[Example],
    kind: AnswerKind,
    times: Mapping[str, float],
    variants: Mapping[str, str],
    since_ts: float,
    min_recent: int,
) -> Checked:
    """Check the train examples of one task.

    Args:
        times: call id -> seconds since the epoch.
        variants: example_id -> the call site's template, tools and response format.
        since_ts: what came later is recent.
        min_recent: recent examples of one template from which another that has none is out of use.
    """
    quarantined: dict[str, str] = {}
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda one: (one.ts, one.example_id)):
        asked = {name: example.request[name] for name in _ASKED if example.request.get(name) is not None}
        groups[content_hash(json.dumps(asked, sort_keys=True))].append(example)
    num_repeated = num_contradicted = 0
    for group in groups.values():
        answers = _answers(group, kind, times)
        total = sum(one.num_calls for one in answers)
        num_repeated += total if total > 1 else 0
        if len(answers) < 2:
            continue
        newest = max(answers, key=lambda one: one.first_ts)
        if all(one.last_ts < newest.first_ts for one in answers if one is not newest):
            wrong, reason = [one for one in answers if one is not newest], CHANGED
        else:
            most = max(answers, key=lambda one: one.num_calls)
            has_majority = 2 * most.num_calls > total
            wrong, reason = [one for one in answers if one is not most or not has_majority], CONTRADICTED
            num_contradicted += total - most.num_calls
        quarantined |= {example.example_id: reason for one in wrong for example in one.examples}
    recent = {one.example_id for one in examples if _last(one, times) >= since_ts}
    in_use = Counter(variants[name] for name in recent)
    outdated: frozenset[str] = frozenset()
    if in_use and max(in_use.values()) >= min_recent:
        outdated = frozenset(variants[one.example_id] for one in examples) - in_use.keys()
        old = (one.example_id for one in examples if variants[one.example_id] in outdated)
        quarantined = {**dict.fromkeys(old, OUTDATED), **quarantined}
    kept = [one for one in examples if one.example_id not in quarantined]
    return Checked(kept, dict(sorted(quarantined.items())), num_repeated, num_contradicted, outdated)


def _answers(group: Sequence[Example], kind: AnswerKind, times: Mapping[str, float]) -> list[_Answer]:
    """The ways in which equal requests were answered, by the grader that gates use, the earliest first."""
    found: list[list[Example]] = []
    for example in group:
        same = next((one for one in found if grade(example.target, one[0].target, kind, example.request).agrees), None)
        if same is None:
            found.append([example])
        else:
            same.append(example)
    return [
        _Answer(
            one,
            sum(len(example.source_call_ids) for example in one),
            min(example.ts for example in one),
            max(_last(example, times) for example in one),
        )
        for one in found
    ]


def _last(example: Example, times: Mapping[str, float]) -> float:
    """When the newest of the calls behind an example was made."""
    return max([example.ts, *(times[name] for name in example.source_call_ids if name in times)])
