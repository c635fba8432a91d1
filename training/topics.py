"""Topics: the finest stable groups of texts, their number not given, and how far each reaches.

Spherical k-means (Dhillon and Modha 2001) with the number of topics chosen by stability: two halves of the texts are
clustered apart, and the number wins at which they agree best about texts (adjusted mutual information, Vinh et al.
2010), discounted by 1/k^2 because two coarse halves agree easily. Density clustering (HDBSCAN with its defaults) leaves
most short utterances as noise; `understudy bench discover` measures both. Knows nothing of tasks or answers.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from cluster.signature import abstract_text

_NUM_CANDIDATES = 20
_MAX_TOPICS = 512
_MIN_TOPIC_TEXTS = 4
_MAX_HALF = 3000
_MAX_COMPARED = 3000
_NUM_REPEATS = 3
_MAX_ROUNDS = 20
_MIN_STABILITY = 0.3
"""Discounted agreement below which the texts have no topics of their own and are one."""
_STABLE_SHARE = 0.97
"""Share of the best stability at which a finer number of topics is still preferred; less is the noise of two halves."""
_PRIOR_TEXTS = 5
"""Texts at the mean distance of all that are added to each topic before its scale is taken."""
_MIN_PATTERN = 5
"""Distinct texts of one client alone from which a run of words is that client's own pattern."""
_PATTERN_WORDS = 4
_MAX_PATTERN_WORDS = 400


def find_topics(vectors: np.ndarray) -> np.ndarray:
    """Unit centroids [T, D] of unit vectors [N, D]; T is chosen by stability. Deterministic."""
    num = choose_num_topics(vectors)
    return fit_centroids(vectors, num, seed=0)


def choose_num_topics(vectors: np.ndarray) -> int:
    """The finest number of topics at which two halves of the texts agree about as well as at any; 1 where none is stable."""
    stability = {}
    for num in _candidates(len(vectors)):
        agreed = [_agreement_of_halves(vectors, num, repeat) for repeat in range(_NUM_REPEATS)]
        stability[num] = float(np.mean(agreed)) * (1 - 1 / num**2)
    best = max(stability.values(), default=0.0)
    if best < _MIN_STABILITY:
        return 1
    return max(num for num, value in stability.items() if value >= _STABLE_SHARE * best)


def _agreement_of_halves(vectors: np.ndarray, num_topics: int, repeat: int) -> float:
    from sklearn.metrics import adjusted_mutual_info_score

    order = np.random.default_rng(repeat).permutation(len(vectors))
    middle = len(order) // 2
    halves = [vectors[order[:middle][:_MAX_HALF]], vectors[order[middle:][:_MAX_HALF]]]
    compared = vectors[order[:_MAX_COMPARED]]
    fits = [fit_centroids(half, num_topics, 2 * repeat + number) for number, half in enumerate(halves)]
    return float(adjusted_mutual_info_score(*(nearest(compared, centroids) for centroids in fits)))


