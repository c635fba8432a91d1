"""What curation knows of every stored call, in an SQLite file of its own: ids, times, hashes and marks, no content.

Decisions over all calls (splits, leaks, duplicates, shares) are then queries, and memory does not grow with the calls.
A call id stored twice is one row, the one read last. What hashes words is keyed, so that the file tells nothing to who
finds it. The file lives as long as one curation. Knows nothing of why a call is kept or dropped.
"""

from __future__ import annotations

import pathlib
import sqlite3
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from training.splits import SPLITS

_BATCH = 500
_CACHE_KIB = 32_000
_SCHEMA = """
CREATE TABLE calls (
    seq INTEGER PRIMARY KEY,  -- place in the order of reading
    call_id TEXT NOT NULL UNIQUE,
    session TEXT NOT NULL,
    client TEXT NOT NULL,
    ts REAL NOT NULL,
    audit_of TEXT,
    audited_task TEXT,        -- task, of a call of the reference stream that a specialist answered and of its audit
    is_biased INTEGER,        -- left to the LLM by a specialist, outside the reference stream
    reward REAL,
    reason TEXT,              -- why it is no example; NULL while it is one
    detail TEXT,
    reference TEXT,
    faces_person INTEGER,
    cost_usd REAL,
    latency_ms REAL,
    shard INTEGER,
    site INTEGER,
    request BLOB,
    answer BLOB,
    answer_class BLOB,
    last_text BLOB,           -- NULL where the text is too short to tell anything
    messages BLOB,            -- ids of the messages, 8 bytes each
    num_question INTEGER,     -- how many of them, from the end, are the question
    fault TEXT,
    flags TEXT,
    split TEXT,
    near INTEGER,             -- group of near duplicates; 0 with a held-out call, NULL where only the template speaks
    merged INTEGER            -- seq of the example that stands for this call
) STRICT;
CREATE TABLE sites (id INTEGER PRIMARY KEY, signature TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE messages (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, shingles BLOB NOT NULL, flags TEXT NOT NULL) STRICT;
"""
COLUMNS = (
    *(
        "seq",
        "call_id",
        "session",
        "client",
        "ts",
        "audit_of",
        "audited_task",
        "is_biased",
        "reward",
        "reason",
        "detail",
    ),
    *("reference", "faces_person", "cost_usd", "latency_ms", "shard", "site", "request", "answer", "answer_class"),
    *("last_text", "messages", "num_question", "fault", "flags"),
)
IS_EXAMPLE = "merged = seq AND reason IS NULL"
"""The rows that stand for themselves and for what is merged into them."""


class CallFacts(NamedTuple):
    """One row of `calls`, in the order of COLUMNS; what follows `detail` is None for a call that is no example."""

    seq: int
    call_id: str
    session: str
    client: str
    ts: float
    audit_of: str | None
    audited_task: str | None
    is_biased: bool
    reward: float | None
    reason: str | None
    detail: str | None
    reference: str | None = None
    faces_person: bool | None = None
    cost_usd: float | None = None
    latency_ms: float | None = None
    shard: int | None = None
    site: int | None = None
    request: bytes | None = None
    answer: bytes | None = None
    answer_class: bytes | None = None
    last_text: bytes | None = None
    messages: bytes | None = None
    num_question: int | None = None
    fault: str | None = None
    flags: str | None = None


class CallIndex:
    """The open file. One process, one thread."""

    def __init__(self, path: pathlib.Path) -> None:
        self.sql = sqlite3.connect(path, isolation_level=None)
        # A curation that is cut off starts anew: nothing here needs to survive.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}", "temp_store = FILE"):
            self.sql.execute(f"PRAGMA {pragma}")
        self.sql.executescript(_SCHEMA)
        self.sql.execute("BEGIN")
        self._rows: list[CallFacts] = []
        self._sites: dict[str, int] = {}

    def add(self, facts: CallFacts) -> None:
        self._rows.append(facts)
        if len(self._rows) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        marks = ", ".join("?" * len(COLUMNS))
        self.sql.executemany(f"INSERT OR REPLACE INTO calls ({', '.join(COLUMNS)}) VALUES ({marks})", self._rows)
        self._rows.clear()

    def site_of(self, signature: str) -> int:
        """The number of a call site."""
        known = self._sites.get(signature)
        if known is None:
            self.sql.execute("INSERT OR IGNORE INTO sites (signature) VALUES (?)", [signature])
            (known,) = self.sql.execute("SELECT id FROM sites WHERE signature = ?", [signature]).fetchone()
            self._sites[signature] = known
        return known

    def message_of(self, digest: bytes, describe: Callable[[], tuple[bytes, str]]) -> tuple[int, str]:
        """Number and flags of a message; `describe` gives shingles and flags where it is met for the first time."""
        found = self.sql.execute("SELECT id, flags FROM messages WHERE hash = ?", [digest]).fetchone()
        if found is None:
            shingles, flags = describe()
            cursor = self.sql.execute(
                "INSERT INTO messages (hash, shingles, flags) VALUES (?, ?, ?)", [digest, shingles, flags]
            )
            found = (cursor.lastrowid, flags)
        return found

    def drop(self, reason: str, where: str, values: dict[str, Any] | None = None) -> None:
        """Mark the kept calls that meet a condition as dropped for `reason`."""
        self.sql.execute(
            f"UPDATE calls SET reason = :reason WHERE reason IS NULL AND ({where})",
            {"reason": reason, **(values or {})},
        )

    def count(self, query: str) -> int:
        return self.sql.execute(query).fetchone()[0]

    def count_by(self, column: str, where: str) -> dict[str, int]:
        """Rows by the value of `column`, in order of the values."""
        rows = self.sql.execute(
            f"SELECT {column}, COUNT(*) FROM calls WHERE {where} GROUP BY {column} ORDER BY {column}"
        )
        return {name: num for name, num in rows if name is not None}

    def count_splits(self, where: str) -> dict[str, int]:
        found = self.count_by("split", where)
        return {split: found.get(split, 0) for split in SPLITS}

    def count_flags(self) -> dict[str, int]:
        """Flag -> calls behind the examples that carry it."""
        flags: Counter[str] = Counter()
        for text, num in self.count_by("flags", "reason IS NULL").items():
            flags.update(dict.fromkeys(filter(None, text.split("\n")), num))
        return dict(sorted(flags.items()))

    def close(self) -> None:
        self.sql.close()
