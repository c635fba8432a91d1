"""Turns a request into the task it belongs to, or None with the reason: signature lookup, then nearest topic centroid.

Fitted by training/discover.py, read by the router; needs numpy alone and sees prompts only, never answers. A text is
encoded as hashed word, character and template-line features, TF-IDF weighted and projected by a truncated SVD
("hashed-ngram-svd-2"; Weinberger et al. 2009, Deerwester et al. 1990). A call farther than a topic's calibrated
radius is of no task.
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from cluster.errors import StoreError
from cluster.neural_encoder import neural_encoder
from cluster.records import Record
from cluster.signature import abstract_text, template_lines, variable_text
from cluster.sites import SiteMap
from cluster.store import Store, content_hash

ENCODER = "hashed-ngram-svd-2"
NUM_BUCKETS = 2**15
_MAX_HALF = 2000
_WORD = re.compile(r"<\*>|\w+")
_CHAR_ORDERS = (3, 4, 5)
# Characters weigh most: on short utterances they tell intents apart better than words (k-means, five labelled sets).
_WEIGHTS = {"word": 0.5, "pair": 0.2, "chars": 1.0, "line": 1.0}
_MAX_FILE_BYTES = 64 * 2**20
_MODEL_FILE = "route_model.json"


class RouteGuess(Record):
    """The task a request belongs to by its prompt alone; `reason` says how it was found, or why there is none."""

    task_id: str | None
    reason: str
    distance: float | None = None
    """Cosine distance in [0, 2] to the nearest topic; None where the signature alone decided."""


class Encoder(Protocol):
    """Text -> unit vector [D], or the zero vector."""

    name: str
    """Where it comes from: `hashed-ngram-svd-2`, a hub id or a folder; stored with the model."""

    def encode(self, text: str) -> np.ndarray: ...

    def encode_all(self, texts: Sequence[str]) -> np.ndarray: ...


class TextEncoder:
    """Text -> unit vector [D]; the zero vector where no feature was seen in fitting."""

    name = ENCODER

    def __init__(self, components: np.ndarray) -> None:
        """`components` is float32 [NUM_BUCKETS, D], with the inverse document frequencies multiplied in."""
        assert components.shape[0] == NUM_BUCKETS, components.shape
        self.components = components.astype(np.float32, copy=False)

    def encode(self, text: str) -> np.ndarray:
        buckets, values = hashed_features(text)
        vector = values @ self.components[buckets]
        norm = float(np.linalg.norm(vector))
        return vector / norm if norm > 1e-6 else np.zeros_like(vector)

    def encode_all(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [N, D]."""
        return np.stack([self.encode(text) for text in texts])


class TopicMap:
    """The topics of one varied signature: which task a text is nearest to, and whether it is near enough."""

    def __init__(
        self, encoder: Encoder, centroids: np.ndarray, radii: np.ndarray, task_ids: Sequence[str | None]
    ) -> None:
        """Rows are topics: unit `centroids` [T, D], `radii` [T] as cosine distances, the task of each (None: no task)."""
        assert len(centroids) == len(radii) == len(task_ids) > 0, (centroids.shape, radii.shape, len(task_ids))
        self.encoder, self.task_ids = encoder, tuple(task_ids)
        self.centroids, self.radii = centroids.astype(np.float32), radii.astype(np.float32)

    def nearest(self, text: str) -> tuple[int, float, bool]:
        """Number of the nearest topic, the distance to it, and whether its radius reaches the text."""
        distances = 1.0 - self.centroids @ self.encoder.encode(text)
        topic = int(distances.argmin())
        return topic, float(distances[topic]), bool(distances[topic] <= self.radii[topic])

    def task_of(self, text: str) -> RouteGuess:
        topic, distance, is_inside = self.nearest(text)
        if not is_inside:
            return RouteGuess(
                task_id=None, reason=f"out of task: outside the radius of topic {topic}", distance=distance
            )
        task_id = self.task_ids[topic]
        reason = f"topic {topic}" if task_id else f"topic {topic} has no task"
        return RouteGuess(task_id=task_id, reason=reason, distance=distance)