def _candidates(num_texts: int) -> list[int]:
    """Numbers of topics from 2, each about a third more than the one before."""
    most = min(_MAX_TOPICS, num_texts // (2 * _MIN_TOPIC_TEXTS))
    if most < 2:
        return []
    return sorted({round(num) for num in np.geomspace(2, most, _NUM_CANDIDATES)})


def fit_centroids(vectors: np.ndarray, num_topics: int, seed: int) -> np.ndarray:
    """Unit centroids [T, D] by spherical k-means; fewer than `num_topics` where the vectors are fewer or equal."""
    from sklearn.cluster import kmeans_plusplus

    distinct = np.unique(vectors, axis=0)
    if len(distinct) <= num_topics:
        return distinct
    centroids, _ = kmeans_plusplus(vectors, num_topics, random_state=seed)
    labels = np.full(len(vectors), -1)
    for _ in range(_MAX_ROUNDS):
        before, labels = labels, nearest(vectors, centroids)
        if np.array_equal(before, labels):
            break
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, vectors)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(norms > 1e-6, sums / np.maximum(norms, 1e-6), centroids)
    return centroids


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index [N] of the centroid nearest to each unit vector, by cosine."""
    return (vectors @ centroids.T).argmax(axis=1)


def fit_radii(fitted: np.ndarray, held_out: np.ndarray, centroids: np.ndarray, quantile: float) -> np.ndarray:
    """Cosine distance [T] per topic; together they reach `quantile` of the held-out texts and of texts like them.

    Split-conformal (Vovk et al. 2005): a text's distance is divided by the mean distance of its topic's fitted texts,
    shrunk towards that of all, and one finite-sample quantile of these ratios serves all topics. A quantile per topic
    would need about 1 / (1 - quantile) held-out texts of each. Without held-out texts the fitted ones stand in.
    """
    topics, distances = _distances(fitted, centroids)
    counts = np.bincount(topics, minlength=len(centroids))
    overall = distances.mean() if len(distances) else 1.0
    totals = np.bincount(topics, weights=distances, minlength=len(centroids))
    scales = np.maximum((totals + _PRIOR_TEXTS * overall) / (counts + _PRIOR_TEXTS), 1e-6)
    topics, distances = _distances(held_out, centroids) if len(held_out) else (topics, distances)
    if not len(distances):
        return np.zeros(len(centroids))
    ratios = np.sort(distances / scales[topics])
    rank = min(len(ratios), int(np.ceil((len(ratios) + 1) * quantile)))
    # A topic of equal texts has radius 0; the margin absorbs float32 rounding.
    return scales * ratios[rank - 1] + 1e-5


def _distances(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(vectors):
        return np.zeros(0, dtype=int), np.zeros(0)
    similarities = vectors @ centroids.T
    topics = similarities.argmax(axis=1)
    return topics, 1.0 - similarities[np.arange(len(vectors)), topics]


def cap_per_client(clients: Sequence[str], texts: Sequence[str], max_share: float) -> list[int]:
    """Rows to fit on: a text counts once, and no client gives more than `max_share` of them, where three or more call.

    What one client floods the traffic with thus neither founds a topic alone nor pulls at another's.
    """
    seen: set[str] = set()
    rows = [i for i, text in enumerate(texts) if not (text in seen or seen.add(text))]
    if len({clients[i] for i in rows}) <= 2:
        return rows
    limit = max(1, int(max_share * len(rows)))
    taken: dict[str, int] = {}
    kept = []
    for i in rows:
        taken[clients[i]] = taken.get(clients[i], 0) + 1
        if taken[clients[i]] <= limit:
            kept.append(i)
    return kept


def rows_of_shared_topics(labels: np.ndarray, clients: Sequence[str]) -> list[int]:
    """Rows whose topic is not mostly one client's; all rows where fewer than three clients call."""
    if len(set(clients)) <= 2:
        return list(range(len(clients)))
    per_topic: dict[int, Counter[str]] = defaultdict(Counter)
    for topic, client in zip(labels.tolist(), clients, strict=True):
        per_topic[topic][client] += 1
    own = {topic for topic, counts in per_topic.items() if 2 * max(counts.values()) > counts.total()}
    return [row for row, topic in enumerate(labels.tolist()) if topic not in own]


def rows_of_shared_patterns(clients: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Rows that hold no run of words which one client alone sends again and again; all where fewer than three call.

    Read from the texts, before anything is fitted: what is left out moves no encoder, centroid or radius. A client that
    words every call anew is held by `cap_per_client` and `rows_of_shared_topics` alone.
    """
    everything = list(range(len(texts)))
    if len(set(clients)) <= 2:
        return everything
    numbers = {client: number for number, client in enumerate(dict.fromkeys(clients))}
    first = {pair: row for row, pair in reversed(list(enumerate(zip(clients, texts, strict=True))))}
    distinct = sorted(first.values())
    runs = [_word_runs(texts[row]) for row in distinct]
    lengths = [len(own) for own in runs]
    if not any(lengths):
        return everything
    owners = np.repeat([numbers[clients[row]] for row in distinct], lengths)
    _, group, counts = np.unique(np.concatenate(runs), return_inverse=True, return_counts=True)
    lowest, highest = np.full(len(counts), len(numbers)), np.full(len(counts), -1)
    np.minimum.at(lowest, group, owners)
    np.maximum.at(highest, group, owners)
    is_own = (lowest == highest) & (counts >= _MIN_PATTERN)
    num_own = np.bincount(np.repeat(np.arange(len(distinct)), lengths), weights=is_own[group], minlength=len(distinct))
    left_out = {(clients[row], texts[row]) for row, num in zip(distinct, num_own, strict=True) if num}
    return [row for row in everything if (clients[row], texts[row]) not in left_out] or everything


def _word_runs(text: str) -> np.ndarray:
    """Hashes of the distinct runs of `_PATTERN_WORDS` words: eight bytes each, because many texts have many."""
    words = abstract_text(text).casefold().split()[:_MAX_PATTERN_WORDS]
    # zlib.crc32 is the same in every process; hash() is salted.
    codes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)
    size = max(0, len(codes) - _PATTERN_WORDS + 1)
    total = np.zeros(size, dtype=np.uint64)
    for offset in range(_PATTERN_WORDS):
        total = total * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + size]
    return np.unique(total)
