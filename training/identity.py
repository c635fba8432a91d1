"""Tasks keep their ids from run to run: a new run's tasks are matched to the previous ones, and what changed is logged.

Matched by the calls themselves: the previous route model says where each of today's calls went before. A task that
the previous model knows nothing of inherits the id of one whose template it edits (version drift). The largest part
of a split and the largest parent of a merge keep the id. Knows nothing of how tasks are found or stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from cluster.records import Record
from training.naming import Slot

_MIN_SHARE = 0.2
"""Share of a task's calls below which a move between two tasks is noise, not a split or a merge."""
_MIN_SIMILARITY = 0.6
"""Share of template text that an edited template keeps; below it, it is another template."""

EventKind = Literal["birth", "split", "merge", "retirement", "drift"]


class TaskEvent(Record):
    """What happened to one task between two runs."""

    kind: EventKind
    task_id: str
    others: tuple[str, ...] = ()
    """The tasks it came from (birth by split, merge) or went to (split, retirement by merge)."""
    num_calls: int = 0
    detail: str = ""


class Identity(Record):
    """What a task is recognised by in a later run, and its template for people to read."""

    surface: str
    """Hash of tools and response format."""
    kind: str
    variants: tuple[str, ...]
    lines: dict[str, int]
    """Hash of each template line -> its characters."""
    template: tuple[str, ...] = ()
    """Lines that every redacted train prompt repeats, in order, with `<*>` where others stand between them."""
    slots: tuple[Slot, ...] = ()
    """What stands in place of the wildcards."""


class Matching(Record):
    """Where the ids of a run come from."""

    ids: dict[str, str]
    """Key of a new task -> its id; distinct."""
    events: tuple[TaskEvent, ...]


def match_tasks(
    previous: Mapping[str, Identity],
    current: Mapping[str, Identity],
    overlap: Mapping[tuple[str, str], int],
    num_calls: Mapping[str, int],
    measured: Mapping[str, str] = MappingProxyType({}),
) -> Matching:
    """Give every new task an id.

    Args:
        previous: task id -> what it was recognised by.
        current: key of a new task -> the same; the key is its id where nothing older claims it.
        overlap: (previous id, new key) -> calls of the new task that the previous route model sends to the old one.
        num_calls: calls of each new task.
        measured: previous id -> what was measured that it is split for; the event tells it.
    """
    ids: dict[str, str] = {key: key for key in current if key in previous}
    taken = set(ids.values())
    parents: dict[str, list[str]] = {}
    children: dict[str, list[str]] = {}
    routed = {old: sum(n for (o, _), n in overlap.items() if o == old) for old in previous}
    for (old, new), n in sorted(overlap.items(), key=lambda item: (-item[1], item[0])):
        if old not in previous or new not in current:
            continue
        if n >= _MIN_SHARE * routed[old] or n >= _MIN_SHARE * num_calls[new]:
            parents.setdefault(new, []).append(old)
            children.setdefault(old, []).append(new)
            if new not in ids and old not in taken:
                ids[new] = old
                taken.add(old)
    drifted = _match_drift(previous, current, ids, taken)
    ids.update(drifted)
    ids.update(_own_ids(set(current) - set(ids), taken | set(previous)))
    changes = _changes(previous, current, ids, parents, children, num_calls)
    changes = [
        e.model_copy(update={"detail": measured.get(e.task_id, "")}) if e.kind == "split" else e for e in changes
    ]
    events = [*changes, *_drifts(previous, current, drifted)]
    return Matching(ids=ids, events=tuple(sorted(events, key=lambda e: (e.kind, e.task_id))))


def similarity(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Share of two templates' characters that stand in lines of both, in [0, 1]."""
    both = sum(size for line, size in first.items() if line in second)
    union = sum(first.values()) + sum(second.values()) - both
    return both / union if union else 0.0


def _match_drift(
    previous: Mapping[str, Identity], current: Mapping[str, Identity], ids: Mapping[str, str], taken: set[str]
) -> dict[str, str]:
    """New key -> the id of the most similar task that no call of this run was sent to."""
    pairs = [
        (similarity(previous[old].lines, current[new].lines), old, new)
        for new in current.keys() - ids.keys()
        for old in previous.keys() - taken
        if (previous[old].surface, previous[old].kind) == (current[new].surface, current[new].kind)
    ]
    found: dict[str, str] = {}
    for likeness, old, new in sorted(pairs, key=lambda pair: (-pair[0], pair[1:])):
        if likeness >= _MIN_SIMILARITY and new not in found and old not in taken:
            found[new] = old
            taken.add(old)
    return found


def _own_ids(keys: set[str], taken: set[str]) -> dict[str, str]:
    """Each key is its own id; one that an older task still bears gets the first free number."""
    own: dict[str, str] = {}
    for key in sorted(keys):
        names = (key if number == 1 else f"{key}-{number}" for number in range(1, len(taken) + 3))
        own[key] = next(name for name in names if name not in taken)
        taken = taken | {own[key]}
    return own


def _changes(
    previous: Mapping[str, Identity],
    current: Mapping[str, Identity],
    ids: Mapping[str, str],
    parents: Mapping[str, list[str]],
    children: Mapping[str, list[str]],
    num_calls: Mapping[str, int],
) -> list[TaskEvent]:
    events = []
    for new in current:
        if ids[new] not in previous:
            came_from = tuple(sorted(parents.get(new, ())))
            events.append(TaskEvent(kind="birth", task_id=ids[new], others=came_from, num_calls=num_calls[new]))
        if len(parents.get(new, ())) > 1:
            others = tuple(sorted(set(parents[new]) - {ids[new]}))
            events.append(TaskEvent(kind="merge", task_id=ids[new], others=others, num_calls=num_calls[new]))
    survivors = set(ids.values())
    for old in previous:
        went_to = tuple(sorted({ids[new] for new in children.get(old, ())} - {old}))
        if old not in survivors:
            events.append(TaskEvent(kind="retirement", task_id=old, others=went_to))
        elif len(children.get(old, ())) > 1:
            events.append(TaskEvent(kind="split", task_id=old, others=went_to))
    return events


def _drifts(
    previous: Mapping[str, Identity], current: Mapping[str, Identity], drifted: Mapping[str, str]
) -> list[TaskEvent]:
    events = []
    for new, old in drifted.items():
        before, after = previous[old].lines, current[new].lines
        detail = (
            f"template: {len(after.keys() - before.keys())} lines added, {len(before.keys() - after.keys())} removed"
        )
        events.append(TaskEvent(kind="drift", task_id=old, detail=detail))
    return events
