"""S3: examples -> tasks, the task of every example, and the route model that finds it again at request time.

Sites first (cluster/sites.py), then topics inside a site whose answers vary (topics.py), merged into tasks
(merging.py), named (naming.py) and matched to the tasks of the run before (identity.py). A task that was measured to be
better in parts (partition.py) is split, and stays so in later runs. Every example, of any split, is assigned by the
route model, so that what is learned, certified and served is one population. All in memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from cluster.errors import StoreError
from cluster.records import Example, Record, Split, TaskSpec
from cluster.route_model import RouteModel, TopicMap
from cluster.signature import surface_of, tool_names
from cluster.sites import SiteMap, fit_sites
from cluster.store import Store, content_hash
from training.identity import Identity, Matching, TaskEvent, match_tasks
from training.merging import (
    DiscoverConfig,
    Group,
    merge_versions,
    num_calls,
    split_site,
    template_hashes,
)
from training.naming import Nameable, find_slots, find_static_lines, find_template, name_tasks
from training.partition import cut_topics, part_key, split_group
from training.splits import SPLITS

TASKS_FOLDER = "tasks"
ROUTE_MODEL_FOLDER = "route_model"
IDENTITY_FILE = f"{TASKS_FOLDER}/identity.json"
EVENTS_FOLDER = f"{TASKS_FOLDER}/events"
_NUM_ID_CHARS = 12


class Parts(Record):
    """A task that was split by measurement, as the next run finds it again."""

    variants: tuple[str, ...]
    """The call site; its topics are in the route model."""
    numbers: tuple[int, ...]
    """The part of every topic."""


class Previous(NamedTuple):
    """What the run before left: how its tasks are recognised, and where calls went."""

    identities: dict[str, Identity]
    route_model: RouteModel | None
    """None where this version cannot read it; ids then follow from the sites alone."""
    parts: Mapping[str, Parts] = {}
    """Key of a group -> how it was split. Needs the route model; without it the group is one task again."""

    def partitions(self) -> dict[str, TopicMap]:
        """Key of a group -> its topics with the keys of their parts."""
        topics = self.route_model.topics if self.route_model else {}
        known = {key: parts for key, parts in self.parts.items() if parts.variants[0] in topics}
        return {key: cut_topics(key, topics[parts.variants[0]], parts.numbers) for key, parts in known.items()}


class Grouping(NamedTuple):
    """What a run's tasks are made of, before they have ids."""

    examples: list[Example]
    """Of all splits, in order of their ids."""
    sites: SiteMap
    groups: list[Group]
    topic_maps: dict[str, TopicMap]
    """Variant -> the topics of its site, with the keys of their groups."""
    unassigned: dict[str, int]
    parts: dict[str, Parts]
    """Key of a group -> how it was split; the group itself is not among `groups`."""


@dataclass(frozen=True)
class Discovery:
    """Tasks, most calls first, and where every example belongs."""

    tasks: tuple[TaskSpec, ...]
    assignment: dict[str, str | None]
    """example_id -> task_id; None where the example is of no task."""
    unassigned: dict[str, int]
    """Reason -> calls of no task."""
    route_model: RouteModel
    identities: dict[str, Identity]
    """task_id -> what the next run recognises it by."""
    grouping: Grouping
    ids: dict[str, str]
    """Key of a group -> task_id."""
    events: tuple[TaskEvent, ...] = ()
    """What changed since the run before."""


def discover(
    examples_by_split: dict[Split, list[Example]], config: DiscoverConfig, previous: Previous | None = None
) -> Discovery:
    """Find the tasks of all splits together. Deterministic; the order of the examples does not matter.

    Raises:
        ConfigError: `config.encoder` cannot be loaded.
    """
    grouping = _group_examples(examples_by_split, config)
    standing = previous.partitions() if previous else {}
    grouping = _split_groups(grouping, standing)
    current = {group.key: _identity_of(group) for group in grouping.groups}
    return _settle(grouping, current, _match(grouping.groups, current, previous))


