"""How well tasks are found without labels, and how fast and how surely calls reach them: `understudy bench discover`.

Sites are compared with the labels of the call sites of every source, topics with the gold classes of the labelled sets,
beside scikit-learn's KMeans with the true number of classes and HDBSCAN with its defaults on the same vectors (the
pipeline that BERTopic runs, without its UMAP step, which is not installed here). Noise counts as one cluster for all.
Needs no Ray. Reads files of the normalised format; labels are used to score alone.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cluster.access import Pseudonyms
from cluster.errors import InputError
from cluster.quarantine import QuarantineRow
from cluster.records import AgentCall, Example, Split
from cluster.route_model import RouteModel, TextEncoder, TopicMap
from cluster.signature import last_user_text, signature_of, system_text
from cluster.sites import SiteMap, fit_sites
from training.discover import DiscoverConfig, Discovery, Previous, discover
from training.encoders import HASHED, fit_encoder
from training.formats import LogReader
from training.splits import SplitConfig, split_of
from training.topics import find_topics, nearest

_PUBLIC_KEY = b"discovery benchmark: public data"
_DERIVED = ("metagpt", "http_crewai")
"""Sources whose call sites are told by a derived label; unlabelled calls are left out."""
_REPORTED_ONLY = ("bfcl", "http_")
_INTENT_SETS = ("clinc150", "nlupp")
_CLASS_SETS = ("snips", "banking77")
_NO_CLASS = "oos"
QUICK_FILES = ("snips", "metagpt")
"""Of the shared data, where it is only to be shown that it runs."""
_NUM_TIMED = 2_000
_TABLE_SIZES = (10, 100, 1000)


class Call(NamedTuple):
    """One call with the file it came from."""

    source: str
    call: AgentCall


def shared_calls() -> list[pathlib.Path]:
    """All call logs of the shared data (UNDERSTUDY_DATA, default ../shared/data).

    Raises:
        InputError: there are none.
    """
    folder = pathlib.Path(os.environ.get("UNDERSTUDY_DATA", "../shared/data"))
    found = [path for part in ("agents", "nlu", "fc") for path in sorted((folder / part).glob("*.jsonl.gz"))]
    if not found:
        raise InputError(
            f"{folder}: no call logs; allowed: files given with --calls, or the folder of the shared data in "
            "UNDERSTUDY_DATA; next: UNDERSTUDY_DATA=/PATH understudy bench discover"
        )
    return found


def bench_discover(
    calls: Sequence[pathlib.Path],
    fit: Sequence[pathlib.Path],
    say: Callable[[str], object] = print,
    encoder: str = HASHED,
) -> dict[str, Any]:
    """Measure sites, topics, stability and routing.

    Args:
        calls: files that are scored.
        fit: files that are fitted on; empty fits on three sessions in four of `calls` and routes the rest.
        encoder: `discover.encoder`.

    Raises:
        InputError: a path that is no call log.
        ConfigError: the encoder cannot be loaded.
    """
    scored = _read(calls)
    fitted = _read(fit) if fit else [c for c in scored if split_of(c.call.session_id, SplitConfig()) != "test"]
    held_out = scored if fit else [c for c in scored if split_of(c.call.session_id, SplitConfig()) == "test"]
    say(f"{len(scored)} calls of {len({c.source for c in scored})} files; fitted on {len(fitted)}")
    result = {"encoder": encoder, **_score_sites(scored, fitted, say)}
    topics = {source: _score_topics(own, encoder, say) for source, own in _by_source(scored).items() if _gold(own)}
    result["v_measure"] = {name: row for found in topics.values() for name, row in found.items()}
    config = DiscoverConfig(encoder=encoder)
    discovery = discover(_examples(fitted), config)
    result["num_tasks"] = _count_tasks(discovery, fitted)
    say(f"{len(discovery.tasks)} tasks: {result['num_tasks']}")
    result |= _measure_stability(fitted, discovery, config, say)
    result |= _measure_router(discovery.route_model, held_out, fitted, say)
    result |= _measure_out_of_task(scored, config, say)
    return result


def _read(paths: Sequence[pathlib.Path]) -> list[Call]:
    reader = LogReader(Pseudonyms(_PUBLIC_KEY), 0.0)
    found = []
    for path in paths:
        items = (item for item in reader.read(pathlib.Path(path)) if not isinstance(item, QuarantineRow))
        found += [Call(pathlib.Path(path).name.split(".")[0], item) for item in items if item.message is not None]
    return found


def _by_source(calls: Sequence[Call]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        found[call.source].append(call)
    return found


def _site_label(call: Call) -> str | None:
    """What is known of a call's site: None where nothing is."""
    if call.source in _DERIVED:
        return call.call.label if call.call.label_kind == "derived" else None
    return None if call.source.startswith(_REPORTED_ONLY) else system_text(call.call.request)


