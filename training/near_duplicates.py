"""Near duplicates among the calls of one call site: what differs between them is compared, not their shared template.

A call is the set of word pairs of its messages. Pairs that many sessions of the site say (system prompt, fixed
instructions, phrases of a form) are the site's template; the rest is what varies. Two calls are near duplicates where
both what varies in their whole prompts and their questions (the last user message and what follows it) have a Jaccard
similarity of at least the threshold: a form filled in anew is none, nor is the next step of a conversation.

Candidates come from MinHash (Broder 1997; datasketch) cut into bands whose keys lie in the call index, so memory does
not grow; each is then verified exactly. A pair right at the threshold .8 is missed with probability 2e-4, one at .9 with
1e-7. Words are hashed with a key, each distinct message once. Text that is in no message (tools) is the call site's.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import re
import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from datasketch import MinHash

NUM_BANDS, NUM_ROWS = 16, 4
MAX_TEMPLATE_SESSIONS = 5
MAX_TEMPLATE_SHARE = 0.01
"""What more sessions of a site say than both bounds allow is its template."""
_MAX_SAMPLED_SESSIONS = 500
"""Per site, to find its template by."""
_MAX_CANDIDATES = 500
"""Per call; held-out ones come first."""
_MAX_CACHED_WORDS = 50_000
_MAX_CACHED_MESSAGES = 2_000
# Scripts without spaces between words are taken character by character.
_SOLID = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SOLID}]|[^\W{_SOLID}]+")
_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
_SCHEME = "affine64"
_TABLES = (
    "CREATE TABLE IF NOT EXISTS texts"
    " (id INTEGER PRIMARY KEY, is_held INTEGER, num_question INTEGER, varying BLOB, question BLOB) STRICT",
    "CREATE TABLE IF NOT EXISTS bands (key INTEGER, text INTEGER, PRIMARY KEY (key, text)) STRICT, WITHOUT ROWID",
    "DELETE FROM texts",
    "DELETE FROM bands",
)


class Shingler:
    """Texts -> sets of hashed word pairs, as sorted arrays of 64-bit numbers. Equal keys give equal sets."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._words: dict[str, int] = {}

    def shingle(self, text: str) -> np.ndarray:
        words = self._words
        if len(words) > _MAX_CACHED_WORDS:
            words.clear()
        numbers = [1]
        for word in _WORD.findall(text.lower()):
            number = words.get(word)
            if number is None:
                digest = hashlib.blake2b(word.encode(), key=self._key, digest_size=8).digest()
                number = words[word] = int.from_bytes(digest, "little")
            numbers.append(number)
        if len(numbers) == 1:
            return np.empty(0, np.uint64)
        pairs = np.array([*numbers, 2], np.uint64)
        # The words' numbers are random, so their combinations are.
        return _distinct(pairs[:-1] * _ODD[0] + pairs[1:] * _ODD[1])


class _Text(NamedTuple):
    varying: np.ndarray
    question: np.ndarray