def split_tasks(discovery: Discovery, partitions: Mapping[str, TopicMap], found: Mapping[str, str]) -> Discovery:
    """The discovery with some groups split, matched to the tasks before it: the largest part keeps the id.

    Args:
        partitions: key of a group -> its topics with the keys of their parts.
        found: key of a group -> what was measured, which the event of the split tells.
    """
    grouping = _split_groups(discovery.grouping, partitions)
    current = {group.key: _identity_of(group) for group in grouping.groups}
    calls = {group.key: num_calls(group.examples) for group in grouping.groups}
    parents = {part: discovery.ids[key] for key, topics in partitions.items() for part in topics.task_ids if part}
    own = {key: discovery.ids.get(key) or _own_id(key) for key in current}
    matching = match_tasks(
        discovery.identities,
        {own[key]: identity for key, identity in current.items()},
        {(parents.get(key) or own[key], own[key]): n for key, n in calls.items()},
        {own[key]: n for key, n in calls.items()},
        {discovery.ids[key]: detail for key, detail in found.items()},
    )
    ids = {key: matching.ids[name] for key, name in own.items()}
    events = (*discovery.events, *matching.events)
    return _settle(grouping, current, Matching(ids=ids, events=events))


def load_previous(store: Store) -> Previous | None:
    """What the last saved discovery left; None in a store without one."""
    if not store.exists(IDENTITY_FILE):
        return None
    saved = store.read_json(IDENTITY_FILE)
    parts = {key: Parts.model_validate(value) for key, value in saved.get("parts", {}).items()}
    identities = {task_id: Identity.model_validate(value) for task_id, value in saved["tasks"].items()}
    try:
        return Previous(identities, RouteModel.load(store, saved["route_model"]), parts)
    except StoreError:
        return Previous(identities, None)


def save_discovery(store: Store, snapshot_id: str, discovery: Discovery) -> str:
    """Write tasks, identities, events, the assignment of one snapshot and the route model; returns the model's folder."""
    folder = f"{ROUTE_MODEL_FOLDER}/{discovery.route_model.content_sha()}"
    if not store.is_published(folder):
        discovery.route_model.save(store, folder)
    for task in discovery.tasks:
        store.write_json(f"{TASKS_FOLDER}/{task.task_id}.json", task.model_dump(mode="json"))
    columns = {"example_id": list(discovery.assignment), "task_id": list(discovery.assignment.values())}
    schema = pa.schema([("example_id", pa.string()), ("task_id", pa.string())])
    store.write_table(assignment_path(snapshot_id), pa.table(columns, schema=schema))
    if discovery.events:
        events = {"snapshot": snapshot_id, "events": [event.model_dump(mode="json") for event in discovery.events]}
        store.write_json(f"{EVENTS_FOLDER}/{snapshot_id}-{content_hash(events)[:_NUM_ID_CHARS]}.json", events)
    identities = {task_id: value.model_dump(mode="json") for task_id, value in discovery.identities.items()}
    parts = {key: value.model_dump(mode="json") for key, value in discovery.grouping.parts.items()}
    saved = {"snapshot": snapshot_id, "route_model": folder, "tasks": identities, "parts": parts}
    store.write_json(IDENTITY_FILE, saved)
    return folder


def assignment_path(snapshot_id: str) -> str:
    """Where a snapshot's examples have their tasks: columns example_id and task_id."""
    return f"{TASKS_FOLDER}/assignment-{snapshot_id}.parquet"


def _group_examples(examples_by_split: dict[Split, list[Example]], config: DiscoverConfig) -> Grouping:
    examples = sorted((e for split in examples_by_split.values() for e in split), key=lambda e: e.example_id)
    sites = fit_sites(e.request for e in examples)
    by_variant: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_variant[sites.site_of(example.request).variant].append(example)
    grouping = Grouping(examples, sites, [], {}, {}, {})
    unassigned: Counter[str] = Counter()
    for variants in merge_versions(by_variant):
        members = sorted((e for v in variants for e in by_variant[v]), key=lambda e: e.example_id)
        found, topics, reasons = split_site(variants, members, config)
        grouping.groups.extend(found)
        unassigned.update(reasons)
        if topics is not None:
            grouping.topic_maps.update(dict.fromkeys(variants, topics))
    return grouping._replace(unassigned=dict(unassigned))


def _split_groups(grouping: Grouping, partitions: Mapping[str, TopicMap]) -> Grouping:
    """Replace groups by their parts; a group of topics already, whose answers have several forms, is left as it is."""
    groups: list[Group] = []
    topic_maps, parts = dict(grouping.topic_maps), dict(grouping.parts)
    for group in grouping.groups:
        topics = partitions.get(group.key)
        if topics is None or group.topics:
            groups.append(group)
            continue
        groups += split_group(group, topics)
        topic_maps.update(dict.fromkeys(group.variants, topics))
        numbers = {part_key(group.key, number): number for number in range(len(topics.task_ids))}
        parts[group.key] = Parts(variants=group.variants, numbers=tuple(numbers[str(k)] for k in topics.task_ids))
    return grouping._replace(groups=groups, topic_maps=topic_maps, parts=parts)


