"""Call sites and topics -> groups of calls that one specialist can answer together: the tasks before they are named.

Calls of one site whose answers have one form are one task. A site with several forms is split by what its prompts say:
topics whose answers have the same form are merged, and a topic of mixed answers is of no task. Versions of one
template (most of its characters kept, same tools) are one site. Answers are read in train and validation only.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from pydantic import Field

from cluster.answers import kind_of
from cluster.config import Config
from cluster.records import AnswerKind, Example, Split
from cluster.route_model import TopicMap
from cluster.signature import abstract_text, message_text, surface_of, system_text, tool_names, variable_text
from training.encoders import HASHED, fit_encoder
from training.identity import similarity
from training.naming import json_keys
from training.topics import (
    cap_per_client,
    find_topics,
    fit_radii,
    nearest,
    rows_of_shared_patterns,
    rows_of_shared_topics,
)

NO_TOPIC = "varied signature, outside every topic"
MIXED_TOPIC = "topic whose answers have several forms"
FITTED: tuple[Split, ...] = ("train", "validation")
"""Splits whose answers may shape the tasks; calibration stays unseen for the gate, test for the report."""
_MAX_LINE_SAMPLE = 50
_MIN_VERSION_SIMILARITY = 0.8
_MIN_VERSION_LINES = 3
"""A template of fewer lines has no version: one changed line may be another task."""


class DiscoverConfig(Config):
    """What counts as one task."""

    min_calls: int = Field(20, ge=2)
    """Fewest calls of a task, over all splits; calls of anything smaller stay on the LLM."""
    min_clients: int = Field(1, ge=1)
    """Fewest distinct clients of a task that may be learned, so that no specialist is one client's habits. Where the
    store knows one client only, sessions are counted instead."""
    min_form_share: float = Field(0.9, gt=0.5, le=1)
    """Share of a site's, or a topic's, calls that must have one answer form to be one task."""
    min_tool_share: float = Field(0.2, gt=0, le=1)
    """Share of tool calls from which a site that offers tools is one agent step."""
    max_json_keys: int = Field(12, ge=1)
    """JSON answers whose keys number at most this many in all are one form; beyond it each key set is its own."""
    max_labels: int = Field(200, ge=2)
    """Most distinct answers of a label task."""
    max_label_share: float = Field(0.05, gt=0, le=1)
    """Most distinct answers of a label task, as a share of its calls: labels recur."""
    encoder: str = HASHED
    """What texts are compared by: `hashed` (hashed n-grams and SVD, fitted to the traffic), a hub id, or a folder."""
    num_dimensions: int = Field(128, ge=2, le=256)
    """Size of the hashed encoder's vectors."""
    max_clustered: int = Field(10_000, ge=100)
    """Most examples of one site that topics are fitted on."""
    max_client_share: float = Field(0.1, gt=0, le=1)
    """Most of the texts that topics are fitted on may come from one client, as a share; where three clients or more call."""
    radius_quantile: float = Field(0.99, gt=0, le=1)
    """Share of a topic's held-out examples that its radius reaches."""
    measure_splits: bool = False
    """Whether a call site whose answers have one form is split where specialists of its parts surely agree more often
    on validation than one joint specialist of as many steps in all. Costs short fine-tunes on Ray: for every such task
    that has topics 2 + 3 + ... + max_parts of parts, of select.probe_steps steps each, as many steps of joint ones, and
    those of the best split once more."""
    max_parts: int = Field(3, ge=2, le=8)
    """Most parts that a split is measured with."""
    llm_naming: bool = False
    """Whether the first endpoint of [[upstream]] names and describes each task from its template and a few redacted
    train examples; names alone change, never ids. At most 200 tasks a run, the largest first, about 2,500 tokens each."""


class Group(NamedTuple):
    """The examples of one task before it is named."""

    key: str
    """Hash of the site and, for topics, of the form: the task's id, whatever else is found beside it."""
    variants: tuple[str, ...]
    kind: AnswerKind
    examples: list[Example]
    topics: tuple[int, ...] = ()


class _Form(NamedTuple):
    kind: AnswerKind
    keys: tuple[str, ...] = ()


Found = tuple[list[Group], TopicMap | None, Counter[str]]


