"""S3: examples -> tasks, the task of every example, and the route model that finds it again at request time.

Calls of one signature whose answers have one form are one task. A signature with several forms is split by what its
prompts say: hashed n-grams, a truncated SVD and HDBSCAN (Campello et al. 2013) find topics, and topics with the same
form and template lines are merged. Answers are read in train and validation only; every example, of any split, is
then assigned by the route model, so that what is learned, certified and served is one population. All in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.answers import json_value, kind_of
from cluster.config import Config
from cluster.prompts import split_units
from cluster.records import AnswerKind, Example, Split, TaskSpec
from cluster.route_model import NUM_BUCKETS, RouteModel, TextEncoder, TopicMap, hashed_features
from cluster.signature import message_text, signature_of, system_text, template_lines, tool_names, variable_text
from cluster.store import Store
from training.splits import SPLITS

TASKS_FOLDER = "tasks"
ROUTE_MODEL_FOLDER = "route_model"
NO_TOPIC = "varied signature, outside every topic"
FITTED: tuple[Split, ...] = ("train", "validation")
"""Splits whose answers may shape the tasks; calibration stays unseen for the gate, test for the report."""
_PROMPT_ROLES = ("system", "developer", "user")
_MIN_STATIC_REQUESTS = 10
_MIN_STATIC_SHARE = 0.99
_NUM_ID_CHARS = 12
_MAX_NAME_WORDS = 3
_MAX_NAME_SAMPLE = 200
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_MAX_WORD_CHARS = 20
_STOP_WORDS = frozenset(
    "about all among and any answer are ask call can content each exactly for from give given has have its keys may must"
    " not none null one only other return role should that the them then there these this tool tools type use user value"
    " when which with you your".split()
)


class DiscoverConfig(Config):
    """What counts as one task."""

    min_calls: int = Field(20, ge=2)
    """Fewest calls of a task, over all splits; calls of anything smaller stay on the LLM."""
    min_clients: int = Field(1, ge=1)
    """Fewest distinct clients of a task that may be learned, so that no specialist is one client's habits. Where the
    store knows one client only, sessions are counted instead."""
    min_form_share: float = Field(0.9, gt=0.5, le=1)
    """Share of a signature's calls that must have one answer form for the whole signature to be one task."""
    min_tool_share: float = Field(0.2, gt=0, le=1)
    """Share of tool calls from which a signature that offers tools is one agent step."""
    max_json_keys: int = Field(12, ge=1)
    """JSON answers whose keys number at most this many in all are one form; beyond it each key set is its own."""
    max_labels: int = Field(200, ge=2)
    """Most distinct answers of a label task."""
    max_label_share: float = Field(0.05, gt=0, le=1)
    """Most distinct answers of a label task, as a share of its calls: labels recur."""
    num_dimensions: int = Field(64, ge=2, le=256)
    """Size of the text vectors that topics are found in."""
    max_clustered: int = Field(10_000, ge=100)
    """Most examples of one signature that topics are fitted on; the time grows with its square."""
    min_topic_share: float = Field(0.01, gt=0, lt=1)
    """Smallest topic, as a share of its signature's calls; `min_calls` where that is more."""
    radius_quantile: float = Field(0.99, gt=0, le=1)
    """Share of a topic's own examples that its radius reaches."""


@dataclass(frozen=True)
class Discovery:
    """Tasks, most calls first, and where every example belongs."""

    tasks: tuple[TaskSpec, ...]
    assignment: dict[str, str | None]
    """example_id -> task_id; None where the example is of no task."""
    unassigned: dict[str, int]
    """Reason -> calls of no task."""
    route_model: RouteModel