def _settle(grouping: Grouping, current: dict[str, Identity], matching: Matching) -> Discovery:
    """Groups with their ids -> tasks, the place of every example, and the route model."""
    groups, ids = grouping.groups, matching.ids
    tasks = _describe(groups, ids, grouping.examples)
    assignment: dict[str, str | None] = {e.example_id: None for e in grouping.examples}
    for group in groups:
        assignment.update((e.example_id, ids[group.key]) for e in group.examples)
    route_model = RouteModel(
        {variant: ids[group.key] for group in groups if not group.topics for variant in group.variants},
        {
            v: TopicMap(m.encoder, m.centroids, m.radii, [ids.get(str(k)) for k in m.task_ids])
            for v, m in grouping.topic_maps.items()
        },
        grouping.sites,
    )
    return Discovery(
        tasks=tuple(sorted(tasks, key=lambda t: (-t.num_calls, t.task_id))),
        assignment=assignment,
        unassigned=grouping.unassigned,
        route_model=route_model,
        identities={ids[key]: identity for key, identity in current.items()},
        grouping=grouping,
        ids=dict(ids),
        events=matching.events,
    )


def _identity_of(group: Group) -> Identity:
    lines = find_static_lines(group.examples)
    return Identity(
        surface=surface_of(group.examples[0].request),
        kind=group.kind,
        variants=group.variants,
        lines=template_hashes(group.examples),
        template=find_template(group.examples, lines),
        slots=find_slots(group.examples, lines),
    )


def _match(groups: list[Group], current: dict[str, Identity], previous: Previous | None) -> Matching:
    """Ids of the groups, the key's own where nothing came before."""
    calls = {group.key: num_calls(group.examples) for group in groups}
    named = {_own_id(key): key for key in current}
    overlap: Counter[tuple[str, str]] = Counter()
    if previous and previous.route_model:
        for own, key in named.items():
            for example in next(g for g in groups if g.key == key).examples:
                before = previous.route_model.task_of(example.request).task_id
                if before is not None:
                    overlap[before, own] += len(example.source_call_ids)
    identities = previous.identities if previous else {}
    matching = match_tasks(
        identities,
        {own: current[key] for own, key in named.items()},
        overlap,
        {own: calls[k] for own, k in named.items()},
    )
    return Matching(ids={named[own]: task_id for own, task_id in matching.ids.items()}, events=matching.events)


def _own_id(key: str) -> str:
    """The id of a group that no older task's id goes to."""
    return f"task-{key[:_NUM_ID_CHARS]}"


def _describe(groups: list[Group], ids: dict[str, str], everything: list[Example]) -> list[TaskSpec]:
    cost_of = _cost_measure(everything)
    total, cost = num_calls(everything), cost_of(everything)
    names = name_tasks([Nameable(g.kind, g.examples, bool(g.topics)) for g in groups])
    tasks = []
    for group, name in zip(groups, names, strict=True):
        request = group.examples[0].request
        per_split = Counter(e.split for e in group.examples)
        task = TaskSpec(
            task_id=ids[group.key],
            name=name,
            signature=group.variants[0],
            kind=group.kind,
            reference="gold" if all(e.reference == "gold" for e in group.examples) else "llm",
            num_calls=num_calls(group.examples),
            share_calls=num_calls(group.examples) / total,
            share_cost=cost_of(group.examples) / cost if cost else 0.0,
            num_examples={split: per_split[split] for split in SPLITS},
            num_clients=len({client for e in group.examples for client in e.client_ids}),
            num_sessions=len({e.session_id for e in group.examples}),
            static_lines=find_static_lines(group.examples),
            response_format=request.get("response_format"),
            topics=group.topics,
            tool_names=tool_names(request),
        )
        tasks.append(task)
    return tasks


def _cost_measure(everything: list[Example]) -> Callable[[list[Example]], float]:
    """Cost of examples' calls: US dollars where known for every call, else characters of the requests."""
    if all(e.cost_usd is not None for e in everything):
        return lambda examples: math.fsum((e.cost_usd or 0.0) * len(e.source_call_ids) for e in examples)
    return lambda examples: sum(len(json.dumps(e.request)) * len(e.source_call_ids) for e in examples)