def merge_versions(by_variant: dict[str, list[Example]]) -> list[tuple[str, ...]]:
    """Variants that are versions of one template, the oldest first; every variant is in one tuple."""
    lines = {v: _system_lines(members) for v, members in by_variant.items()}
    first_seen = {v: min((e.ts, e.example_id) for e in members) for v, members in by_variant.items()}
    by_surface: dict[tuple[str, str], list[str]] = defaultdict(list)
    versions: dict[str, list[str]] = {}
    for variant in sorted(by_variant, key=lambda v: first_seen[v]):
        # Versions share the tools and the longest line or two; the index spares most comparisons.
        surface = surface_of(by_variant[variant][0].request)
        longest = sorted(lines[variant], key=lambda h: (-lines[variant][h], h))[:4]
        near = sorted({v for line in longest for v in by_surface[surface, line]}, key=lambda v: first_seen[v])
        like = (v for v in near if similarity(lines[v], lines[variant]) >= _MIN_VERSION_SIMILARITY)
        oldest = next(like, variant) if len(lines[variant]) >= _MIN_VERSION_LINES else variant
        versions.setdefault(oldest, []).append(variant)
        if oldest == variant:
            for line in lines[variant]:
                by_surface[surface, line].append(variant)
    return [tuple(found) for _, found in sorted(versions.items())]


def template_hashes(examples: list[Example]) -> dict[str, int]:
    """Hash of each abstracted prompt line that at least half of the examples share -> its characters."""
    sample = examples[:_MAX_LINE_SAMPLE]
    counts: Counter[str] = Counter()
    for example in sample:
        texts = (
            message_text(m) for m in example.request["messages"] if m.get("role") in ("system", "developer", "user")
        )
        counts.update({line for text in texts for line in abstract_text(text).splitlines()})
    return {_hash(line): len(line) for line, n in sorted(counts.items()) if 2 * n >= len(sample)}


def split_site(variants: tuple[str, ...], members: list[Example], config: DiscoverConfig) -> Found:
    """The groups of one site, its topics where it is varied, and the calls of no group by reason."""
    total = num_calls(members)
    if total < config.min_calls:
        return [], None, Counter({_too_few("signature", total, config): total})
    fitted = [e for e in members if e.split in FITTED]
    if not fitted:
        return [], None, Counter({"signature without a call in train or validation": total})
    forms = _forms(fitted, config)
    kind = _single_kind(fitted, forms, config)
    if kind is not None:
        return [Group(_hash(variants[0]), variants, kind, members)], None, Counter()
    return _split_by_topic(variants, members, fitted, forms, config)


def topics_of_group(group: Group, config: DiscoverConfig) -> TopicMap:
    """The topics inside a group, whose keys mean nothing; its examples must be of train or validation in part."""
    fitted = [e for e in group.examples if e.split in FITTED]
    return fit_topics(group.variants[0], fitted, _forms(fitted, config), config)[0]


def num_calls(examples: list[Example]) -> int:
    """Calls behind the examples; merged duplicates count."""
    return sum(len(e.source_call_ids) for e in examples)


def _single_kind(examples: list[Example], forms: list[_Form], config: DiscoverConfig) -> AnswerKind | None:
    """The kind of answer where the whole signature is one task, or None where it is varied."""
    counts = _count_forms(examples, forms)
    form, most = counts.most_common(1)[0]
    if most >= config.min_form_share * counts.total():
        return form.kind
    num_tool_calls = sum(n for form, n in counts.items() if form.kind == "tool_call")
    is_agent_step = tool_names(examples[0].request) and num_tool_calls >= config.min_tool_share * counts.total()
    return "tool_call" if is_agent_step else None


def _forms(examples: list[Example], config: DiscoverConfig) -> list[_Form]:
    """What each answer looks like, in the light of the others."""
    kinds = [kind_of(e.target, e.request) for e in examples]
    keys = [json_keys(e) if kind == "json" else () for e, kind in zip(examples, kinds, strict=True)]
    if len(set().union(*keys)) <= config.max_json_keys:
        keys = [()] * len(keys)
    limit = min(config.max_labels, config.max_label_share * num_calls(examples))
    plain = [_answer(e) for e, kind in zip(examples, kinds, strict=True) if kind in ("label", "text")]
    if len(set(plain)) <= limit and not any("\n" in answer for answer in plain):
        closed = {"label", "text"}
    else:
        words = {_answer(e) for e, kind in zip(examples, kinds, strict=True) if kind == "label"}
        closed = {"label"} if len(words) <= limit else set()
    open_or_label = {kind: "label" if kind in closed else "text" for kind in ("label", "text")}
    return [_Form(open_or_label.get(kind, kind), own) for kind, own in zip(kinds, keys, strict=True)]