def discover(examples_by_split: dict[Split, list[Example]], config: DiscoverConfig) -> Discovery:
    """Find the tasks of all splits together. Deterministic; the order of the examples does not matter."""
    examples = sorted((e for split in examples_by_split.values() for e in split), key=lambda e: e.example_id)
    by_signature: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_signature[signature_of(example.request)].append(example)
    groups: list[_Group] = []
    topic_maps: dict[str, TopicMap] = {}
    assignment: dict[str, str | None] = {e.example_id: None for e in examples}
    unassigned: Counter[str] = Counter()
    for signature, members in sorted(by_signature.items()):
        found, topics, reasons = _split_signature(signature, members, config)
        groups += found
        unassigned.update(reasons)
        if topics is not None:
            topic_maps[signature] = topics
    tasks = _describe(groups, examples)
    ids = {group.key: task.task_id for group, task in zip(groups, tasks, strict=True)}
    for group in groups:
        assignment.update((e.example_id, ids[group.key]) for e in group.examples)
    route_model = RouteModel(
        {group.signature: ids[group.key] for group in groups if not group.topics},
        {s: TopicMap(m.encoder, m.centroids, m.radii, [ids.get(k) for k in m.task_ids]) for s, m in topic_maps.items()},
    )
    ordered = tuple(sorted(tasks, key=lambda t: (-t.num_calls, t.task_id)))
    return Discovery(tasks=ordered, assignment=assignment, unassigned=dict(unassigned), route_model=route_model)


def save_discovery(store: Store, snapshot_id: str, discovery: Discovery) -> str:
    """Write the tasks, the assignment of one snapshot and the route model; returns the route model's folder."""
    folder = f"{ROUTE_MODEL_FOLDER}/{discovery.route_model.content_sha()}"
    if not store.is_published(folder):
        discovery.route_model.save(store, folder)
    for task in discovery.tasks:
        store.write_json(f"{TASKS_FOLDER}/{task.task_id}.json", task.model_dump(mode="json"))
    columns = {"example_id": list(discovery.assignment), "task_id": list(discovery.assignment.values())}
    schema = pa.schema([("example_id", pa.string()), ("task_id", pa.string())])
    store.write_table(assignment_path(snapshot_id), pa.table(columns, schema=schema))
    return folder


def assignment_path(snapshot_id: str) -> str:
    """Where a snapshot's examples have their tasks: columns example_id and task_id."""
    return f"{TASKS_FOLDER}/assignment-{snapshot_id}.parquet"


class _Group(NamedTuple):
    """The examples of one task before it is named."""

    key: str
    """Hash of the signature and, for topics, of form and template: the task's id, whatever else is found beside it."""
    signature: str
    kind: AnswerKind
    examples: list[Example]
    topics: tuple[int, ...] = ()


class _Form(NamedTuple):
    kind: AnswerKind
    keys: tuple[str, ...] = ()


_Found = tuple[list[_Group], TopicMap | None, Counter[str]]


def _split_signature(signature: str, members: list[Example], config: DiscoverConfig) -> _Found:
    """The groups of one signature, its topics where it is varied, and the calls of no group by reason."""
    num_calls = _num_calls(members)
    if num_calls < config.min_calls:
        return [], None, Counter({_too_few("signature", num_calls, config): num_calls})
    fitted = [e for e in members if e.split in FITTED]
    if not fitted:
        return [], None, Counter({"signature without a call in train or validation": num_calls})
    forms = _forms(fitted, config)
    kind = _single_kind(fitted, forms, config)
    if kind is not None:
        return [_Group(_hash(signature), signature, kind, members)], None, Counter()
    return _split_by_topic(signature, members, fitted, forms, config)


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
    keys = [_json_keys(e) if kind == "json" else () for e, kind in zip(examples, kinds, strict=True)]
    if len(set().union(*keys)) <= config.max_json_keys:
        keys = [()] * len(keys)
    limit = min(config.max_labels, config.max_label_share * _num_calls(examples))
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


def _json_keys(example: Example) -> tuple[str, ...]:
    value = json_value(message_text(example.target))
    return tuple(sorted(value)) if isinstance(value, dict) else ()


