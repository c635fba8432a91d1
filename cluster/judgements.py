"""What LLM judges said, under judgements/ of the store: keyed hash -> verdict, encrypted like all that is made of content.

A run reads all parts once and writes what is new as one part; parts never change. Holds all of it in memory.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, MutableMapping

import pyarrow as pa

from cluster.store import Store

FOLDER = "judgements"
_SCHEMA = pa.schema([("key", pa.string()), ("verdict", pa.string())])


class Judgements(MutableMapping[str, str]):
    """A dictionary that is filled from the store and saved into it."""

    def __init__(self, store: Store) -> None:
        """Read what is stored.

        Raises:
            KeyAccessError: the content key is not to be had.
        """
        self._store = store
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}
        for path in store.list(FOLDER, ".parquet"):
            rows = store.read_table(path).to_pylist()
            self._known.update({row["key"]: row["verdict"] for row in rows})

    def save(self) -> None:
        """Write what came since the last time."""
        if not self._new:
            return
        rows = [{"key": key, "verdict": verdict} for key, verdict in self._new.items()]
        path = f"{FOLDER}/part-{uuid.uuid4().hex[:12]}.parquet"
        self._store.write_table(path, pa.Table.from_pylist(rows, _SCHEMA), ("verdict",))
        self._new = {}

    def __getitem__(self, key: str) -> str:
        return self._known[key]

    def __setitem__(self, key: str, verdict: str) -> None:
        self._known[key] = self._new[key] = verdict

    def __delitem__(self, key: str) -> None:
        del self._known[key]
        self._new.pop(key, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
