"""`understudy forget --client NAME`: a client's calls leave the store, and who had learned from them is told.

First the mark under forgotten/, from which on no reader gives the calls; then the files: calls/, feedback/ and examples/
are written anew without them, datasets that a training left in the work folder go. Weights cannot be edited: adapters
and scratch bases that had seen the client are listed with the releases that serve them, and each of those specialists
gets a mark under retrain/ until a conversion replaces it. The record of all this stays, under the pseudonym.
Source: GDPR article 17 (erasure) and article 5(2) (accountability).
"""

from __future__ import annotations

import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable

from pydantic import Field

from cluster.calls import read_call_columns
from cluster.compaction import compact_calls
from cluster.feedback import remove_forgotten_feedback
from cluster.forgotten import mark_forgotten
from cluster.records import Record
from cluster.store import Store
from jobs.lineage import Seen, find_seen
from training.snapshot import remove_examples

RETRAIN_FOLDER = "retrain"


class Forgetting(Record):
    """What was removed and who had seen it: the audit record, as JSON under forgotten/."""

    client_id: str
    before_ts: float
    calls: int
    """Calls removed."""
    feedback: int
    """Rows of feedback removed."""
    examples: dict[str, int]
    """Snapshot -> examples removed."""
    seen: Seen = Field(default_factory=Seen)


def forget(
    store: Store, client_id: str, work: pathlib.Path | None = None, clock: Callable[[], float] = time.time
) -> Forgetting:
    """Remove every call of `client_id` (a pseudonym) up to now. May be repeated after it was stopped.

    Args:
        work: the conversions' work folder, whose datasets are removed where they hold the client's calls.

    Raises:
        KeyAccessError: the content key is not to be had; the calls are not read from then on all the same.
    """
    now = clock()
    call_ids = _calls_of(store, client_id)
    seen = find_seen(store, call_ids)
    # From here on nobody reads them, whatever fails below.
    mark_forgotten(store, client_id, now, {"calls": len(call_ids), "seen": seen.model_dump(mode="json")})
    compact_calls(store)
    examples = Counter({snapshot: remove_examples(store, snapshot, call_ids) for snapshot in seen.snapshots})
    done = Forgetting(
        client_id=client_id,
        before_ts=now,
        calls=len(call_ids),
        feedback=remove_forgotten_feedback(store),
        examples=dict(examples),
        seen=seen,
    )
    if work is not None:
        _remove_datasets(work, seen)
    for name in seen.specialists:
        store.write_json(
            f"{RETRAIN_FOLDER}/{name}.json", {"reason": "client forgotten", "client_id": client_id, "ts": now}
        )
    record = done.model_dump(mode="json", exclude={"client_id", "before_ts"})
    mark_forgotten(store, client_id, now, record)
    return done


def _calls_of(store: Store, client_id: str) -> set[str]:
    table = read_call_columns(store, ["call_id", "client_id"])
    pairs = zip(table["call_id"].to_pylist(), table["client_id"].to_pylist(), strict=True)
    return {call_id for call_id, owner in pairs if owner == client_id}


def _remove_datasets(work: pathlib.Path, seen: Seen) -> None:
    """Tokenised examples of runs; a later run makes them anew from what is left."""
    for path in (*seen.adapters, *seen.bases):
        shutil.rmtree(work / path.rsplit("/", 1)[-1], ignore_errors=True)
