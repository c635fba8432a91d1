"""What leaves train and train alone, once every call has its split: held-out splits keep the traffic as it was.

In this order, so that each dropped call has one reason: sessions that ended badly, answers that are no targets, leaks,
conflicting answers, near duplicates beyond a group's allowance, and a client's calls beyond its share of a call site.
Exact duplicates are merged, not dropped: the first stands for all. Nothing here reads content.
"""

from __future__ import annotations

from typing import Literal

from training.call_index import IS_EXAMPLE, CallIndex
from training.leakage import drop_leaks, match_near_duplicates
from training.splits import position_of

Conflicts = Literal["keep", "majority", "drop"]
BAD_OUTCOME = "session with an outcome below curate.min_reward"
FLAGGED = "flagged (curate.drop_flagged)"
CONFLICT = "another answer to the same request (curate.conflicts)"
NEAR_DUPLICATE = "near duplicate within train, beyond curate.max_near_duplicates"
CLIENT_SHARE = "beyond curate.max_client_share of its call site"
_TRAIN = "split = 'train'"


def clean_train(
    index: CallIndex,
    *,
    min_reward: float | None,
    drop_flagged: bool,
    conflicts: Conflicts,
    near_duplicate_similarity: float,
    max_near_duplicates: int,
    max_client_share: float,
) -> int:
    """Mark what leaves train, and fill `merged`.

    Returns:
        Distinct train requests with several answers, before `conflicts` was applied.
    """
    if min_reward is not None:
        bad = "session IN (SELECT session FROM calls WHERE reward < :least)"
        index.drop(BAD_OUTCOME, f"{_TRAIN} AND {bad}", {"least": min_reward})
    for (fault,) in index.sql.execute("SELECT DISTINCT fault FROM calls WHERE fault IS NOT NULL").fetchall():
        index.drop(fault, f"{_TRAIN} AND fault = :fault", {"fault": fault})
    if drop_flagged:
        index.drop(FLAGGED, f"{_TRAIN} AND flags != ''")
    drop_leaks(index)
    match_near_duplicates(index, near_duplicate_similarity)
    num_ambiguous = _settle_conflicts(index, conflicts)
    _merge_duplicates(index)
    _cap_near_duplicates(index, max_near_duplicates)
    _cap_clients(index, max_client_share)
    return num_ambiguous


def _settle_conflicts(index: CallIndex, conflicts: Conflicts) -> int:
    """Of equally frequent answers, "majority" keeps the one given first."""
    index.sql.execute(
        f"""CREATE TABLE answers AS
        SELECT request, answer, COUNT(*) OVER (PARTITION BY request) AS num_answers,
            ROW_NUMBER() OVER (PARTITION BY request ORDER BY num DESC, began, answer) AS place
        FROM (SELECT request, answer, COUNT(*) AS num, MIN(ts) AS began FROM calls
              WHERE {_TRAIN} AND reason IS NULL GROUP BY request, answer)"""
    )
    lost = {"keep": "0", "majority": "place > 1", "drop": "1"}[conflicts]
    index.drop(
        CONFLICT,
        f"{_TRAIN} AND (request, answer) IN (SELECT request, answer FROM answers WHERE num_answers > 1 AND {lost})",
    )
    return index.count("SELECT COUNT(DISTINCT request) FROM answers WHERE num_answers > 1")


def _merge_duplicates(index: CallIndex) -> None:
    """Equal train calls point to the first of them; every other call stands for itself."""
    index.sql.execute("UPDATE calls SET merged = seq WHERE reason IS NULL")
    index.sql.execute(
        f"""UPDATE calls SET merged = equal.stands FROM (
            SELECT seq, FIRST_VALUE(seq) OVER (PARTITION BY request, answer, reference ORDER BY ts, call_id) AS stands
            FROM calls WHERE {_TRAIN} AND reason IS NULL) AS equal
        WHERE equal.seq = calls.seq"""
    )
    index.sql.execute("CREATE INDEX calls_by_merged ON calls (merged)")


def _cap_near_duplicates(index: CallIndex, most: int) -> None:
    _drop_examples(
        index,
        NEAR_DUPLICATE,
        f"""SELECT seq FROM (
            SELECT seq, ROW_NUMBER() OVER (PARTITION BY site, near, answer_class ORDER BY ts, call_id) AS place
            FROM calls WHERE {_TRAIN} AND {IS_EXAMPLE} AND near IS NOT NULL) WHERE place > {most}""",
    )


def _cap_clients(index: CallIndex, most: float) -> None:
    """Where several clients use a call site, the examples of each beyond its share leave by a hash of their ids."""
    index.sql.execute("CREATE TABLE client_caps (site INTEGER, most INTEGER) STRICT")
    rows = index.sql.execute(
        f"SELECT site, client, COUNT(*) FROM calls WHERE {_TRAIN} AND {IS_EXAMPLE} GROUP BY site, client"
    )
    sizes: dict[int, list[int]] = {}
    for site, _, num in rows:
        sizes.setdefault(site, []).append(num)
    caps = [(site, largest_allowed(nums, most)) for site, nums in sizes.items() if len(nums) > 1]
    index.sql.executemany("INSERT INTO client_caps VALUES (?, ?)", caps)
    index.sql.create_function("lot", 1, lambda call_id: position_of(call_id, b"client share"), deterministic=True)
    _drop_examples(
        index,
        CLIENT_SHARE,
        f"""SELECT seq FROM (
            SELECT seq, site, ROW_NUMBER() OVER (PARTITION BY site, client ORDER BY lot(call_id)) AS place
            FROM calls WHERE {_TRAIN} AND {IS_EXAMPLE}) AS numbered JOIN client_caps USING (site)
        WHERE numbered.place > client_caps.most""",
    )


def largest_allowed(sizes: list[int], share: float) -> int:
    """The most examples a client may keep so that none has more than `share` of what all keep, or than an equal part
    where the share is too small for so few clients.

    Example:
        >>> largest_allowed([900, 100], 0.8)
        400
    """
    share = max(share, 1 / len(sizes))
    low, high = min(sizes), max(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        if middle <= share * sum(min(size, middle) for size in sizes) + 1e-9:
            low = middle
        else:
            high = middle - 1
    return low


def _drop_examples(index: CallIndex, reason: str, seqs: str) -> None:
    """Drop examples with all the calls that are merged into them."""
    index.sql.execute("CREATE TEMP TABLE leaving (seq INTEGER PRIMARY KEY)")
    index.sql.execute(f"INSERT INTO leaving {seqs}")
    index.drop(reason, f"{_TRAIN} AND merged IN (SELECT seq FROM leaving)")
    index.sql.execute("DROP TABLE leaving")