def _answer(example: Example) -> str:
    return message_text(example.target).strip().casefold()


def _split_by_topic(
    variants: tuple[str, ...], members: list[Example], fitted: list[Example], forms: list[_Form], config: DiscoverConfig
) -> Found:
    topics, keys, kinds = fit_topics(variants[0], fitted, forms, config)
    if not any(keys):
        return [], None, Counter({"varied signature without topics": num_calls(members)})
    routed: dict[str | None, list[Example]] = defaultdict(list)
    mixed: list[Example] = []
    for example in members:
        topic, _, is_inside = topics.nearest(variable_text(example.request))
        (mixed if is_inside and keys[topic] is None else routed[keys[topic] if is_inside else None]).append(example)
    reasons = Counter({NO_TOPIC: num_calls(routed.pop(None, [])), MIXED_TOPIC: num_calls(mixed)})
    groups = []
    for key, own in sorted(routed.items(), key=lambda item: str(item[0])):
        if num_calls(own) < config.min_calls:
            reasons[_too_few("topic", num_calls(own), config)] += num_calls(own)
            continue
        groups.append(Group(str(key), variants, kinds[key], own, tuple(i for i, k in enumerate(keys) if k == key)))
    return groups, topics, +reasons


def fit_topics(
    site: str, fitted: list[Example], forms: list[_Form], config: DiscoverConfig
) -> tuple[TopicMap, list[str | None], dict[str | None, AnswerKind]]:
    """Topics of one site, the group key of each (None: mixed answers), and the kind of answer of each key.

    Centroids come from train alone and radii from validation, so that a radius is calibrated on calls it has not seen.
    A pattern or a topic that is mostly one client's is fitted away, so that it moves neither the encoder
    nor another's centroid.
    """
    texts = [variable_text(e.request) for e in fitted]
    clients = [e.client_ids[0] if e.client_ids else "" for e in fitted]
    shared = rows_of_shared_patterns(clients, texts)
    capped = cap_per_client([clients[i] for i in shared], [texts[i] for i in shared], config.max_client_share)
    kept = [shared[row] for row in capped]
    kept = sorted(kept, key=lambda i: _hash(texts[i]))[: config.max_clustered]
    while True:
        encoder = fit_encoder(config.encoder, [texts[i] for i in kept], config.num_dimensions)
        vectors = encoder.encode_all([texts[i] for i in kept])
        is_train = np.array([fitted[i].split == "train" for i in kept])
        if not is_train.any():
            is_train[:] = True
        centroids = find_topics(vectors[is_train])
        shared = rows_of_shared_topics(nearest(vectors, centroids), [clients[i] for i in kept])
        if len(shared) == len(kept) or not shared:
            break
        kept = [kept[row] for row in shared]
    radii = fit_radii(vectors[is_train], vectors[~is_train], centroids, config.radius_quantile)
    labels = nearest(encoder.encode_all(texts), centroids)
    keys: list[str | None] = []
    kinds: dict[str | None, AnswerKind] = {}
    for topic in range(len(centroids)):
        rows = np.flatnonzero(labels == topic)
        counts = _count_forms([fitted[i] for i in rows], [forms[i] for i in rows])
        form = min(counts, key=lambda form, counts=counts: (-counts[form], form), default=None)
        is_pure = form is not None and counts[form] >= config.min_form_share * counts.total()
        keys.append(_hash(site, *map(str, form)) if is_pure and form else None)
        if is_pure and form:
            kinds[keys[-1]] = form.kind
    return TopicMap(encoder, centroids, radii, keys), keys, kinds


def _system_lines(members: list[Example]) -> dict[str, int]:
    return {_hash(line): len(line) for line in abstract_text(system_text(members[0].request)).splitlines()}


def _count_forms(examples: list[Example], forms: list[_Form]) -> Counter[_Form]:
    counts: Counter[_Form] = Counter()
    for example, form in zip(examples, forms, strict=True):
        counts[form] += len(example.source_call_ids)
    return counts


def _too_few(what: str, num_calls: int, config: DiscoverConfig) -> str:
    return f"{what} with {num_calls} calls, fewer than discover.min_calls={config.min_calls}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
