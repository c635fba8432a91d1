"""Which split a session belongs to: by its id and, for test, by when it began.

A session is never in two splits. Train, validation and calibration follow from a hash of its id alone. Test is the
newest share of the sessions by the time of their first call, so that the reported score looks forward in time, as the
release will: a score on sessions drawn from all times would hide what changed since the oldest of them. When newer
sessions arrive, the cut moves forward and the oldest of test fall back to the split of their hash. So a session of
calibration never becomes train, nor one of train calibration, and the gate's bound stays one on calls that no training
saw; a calibration call that was spent is remembered by its id (training/ledger.py), wherever its session goes.
Rejected: newest as calibration too (its calls would become train later), and shares by day (small stores have one).

A log without times tells nothing of age: its calls stand one millisecond apart (training/formats.py). Sessions that
begin in such a row are drawn for test by a second hash, independent of the first, with the same share.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from typing import Literal, get_args

from pydantic import Field, model_validator

from cluster.config import Config
from cluster.records import Split

SPLITS: tuple[Split, ...] = get_args(Split)
LEARNED_SPLITS: tuple[Split, ...] = ("train", "validation", "calibration")
_IMPORT_STEP_S = 0.001
_STEP_TOLERANCE_S = 1e-6
"""Times are doubles of seconds since the epoch: neighbours of them lie 2.4e-7 apart."""
_MIN_DATED_SESSIONS = 4
"""From as many sessions as there are splits, test gets at least one."""


class SplitConfig(Config):
    """Share of the sessions in each split; the four add up to 1."""

    train: float = Field(0.5, gt=0, lt=1)
    """Specialists learn from it."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Chooses base, early stop and the grid of thresholds."""
    calibration: float = Field(0.25, gt=0, lt=1)
    """Used by the gate and by nothing else; most refusals are for want of it."""
    test: float = Field(0.15, gt=0, lt=1)
    """Only reported."""
    test_by: Literal["time", "hash"] = "time"
    """Whether test is the newest sessions, or drawn by hash where the order of the log means nothing."""

    @model_validator(mode="after")
    def _adds_up(self) -> SplitConfig:
        total = sum(getattr(self, split) for split in SPLITS)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + calibration + test is {total:g}; allowed: exactly 1")
        return self


def learned_split_of(session_id: str, config: SplitConfig) -> Split:
    """Where a session belongs that is not in test: depends on its id and the shares alone."""
    position = position_of(session_id, b"understudy split") * (1 - config.test)
    bounds = itertools.accumulate(getattr(config, split) for split in LEARNED_SPLITS)
    return next((s for s, bound in zip(LEARNED_SPLITS, bounds, strict=True) if position < bound), LEARNED_SPLITS[-1])


def split_of(session_id: str, config: SplitConfig) -> Split:
    """The split of a session whose time is unknown."""
    is_test = position_of(session_id, b"understudy test") < config.test
    return "test" if is_test else learned_split_of(session_id, config)


def position_of(text: str, purpose: bytes) -> float:
    """A uniform number in [0, 1), the same for equal texts; other purposes give unrelated ones."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), key=purpose, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign_splits(index: sqlite3.Connection, config: SplitConfig) -> dict[str, int]:
    """Fill `split` of every usable call of a call index (training/call_index.py).

    Returns:
        How many sessions were drawn for or against test "by time" and "by hash".
    """
    index.create_function("spread", 1, lambda session: position_of(session, b"sample"), deterministic=True)
    index.create_function("split_of", 1, lambda session: split_of(session, config), deterministic=True)
    index.create_function("learned_split_of", 1, lambda s: learned_split_of(s, config), deterministic=True)
    index.execute(
        """CREATE TABLE sessions AS
        SELECT session, MIN(ts) AS began, is_import_time AS undated, NULL AS split
        FROM (
            SELECT session, ts, reason,
                ABS(ts - LAG(ts, 1, 0) OVER w - :step) < :tolerance
                OR ABS(LEAD(ts, 1, 0) OVER w - ts - :step) < :tolerance AS is_import_time
            FROM calls WINDOW w AS (ORDER BY ts, seq)
        ) WHERE reason IS NULL GROUP BY session""",
        {"step": _IMPORT_STEP_S, "tolerance": _STEP_TOLERANCE_S},
    )
    if config.test_by == "hash":
        index.execute("UPDATE sessions SET undated = 1")
    (num_dated,) = index.execute("SELECT COUNT(*) FROM sessions WHERE NOT undated").fetchone()
    num_test = round(config.test * num_dated)
    if num_dated >= _MIN_DATED_SESSIONS:
        num_test = max(1, num_test)
    index.execute(
        "UPDATE sessions SET split = CASE WHEN undated THEN split_of(session) ELSE learned_split_of(session) END"
    )
    index.execute(
        "UPDATE sessions SET split = 'test' WHERE rowid IN"
        " (SELECT rowid FROM sessions WHERE NOT undated ORDER BY began DESC, session DESC LIMIT ?)",
        [num_test],
    )
    index.execute("CREATE UNIQUE INDEX sessions_by_id ON sessions (session)")
    index.execute(
        "UPDATE calls SET split = (SELECT split FROM sessions s WHERE s.session = calls.session) WHERE reason IS NULL"
    )
    (num_sessions,) = index.execute("SELECT COUNT(*) FROM sessions").fetchone()
    return {"by time": num_dated, "by hash": num_sessions - num_dated}