def _score_sites(scored: list[Call], fitted: list[Call], say: Callable[[str], object]) -> dict[str, Any]:
    from sklearn.metrics import v_measure_score

    sites = fit_sites([c.call.request for c in [*fitted, *scored]])
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for call in scored:
        label = _site_label(call)
        if label is not None:
            rows[call.source].append((label, sites.site_of(call.call.request).site))
    per_source = {source: float(v_measure_score(*zip(*pairs, strict=True))) for source, pairs in rows.items()}
    macro = float(np.mean(list(per_source.values()))) if per_source else None
    for source, value in per_source.items():
        say(f"site V-measure {source}: {value:.3f}")
    return {"site_v_measure": macro, "site_v_measure_per_source": per_source}


def _gold(calls: list[Call]) -> dict[str, list[str]]:
    """Gold classes of a labelled set, by the name they are reported under."""
    source = calls[0].source
    if source in _CLASS_SETS:
        return {source: [str(c.call.label) for c in calls]}
    if source not in _INTENT_SETS:
        return {}
    answers = [json.loads((c.call.message or {}).get("content") or "{}") for c in calls]
    if source == "clinc150":
        domains = [str(c.call.label) for c in calls]
        return {source: [str(a.get("intent")) for a in answers], f"{source}_domains": domains}
    return {source: [json.dumps(sorted(set(a.get("intents") or ()))) for a in answers]}