class SiteMatcher:
    """Near duplicates at one call site. Uses the index's `messages`, and tables of its own that it empties first."""

    def __init__(self, index: sqlite3.Connection, site: int, threshold: float) -> None:
        self._sql, self._threshold = index, threshold
        self._shingles = functools.lru_cache(_MAX_CACHED_MESSAGES)(self._read_shingles)
        self._minhash = MinHash(NUM_BANDS * NUM_ROWS, hashfunc=int, scheme=_SCHEME)
        self._template = self._find_template(site)
        for statement in _TABLES:
            index.execute(statement)

    def hold(self, messages: bytes, num_question: int) -> None:
        """Remember a held-out call."""
        text = self._describe(messages, num_question)
        if len(text.varying):
            self._insert(text, self._band_keys(text), is_held=True)

    def match(self, messages: bytes, num_question: int) -> int | None:
        """Whether a train call is near a held-out one, else which group of train calls it is in.

        Returns:
            0 where it is near a held-out call; the number of its group, which the first call of a group gives its
            own; None where it says nothing but the template.
        """
        text = self._describe(messages, num_question)
        if not len(text.varying):
            return None
        keys = self._band_keys(text)
        for number, is_held, varying, question in self._candidates(keys, len(text.question)):
            other = _Text(np.frombuffer(varying, np.uint64), np.frombuffer(question, np.uint64))
            if are_near(text, other, self._threshold):
                return 0 if is_held else number
        return self._insert(text, keys, is_held=False)

    def _describe(self, messages: bytes, num_question: int) -> _Text:
        parts = [self._shingles(number) for number in _numbers(messages)]
        whole = _union(parts)
        varying = _without(whole, self._template)
        return _Text(varying, _union(parts[len(parts) - num_question :]))

    def _read_shingles(self, number: int) -> np.ndarray:
        (blob,) = self._sql.execute("SELECT shingles FROM messages WHERE id = ?", [number]).fetchone()
        return np.frombuffer(blob, np.uint64)

    def _find_template(self, site: int) -> np.ndarray:
        """What more sessions say than the bounds allow, whether or not their calls were dropped from a split since; by
        a sample that does not depend on the order of the calls."""
        rows = self._sql.execute(
            "SELECT session, messages FROM calls WHERE site = ? AND split IS NOT NULL AND session IN (SELECT DISTINCT"
            " session FROM calls WHERE site = ? AND split IS NOT NULL ORDER BY spread(session) LIMIT ?) ORDER BY session",
            [site, site, _MAX_SAMPLED_SESSIONS],
        )
        by_session = itertools.groupby(rows, operator.itemgetter(0))
        spoken = [set().union(*(_numbers(messages) for _, messages in calls)) for _, calls in by_session]
        return self._common_shingles(spoken, max(MAX_TEMPLATE_SESSIONS, MAX_TEMPLATE_SHARE * len(spoken)))

    def _common_shingles(self, spoken: Sequence[set[int]], most: float) -> np.ndarray:
        """What more than `most` sessions say, given the messages of each. A session counts once for all its messages:
        else few sessions that repeat themselves would make their own text the template, and hide their leaks."""
        numbers = sorted(set().union(*spoken))
        if not numbers:
            return np.empty(0, np.uint64)
        sets = [self._read_shingles(number) for number in numbers]
        found, places = np.unique(np.concatenate(sets), return_inverse=True)
        ends = list(itertools.accumulate(map(len, sets)))
        places_of = dict(zip(numbers, np.split(places, ends[:-1]), strict=True))
        num_sessions = np.zeros(len(found), np.int64)
        for own in spoken:
            num_sessions[_union([places_of[number] for number in own])] += 1
        return found[num_sessions > most]

    def _band_keys(self, text: _Text) -> list[int]:
        minhash = MinHash(
            hashfunc=int, scheme=_SCHEME, num_perm=NUM_BANDS * NUM_ROWS, permutations=self._minhash.permutations
        )
        minhash.update_batch(text.varying.tolist())
        rows = minhash.hashvalues.astype(np.uint64).reshape(NUM_BANDS, NUM_ROWS)
        keys = _mix((rows * _ODD).sum(axis=1) + np.arange(NUM_BANDS, dtype=np.uint64))
        return keys.view(np.int64).tolist()

    def _candidates(self, keys: list[int], size: int) -> Iterator[Sequence]:
        """Texts that share a band and whose question can be similar by its size alone; held-out ones first."""
        marks = ", ".join("?" * len(keys))
        return self._sql.execute(
            "SELECT id, is_held, varying, question FROM texts WHERE id IN"
            f" (SELECT text FROM bands WHERE key IN ({marks})) AND num_question BETWEEN ? AND ?"
            " ORDER BY is_held DESC, id LIMIT ?",
            [*keys, size * self._threshold, size / self._threshold, _MAX_CANDIDATES],
        )

    def _insert(self, text: _Text, keys: list[int], *, is_held: bool) -> int:
        values = [is_held, len(text.question), text.varying.tobytes(), text.question.tobytes()]
        cursor = self._sql.execute(
            "INSERT INTO texts (is_held, num_question, varying, question) VALUES (?, ?, ?, ?)", values
        )
        number = cursor.lastrowid
        assert number is not None
        self._sql.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, number) for key in keys])
        return number


def are_near(one: _Text, other: _Text, threshold: float) -> bool:
    return all(jaccard(ours, theirs) >= threshold for ours, theirs in zip(one, other, strict=True))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Similarity of two sorted sets in [0, 1]; two empty ones are equal."""
    both = np.concatenate([one, other])
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    total = len(one) + len(other) - shared
    return shared / total if total else 1.0


def _numbers(messages: bytes) -> list[int]:
    return np.frombuffer(messages, np.int64).tolist()


def _union(parts: Sequence[np.ndarray]) -> np.ndarray:
    return _distinct(np.concatenate(parts)) if len(parts) != 1 else parts[0]


def _distinct(values: np.ndarray) -> np.ndarray:
    """Sorted, each once; for short arrays several times as fast as np.unique."""
    values.sort()
    is_first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=is_first[1:])
    return values[is_first]


def _without(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What of one sorted set is not in the other."""
    if not len(others):
        return values
    places = np.minimum(others.searchsorted(values), len(others) - 1)
    return values[others[places] != values]


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit numbers: nearby ones must not stay nearby (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