class RouteModel:
    """Call site -> task, or call site -> topics -> task. Immutable; safe to share between threads."""

    def __init__(self, tasks: Mapping[str, str], topics: Mapping[str, TopicMap], sites: SiteMap | None = None) -> None:
        """`tasks` maps sites that are one task to its id, `topics` holds the varied ones; keys are `CallSite.variant`."""
        assert not tasks.keys() & topics.keys(), "a signature is one task or varied, not both"
        self.tasks, self.topics, self.sites = dict(tasks), dict(topics), sites or SiteMap()

    def task_of(self, request: dict[str, Any]) -> RouteGuess:
        """Cost: about 0.05 ms for a signature that is one task; encodes the last user message where it is varied."""
        variant = self.sites.site_of(request).variant
        task_id = self.tasks.get(variant)
        if task_id is not None:
            return RouteGuess(task_id=task_id, reason="signature")
        topics = self.topics.get(variant)
        if topics is None:
            return RouteGuess(task_id=None, reason="unknown signature")
        return topics.task_of(variable_text(request))

    def save(self, store: Store, folder: str) -> str:
        """Publish the model as JSON and one .npy per array; returns the content hash of its files."""
        with tempfile.TemporaryDirectory() as scratch:
            local = pathlib.Path(scratch)
            for name, data in self._files().items():
                (local / name).write_bytes(data)
            return store.publish(folder, local, {"kind": "route_model", "encoder": ENCODER})["sha256"]

    def content_sha(self) -> str:
        """Hash of what `save` would write: equal models have equal names."""
        return content_hash({name: hashlib.sha256(data).hexdigest() for name, data in self._files().items()})

    @classmethod
    def load(cls, store: Store, folder: str) -> RouteModel:
        """Read a published model.

        Raises:
            StoreError: unfinished, altered, too large, or written by another encoder.
        """
        manifest = store.manifest(folder)
        if manifest.get("encoder") != ENCODER:
            raise StoreError(
                f"{folder}: encoder {manifest.get('encoder')!r}, this version reads {ENCODER!r}; run `understudy convert`"
            )
        files = {name: _read_checked(store, folder, name, facts) for name, facts in manifest["files"].items()}
        model = json.loads(files[_MODEL_FILE])
        arrays = {n: np.load(io.BytesIO(data), allow_pickle=False) for n, data in files.items() if n.endswith(".npy")}
        topics = {}
        for number, (variant, task_ids) in enumerate(sorted(model["topics"].items())):
            name = model["encoders"][variant]
            is_hashed = name == ENCODER
            encoder = TextEncoder(arrays[f"components-{number}.npy"]) if is_hashed else neural_encoder(name)
            centroids, radii = arrays[f"centroids-{number}.npy"], arrays[f"radii-{number}.npy"]
            topics[variant] = TopicMap(encoder, centroids, radii, task_ids)
        return cls(model["tasks"], topics, SiteMap.from_json(model["sites"]))

    def _files(self) -> dict[str, bytes]:
        model = {
            "tasks": self.tasks,
            "topics": {variant: topics.task_ids for variant, topics in self.topics.items()},
            "encoders": {v: t.encoder.name for v, t in self.topics.items()},
            "sites": self.sites.to_json(),
        }
        files = {_MODEL_FILE: (json.dumps(model, indent=1, sort_keys=True) + "\n").encode()}
        for number, (_, topics) in enumerate(sorted(self.topics.items())):
            if isinstance(topics.encoder, TextEncoder):
                files[f"components-{number}.npy"] = _npy(topics.encoder.components)
            files[f"centroids-{number}.npy"] = _npy(topics.centroids)
            files[f"radii-{number}.npy"] = _npy(topics.radii)
        return files


def hashed_features(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Feature buckets, ascending and distinct in [0, NUM_BUCKETS), and their damped weights.

    Long texts are read at their beginning and end. Literals are abstracted, so that a date or an id decides nothing.
    """
    if len(text) > 2 * _MAX_HALF:
        text = f"{text[:_MAX_HALF]}\n{text[-_MAX_HALF:]}"
    plain = abstract_text(text).lower()
    words = _hashes(_WORD.findall(plain))
    families = {
        "word": words,
        "pair": words[:-1] * np.uint64(31) + words[1:] * np.uint64(17) + np.uint64(1),
        "chars": _character_hashes(plain),
        "line": _hashes([f"line {line}" for line in template_lines(text)]),
    }
    buckets = np.concatenate([_mix(hashes) for hashes in families.values()])
    weights = np.concatenate([np.full(len(hashes), _WEIGHTS[name]) for name, hashes in families.items()])
    totals = np.bincount(buckets, weights=weights, minlength=NUM_BUCKETS)
    seen = np.flatnonzero(totals)
    return seen, np.log1p(totals[seen]).astype(np.float32)


def _hashes(texts: list[str]) -> np.ndarray:
    # zlib.crc32 is the same in every process; hash() is salted.
    return np.array([zlib.crc32(text.encode("utf-8", "replace")) for text in texts], dtype=np.uint64)


def _character_hashes(text: str) -> np.ndarray:
    """Polynomial hashes of all byte n-grams; the order is mixed in, so that orders do not collide."""
    data = np.frombuffer(f" {text} ".encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint64)
    grams = []
    for order in _CHAR_ORDERS:
        size = max(0, len(data) - order + 1)
        total = np.full(size, order, dtype=np.uint64)
        for offset in range(order):
            total = total * np.uint64(1_000_003) + data[offset : offset + size]
        grams.append(total)
    return np.concatenate(grams)


def _mix(hashes: np.ndarray) -> np.ndarray:
    """Spread 64-bit hashes over the buckets (Fibonacci hashing, Knuth 6.4)."""
    spread = hashes * np.uint64(0x9E3779B97F4A7C15)
    return (spread >> np.uint64(64 - NUM_BUCKETS.bit_length() + 1)).astype(np.int64)


def _npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


def _read_checked(store: Store, folder: str, name: str, facts: dict[str, Any]) -> bytes:
    if facts["bytes"] > _MAX_FILE_BYTES:
        raise StoreError(
            f"{folder}/{name}: {facts['bytes']} bytes, allowed at most {_MAX_FILE_BYTES}; run `understudy convert`"
        )
    data = store.read_bytes(f"{folder}/{name}")
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise StoreError(f"{folder}/{name}: differs from its manifest; publish the artifact again")
    return data