def _score_topics(calls: list[Call], encoder: str, say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    from sklearn.cluster import HDBSCAN, KMeans

    texts = [last_user_text(c.call.request) for c in calls]
    vectors = fit_encoder(encoder, texts, DiscoverConfig().num_dimensions).encode_all(texts)
    ours = nearest(vectors, find_topics(vectors))
    default = HDBSCAN(copy=True).fit_predict(vectors)
    found = {}
    for name, gold in _gold(calls).items():
        true_k = KMeans(len(set(gold)), n_init=1, random_state=0).fit_predict(vectors)
        arms = {"ours": ours, "default_pipeline": default, "kmeans_true_k": true_k}
        scores = {arm: _agreement(gold, labels) for arm, labels in arms.items()}
        found[name] = {arm: score["v"] for arm, score in scores.items()} | {
            measure: {arm: score[measure] for arm, score in scores.items()} for measure in ("ari", "purity", "clusters")
        }
        say(f"topics {name}: " + ", ".join(f"{arm} V {s['v']:.3f} ({s['clusters']})" for arm, s in scores.items()))
    return found


def _agreement(gold: list[str], labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import adjusted_rand_score, v_measure_score

    pairs = Counter(zip(labels.tolist(), gold, strict=True))
    largest: Counter[int] = Counter()
    for (label, _), n in pairs.items():
        largest[label] = max(largest[label], n)
    return {
        "v": float(v_measure_score(gold, labels)),
        "ari": float(adjusted_rand_score(gold, labels)),
        "purity": largest.total() / len(gold),
        "clusters": len(set(labels.tolist())),
    }


def _examples(calls: Sequence[Call]) -> dict[Split, list[Example]]:
    """Examples as curation would make them, without redaction and deduplication: the benchmark counts calls."""
    found: dict[Split, list[Example]] = defaultdict(list)
    for _, call in calls:
        split = split_of(call.session_id, SplitConfig())
        example = Example(
            example_id=call.call_id,
            split=split,
            session_id=call.session_id,
            ts=call.ts,
            request=call.request,
            target=call.message or {},
            reference="gold" if call.served_by == "gold" else "llm",
            source_call_ids=(call.call_id,),
        )
        found[split].append(example)
    return found


def _count_tasks(discovery: Discovery, calls: Sequence[Call]) -> dict[str, int]:
    per_source: dict[str, set[str]] = defaultdict(set)
    for source, call in calls:
        task_id = discovery.assignment.get(call.call_id)
        per_source[source] |= {task_id} if task_id else set()
    return {source: len(tasks) for source, tasks in per_source.items()}


def _measure_stability(
    calls: list[Call], first: Discovery, config: DiscoverConfig, say: Callable[[str], object]
) -> dict[str, Any]:
    """Share of calls of surviving tasks that keep their task_id: 90% of the sessions, then the later 90% of the calls."""
    previous = Previous(first.identities, first.route_model)
    sessions = sorted({c.call.session_id for c in calls})
    dropped = set(np.random.default_rng(0).permutation(sessions)[: len(sessions) // 10].tolist())
    by_source = _by_source(calls)
    slices = {
        "stability_subsample": [c for c in calls if c.call.session_id not in dropped],
        "stability_later": [c for own in by_source.values() for c in own[len(own) // 10 :]],
    }
    shares = {}
    for name, part in slices.items():
        again = discover(_examples(part), config, previous)
        surviving = {t.task_id for t in first.tasks} & {t.task_id for t in again.tasks}
        before = {c.call.call_id: first.assignment[c.call.call_id] for c in part}
        own = [call_id for call_id, task_id in before.items() if task_id in surviving]
        shares[name] = sum(again.assignment[call_id] == before[call_id] for call_id in own) / max(1, len(own))
        say(f"{name}: {shares[name]:.4f} of {len(own)} calls, {len(surviving)} of {len(first.tasks)} tasks survive")
    return {"stability": min(shares.values()), **shares}


def _measure_router(
    model: RouteModel, held_out: Sequence[Call], fitted: Sequence[Call], say: Callable[[str], object]
) -> dict[str, Any]:
    """Decision times on this core, and whether held-out calls of known sites reach the task of their site."""
    taught: dict[str, Counter[str | None]] = defaultdict(Counter)
    for call in fitted:
        label = _site_label(call)
        if label is not None:
            taught[f"{call.source}\n{label}"][model.task_of(call.call.request).task_id] += 1
    right = [
        model.task_of(call.call.request).task_id in taught[key].keys() - {None}
        for call in held_out
        if (label := _site_label(call)) is not None
        and (key := f"{call.source}\n{label}") in taught
        and taught[key].most_common(1)[0][0] is not None
    ]
    timed = [c.call.request for c in held_out[:: max(1, len(held_out) // _NUM_TIMED)]]
    known_ms = [t for r in timed if (t := _time_ms(model.task_of, r)) and model.task_of(r).reason == "signature"]
    topics_ms = _time_topics(fitted)
    result = {
        "router_accuracy": float(np.mean(right)) if right else None,
        "router_known_p50_ms": float(np.median(known_ms)) if known_ms else None,
        "router_p50_ms": float(np.quantile(topics_ms, 0.5)),
        "router_p99_ms": float(np.quantile(topics_ms, 0.99)),
        "router_by_num_tasks": _time_tables(),
    }
    say(f"router: {result}")
    return result


def _time_ms(decide: Callable[[Any], object], argument: Any) -> float:
    begin = time.perf_counter()
    decide(argument)
    return 1e3 * (time.perf_counter() - begin)


def _time_topics(calls: Sequence[Call]) -> list[float]:
    """Milliseconds of one decision where the text must be encoded: topics of all sources' texts together."""
    requests = [c.call.request for c in calls[:: max(1, len(calls) // _NUM_TIMED)]]
    texts = [last_user_text(r) for r in requests]
    topics = _random_topics(fit_encoder(HASHED, texts, DiscoverConfig().num_dimensions), 100)
    model = RouteModel({}, {signature_of(r): topics for r in requests}, SiteMap())
    return [_time_ms(model.task_of, request) for request in requests]


def _random_topics(encoder: Any, num: int) -> TopicMap:
    size = encoder.components.shape[1]
    centroids = np.random.default_rng(0).standard_normal((num, size)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return TopicMap(encoder, centroids, np.full(num, 2.0), [f"task-{i}" for i in range(num)])


def _time_tables() -> dict[str, dict[str, float]]:
    """Median milliseconds and mebibytes of a route model whose one varied site holds so many tasks."""
    from cluster.route_model import NUM_BUCKETS

    size = DiscoverConfig().num_dimensions
    encoder = TextEncoder(np.random.default_rng(0).standard_normal((NUM_BUCKETS, size)).astype(np.float32))
    request = {"messages": [{"role": "user", "content": "please book a table for two at seven in the evening"}]}
    found = {}
    for num in _TABLE_SIZES:
        topics = _random_topics(encoder, num)
        model = RouteModel({}, {signature_of(request): topics})
        num_bytes = encoder.components.nbytes + topics.centroids.nbytes + topics.radii.nbytes
        times = [_time_ms(model.task_of, request) for _ in range(200)]
        found[str(num)] = {"p50_ms": float(np.median(times)), "mib": num_bytes / 2**20}
    return found


def _measure_out_of_task(calls: list[Call], config: DiscoverConfig, say: Callable[[str], object]) -> dict[str, Any]:
    """AUROC of the distance to the nearest topic, relative to its radius, of calls outside every topic.

    clinc150's out-of-scope calls against its held-out calls in scope; and calls of each other labelled set against
    the same. None of the outside calls is fitted on.
    """
    from sklearn.metrics import roc_auc_score

    from training.topics import fit_radii

    sources = _by_source(calls)
    if "clinc150" not in sources:
        return {"out_of_task_auroc": None}
    texts: dict[str, list[str]] = {"fitted": [], "validation": [], "held out": [], "clinc150 out of scope": []}
    intents = _gold(sources["clinc150"])["clinc150"]
    for call, intent in zip(sources["clinc150"], intents, strict=True):
        split = split_of(call.call.session_id, SplitConfig())
        part = {"train": "fitted", "validation": "validation"}.get(split, "held out")
        texts["clinc150 out of scope" if intent == _NO_CLASS else part].append(last_user_text(call.call.request))
    for source in ("banking77", "snips", "restaurant8k", "nlupp"):
        texts[source] = [last_user_text(c.call.request) for c in sources.get(source, ())][:1000]
    encoder = fit_encoder(config.encoder, texts["fitted"], config.num_dimensions)
    vectors = {name: encoder.encode_all(own) for name, own in texts.items() if own}
    centroids = find_topics(vectors["fitted"])
    radii = fit_radii(vectors["fitted"], vectors["validation"], centroids, config.radius_quantile)
    topics = TopicMap(encoder, centroids, radii, [None] * len(centroids))
    scores = {name: _relative_distance(topics, own) for name, own in vectors.items()}
    inside = scores["held out"]
    aurocs = {
        name: float(roc_auc_score([0] * len(inside) + [1] * len(own), [*inside, *own]))
        for name, own in scores.items()
        if name not in ("fitted", "validation", "held out")
    }
    say(f"out of task AUROC: {aurocs}; in-scope calls inside a radius: {np.mean(np.array(inside) <= 1):.3f}")
    return {"out_of_task_auroc": aurocs.get("clinc150 out of scope"), "out_of_task_auroc_per_source": aurocs}


def _relative_distance(topics: TopicMap, vectors: np.ndarray) -> list[float]:
    distances = 1.0 - vectors @ topics.centroids.T
    rows = distances.argmin(axis=1)
    return (distances[np.arange(len(rows)), rows] / np.maximum(topics.radii[rows], 1e-6)).tolist()
