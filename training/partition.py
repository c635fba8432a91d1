"""The topics of a one-form task -> parts that might each be a task, and a task cut into them.

A part is some of the topics of a call site whose answers have one form. Every call of the site belongs to the part of
its nearest topic, however far that is: the site alone says that it is of this task, so no call goes to the LLM because
of a split. Prompt-only, as all routing. Whether a split is useful is measured elsewhere (training/usefulness.py).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from cluster.records import Example
from cluster.route_model import TopicMap
from cluster.signature import variable_text
from training.merging import DiscoverConfig, Group, topics_of_group
from training.usefulness import group_topics

_ANY_DISTANCE = 2.1
"""Above the largest cosine distance, rounding included."""


def part_key(site_key: str, number: int) -> str:
    """Key of one part of a task: it follows from the task's own key and the part's number alone."""
    return hashlib.sha256(f"{site_key}\npart {number}".encode()).hexdigest()


def cut_topics(site_key: str, topics: TopicMap, parts: Sequence[int]) -> TopicMap:
    """The same topics, each with the key of its part, and every text inside one of them."""
    radii = np.full(len(parts), _ANY_DISTANCE)
    return TopicMap(topics.encoder, topics.centroids, radii, [part_key(site_key, number) for number in parts])


def split_group(group: Group, topics: TopicMap) -> list[Group]:
    """The groups of a group's parts, as the route model will find their calls; parts without a call are left out."""
    members: dict[str, list[Example]] = defaultdict(list)
    for example in group.examples:
        members[str(topics.task_of(variable_text(example.request)).task_id)].append(example)
    numbers = {key: tuple(i for i, k in enumerate(topics.task_ids) if k == key) for key in members}
    return [Group(key, group.variants, group.kind, members[key], numbers[key]) for key in sorted(members)]


def propose_partitions(
    group: Group, config: DiscoverConfig, can_stand: Callable[[list[Example]], bool]
) -> list[tuple[TopicMap, list[Group]]]:
    """Ways to cut a one-form group into 2 to `max_parts` parts by its topics.

    Args:
        can_stand: whether a part with these examples could be learned and certified; a cut with one that could not is
            left out.
    """
    topics = topics_of_group(group, config)
    found = []
    for parts in group_topics(topics.centroids, config.max_parts):
        cut = cut_topics(group.key, topics, parts)
        groups = split_group(group, cut)
        if len(groups) == len(set(parts)) and all(can_stand(own.examples) for own in groups):
            found.append((cut, groups))
    return found