def _split_by_topic(
    signature: str, members: list[Example], fitted: list[Example], forms: list[_Form], config: DiscoverConfig
) -> _Found:
    chosen = np.random.default_rng(0).permutation(len(fitted))[: config.max_clustered]
    fitted, forms = [fitted[i] for i in chosen], [forms[i] for i in chosen]
    texts = [variable_text(e.request) for e in fitted]
    encoder = _fit_encoder(texts, config.num_dimensions)
    vectors = np.stack([encoder.encode(text) for text in texts])
    labels = _find_topics(vectors, max(config.min_calls, math.ceil(config.min_topic_share * len(fitted))))
    num_topics = int(labels.max()) + 1
    if num_topics == 0:
        return [], None, Counter({"varied signature without topics": _num_calls(members)})
    centroids, radii = _spheres(vectors, labels, config.radius_quantile)
    topic_forms, keys = [], []
    for topic in range(num_topics):
        rows = np.flatnonzero(labels == topic)
        counts = _count_forms([fitted[i] for i in rows], [forms[i] for i in rows])
        topic_forms.append(min(counts, key=lambda form, counts=counts: (-counts[form], form)))
        keys.append(_hash(signature, *map(str, topic_forms[-1]), *_common_lines([texts[i] for i in rows])))
    topics = TopicMap(encoder, centroids, radii, keys)
    kinds = {key: form.kind for key, form in zip(keys, topic_forms, strict=True)}
    routed: dict[str | None, list[Example]] = defaultdict(list)
    for example in members:
        routed[topics.task_of(variable_text(example.request)).task_id].append(example)
    reasons = Counter({NO_TOPIC: _num_calls(routed.pop(None, []))})
    groups = []
    for key, own in sorted(routed.items(), key=lambda item: str(item[0])):
        if _num_calls(own) < config.min_calls:
            reasons[_too_few("topic", _num_calls(own), config)] += _num_calls(own)
            continue
        groups.append(_Group(key, signature, kinds[key], own, tuple(i for i, k in enumerate(keys) if k == key)))
    return groups, topics, +reasons


def _fit_encoder(texts: list[str], num_dimensions: int) -> TextEncoder:
    """Inverse document frequencies and a truncated SVD of the hashed features, folded into one matrix."""
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    features = [hashed_features(text) for text in texts]
    ends = np.cumsum([0, *(len(buckets) for buckets, _ in features)])
    buckets, values = (np.concatenate(part) for part in zip(*features, strict=True))
    idf = np.log((1 + len(texts)) / (1 + np.bincount(buckets, minlength=NUM_BUCKETS))) + 1
    weighted = csr_matrix((values * idf[buckets], buckets, ends), shape=(len(texts), NUM_BUCKETS))
    svd = TruncatedSVD(min(num_dimensions, len(texts)), random_state=0)
    with np.errstate(invalid="ignore"):  # Equal texts have no variance to explain.
        svd.fit(normalize(weighted))
    return TextEncoder((idf[:, None] * svd.components_.T).astype(np.float32))


def _find_topics(vectors: np.ndarray, min_size: int) -> np.ndarray:
    """Topic number of each unit vector, -1 for noise."""
    from sklearn.cluster import HDBSCAN

    if len(vectors) < min_size:
        return np.full(len(vectors), -1)
    # Between unit vectors, Euclidean distance orders pairs as cosine distance does, and has the faster index.
    return HDBSCAN(min_cluster_size=min_size, min_samples=min(5, len(vectors)), copy=True).fit_predict(vectors)


