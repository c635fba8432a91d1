"""Train calls that say what a held-out call says: they leave train, so that no score rewards remembering.

Compared are whole requests, against validation, calibration and test; the last user text alone, against calibration
and test of any task (tasks share a base model, so a text learned with one task's answer is known to all); and near
duplicates, against calibration and test of the same call site (training/near_duplicates.py). Short texts ("yes") and
texts that many sessions say (an opening, a fixed instruction) are the traffic's habit and tell nothing; they stay. The
splits are by session, so only calls of other sessions are ever compared. Held-out splits lose nothing.
"""

from __future__ import annotations

import sqlite3

from training.call_index import CallIndex
from training.near_duplicates import SiteMatcher

ANSWER_FIELDS = ("messages", "tools", "functions", "tool_choice", "response_format")
"""Parts of a request that its answer depends on; the others (model, sampling, user) are left out."""
LEAKED = "request also in validation, calibration or test"
SHARED_TEXT = "last user text also in calibration or test"
NEAR_LEAKED = "near duplicate of a calibration or test call"
MIN_SHARED_CHARS = 20
"""Shorter texts are said by many and mean little."""
MAX_SHARING_SESSIONS = 5
MAX_SHARING_SHARE = 0.01
"""A text that more sessions say than both bounds allow is a habit."""


def drop_leaks(index: CallIndex) -> None:
    """Take exact leaks out of train; needs `split` to be assigned."""
    index.drop(
        LEAKED,
        "split = 'train' AND request IN (SELECT request FROM calls WHERE split != 'train' AND reason IS NULL)",
    )
    num_sessions = index.count("SELECT COUNT(DISTINCT session) FROM calls WHERE split IS NOT NULL AND reason IS NULL")
    most = max(MAX_SHARING_SESSIONS, MAX_SHARING_SHARE * num_sessions)
    index.drop(
        SHARED_TEXT,
        """split = 'train' AND last_text IN (
            SELECT last_text FROM calls WHERE last_text IS NOT NULL AND split IS NOT NULL
                AND (reason IS NULL OR reason = :leaked)
            GROUP BY last_text
            HAVING MAX(split IN ('calibration', 'test')) AND COUNT(DISTINCT session) <= :most)""",
        {"most": most, "leaked": LEAKED},
    )


def match_near_duplicates(index: CallIndex, threshold: float) -> None:
    """Take near duplicates of held-out calls out of train, and write to `near` which group each other one is in."""
    index.sql.execute("CREATE TABLE near (site INTEGER, messages BLOB, num_question INTEGER, team INTEGER) STRICT")
    sites = index.sql.execute("SELECT DISTINCT site FROM calls WHERE split = 'train' AND reason IS NULL ORDER BY site")
    for (site,) in sites.fetchall():
        _match_site(index.sql, site, threshold)
    index.sql.execute("CREATE UNIQUE INDEX near_by_text ON near (site, messages, num_question)")
    same = "n.site = calls.site AND n.messages = calls.messages AND n.num_question = calls.num_question"
    index.sql.execute(
        f"UPDATE calls SET near = (SELECT team FROM near n WHERE {same}) WHERE split = 'train' AND reason IS NULL"
    )
    index.drop(NEAR_LEAKED, "split = 'train' AND near = 0")


def _match_site(sql: sqlite3.Connection, site: int, threshold: float) -> None:
    matcher = SiteMatcher(sql, site, threshold)
    held = sql.execute(
        "SELECT DISTINCT messages, num_question FROM calls"
        " WHERE site = ? AND split IN ('calibration', 'test') AND reason IS NULL",
        [site],
    )
    for messages, num_question in held:
        matcher.hold(messages, num_question)
    # In order of time, so that what arrives later never takes the place of what was kept before.
    train = sql.execute(
        "SELECT messages, num_question FROM calls WHERE site = ? AND split = 'train' AND reason IS NULL"
        " GROUP BY messages, num_question ORDER BY MIN(ts), MIN(call_id)",
        [site],
    )
    for messages, num_question in train:
        team = matcher.match(messages, num_question)
        sql.execute("INSERT INTO near VALUES (?, ?, ?, ?)", [site, messages, num_question, team])