def _spheres(vectors: np.ndarray, labels: np.ndarray, quantile: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit centroid of each topic, and the cosine distance within which `quantile` of its members lie."""
    members = [vectors[labels == topic] for topic in range(int(labels.max()) + 1)]
    means = np.stack([own.mean(axis=0) for own in members])
    centroids = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)
    radii = [np.quantile(1.0 - own @ centroid, quantile) for own, centroid in zip(members, centroids, strict=True)]
    # A topic of equal texts has radius 0; the margin absorbs float32 rounding.
    return centroids, np.array(radii) + 1e-5


def _common_lines(texts: list[str]) -> list[str]:
    """Template lines that at least half of the texts share, sorted."""
    counts = Counter(line for text in texts for line in set(template_lines(text)))
    return sorted(line for line, n in counts.items() if 2 * n >= len(texts))


def _describe(groups: list[_Group], everything: list[Example]) -> list[TaskSpec]:
    cost_of = _cost_measure(everything)
    num_calls, cost = _num_calls(everything), cost_of(everything)
    tasks = []
    for group, name in zip(groups, _names(groups), strict=True):
        request = group.examples[0].request
        per_split = Counter(e.split for e in group.examples)
        task = TaskSpec(
            task_id=f"task-{group.key[:_NUM_ID_CHARS]}",
            name=name,
            signature=group.signature,
            kind=group.kind,
            reference="gold" if all(e.reference == "gold" for e in group.examples) else "llm",
            num_calls=_num_calls(group.examples),
            share_calls=_num_calls(group.examples) / num_calls,
            share_cost=cost_of(group.examples) / cost if cost else 0.0,
            num_examples={split: per_split[split] for split in SPLITS},
            num_clients=len({client for e in group.examples for client in e.client_ids}),
            num_sessions=len({e.session_id for e in group.examples}),
            static_lines=_static_lines(group.examples),
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


def _static_lines(examples: list[Example]) -> tuple[str, ...]:
    """Sentences and lines that one role says in nearly every train request, in order of first appearance.

    Empty where there are too few train requests to tell.
    """
    requests = [e.request for e in examples if e.split == "train"]
    if len(requests) < _MIN_STATIC_REQUESTS:
        return ()
    counts: Counter[tuple[str, str]] = Counter()
    for request in requests:
        said = (m for m in request["messages"] if m["role"] in _PROMPT_ROLES)
        lines = ((m["role"], unit.strip()) for m in said for unit, _ in split_units(message_text(m)))
        counts.update(list(dict.fromkeys(lines)))
    static = (line for (_, line), n in counts.items() if line and n >= _MIN_STATIC_SHARE * len(requests))
    return tuple(dict.fromkeys(static))


def _names(groups: list[_Group]) -> list[str]:
    """At most three lower-case words each: of tools or JSON keys, else of the prompts.

    Read from the redacted train requests and from words most of them share, so that a name holds nothing personal.
    """
    samples = [[e for e in group.examples if e.split == "train"][:_MAX_NAME_SAMPLE] for group in groups]
    surfaces = [_surface_name(group, sample) for group, sample in zip(groups, samples, strict=True)]
    spoken = [_shared_words(s, with_user=bool(group.topics)) for group, s in zip(groups, samples, strict=True)]
    num_tasks = Counter(word for words in spoken for word in words)
    names = []
    for group, surface, words in zip(groups, surfaces, spoken, strict=True):
        distinct = sorted(words, key=lambda word: num_tasks[word])[:_MAX_NAME_WORDS]
        is_telling = surface and surfaces.count(surface) == 1
        names.append(surface if is_telling else " ".join(distinct) or surface or group.kind.replace("_", " "))
    return names


def _surface_name(group: _Group, sample: list[Example]) -> str:
    """The tools on offer or the JSON keys of the answers, where three words can hold them all."""
    if group.kind == "tool_call":
        parts = list(tool_names(group.examples[0].request))
    elif group.kind == "json":
        counts = Counter(key for e in sample for key in _json_keys(e))
        parts = [key for key, n in counts.most_common() if 2 * n >= len(sample)]
    else:
        return ""
    words = [word for part in parts for word in _words(part)]
    return " ".join(dict.fromkeys(words)) if len(words) <= _MAX_NAME_WORDS else ""


def _shared_words(sample: list[Example], *, with_user: bool) -> list[str]:
    """Words that most of the prompts share, in order of first appearance."""
    texts = (f"{variable_text(e.request) if with_user else ''}\n{system_text(e.request)}" for e in sample)
    counts = Counter(word for text in texts for word in dict.fromkeys(_words(text)))
    return [w for w, n in counts.items() if 2 * n > len(sample) and len(w) > 2 and w not in _STOP_WORDS]


def _words(text: str) -> list[str]:
    return [word.lower()[:_MAX_WORD_CHARS] for word in _WORD.findall(text)]


def _count_forms(examples: list[Example], forms: list[_Form]) -> Counter[_Form]:
    counts: Counter[_Form] = Counter()
    for example, form in zip(examples, forms, strict=True):
        counts[form] += len(example.source_call_ids)
    return counts


def _num_calls(examples: list[Example]) -> int:
    return sum(len(e.source_call_ids) for e in examples)


def _too_few(what: str, num_calls: int, config: DiscoverConfig) -> str:
    return f"{what} with {num_calls} calls, fewer than discover.min_calls={config.min_calls}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
