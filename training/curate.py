"""S2: calls/ -> examples/SNAPSHOT/: what may be learned from, cleaned, split by session and time, redacted, deduplicated.

The stage on one page, in bounded memory:
1. every stored call is read once, part by part: what it is goes to an index on disk (training/facts.py, call_index.py),
   what it says to an encrypted spill whose key is never written (training/spill.py);
2. decisions are queries over the index: splits (training/splits.py), then what leaves train (training/cleaning.py:
   bad sessions, bad answers, leaks, conflicts, near duplicates, shares of clients). The held-out splits keep the traffic's
   frequencies and lose nothing but what no later stage could read (training/validity.py);
3. shard by shard, sessions whole, train and validation are redacted and written (training/shards.py), on Ray Data where
   the calls are many and Ray is connected. Calibration and test are written without content; `load_split` joins it.
A snapshot is named by the hash of what it was made from: curating the same calls again finds it.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from pydantic import Field

from cluster.access import load_pseudonym_key
from cluster.calls import iterate_calls, read_call_columns
from cluster.config import Config
from cluster.errors import InputError
from cluster.feedback import read_feedback
from cluster.quarantine import QuarantineRow, write_quarantine
from cluster.records import Action, Split
from cluster.store import Store, content_hash
from training.call_index import IS_EXAMPLE, CallIndex
from training.cleaning import Conflicts, clean_train
from training.facts import FactReader
from training.leakage import ANSWER_FIELDS
from training.paraphrase import Paraphrase
from training.redact import RedactConfig, Redactor
from training.shards import REDACTED_SPLITS, ShardWork, content_stream, curate_shards, is_ray_connected, plan_stream
from training.snapshot import (
    EXAMPLES_FOLDER,
    AuditCounts,
    CurationCounts,
    Snapshot,
    load_snapshot,
    write_part,
)
from training.spill import SpillWriter
from training.splits import SPLITS, SplitConfig, assign_splits, learned_split_of

CURATION_VERSION = 4
"""Part of every snapshot's name: raise it when the same calls would give other examples, be it by what is dropped, how
sessions are split, what is recognised as personal or what it is replaced with."""
BIASED = "left to the LLM by a specialist, outside the reference stream"
_SHADOW: Action = "shadow"
_CALLS_PER_SHARD = 2_000
_ROWS_PER_PART = 20_000


class CurateConfig(Config):
    """What becomes an example, and of which split."""

    split: SplitConfig = SplitConfig()
    min_reward: float | None = None
    """Lowest outcome (reward, score or correct) to learn from: where any call of a session has a lower one, the session
    leaves train. None keeps all. The other splits stay as served."""
    keep_faces_person: bool = False
    """Whether specialists learn from answers that go straight to a person. Without it such calls leave every split, but
    those that only their answer tells from the others, which leave train alone: serving cannot know them beforehand."""
    max_prompt_chars: int = Field(100_000, gt=0)
    """Longest prompt, messages and tools together; longer ones enter no split and are listed in quarantine/."""
    conflicts: Conflicts = "keep"
    """What train keeps where equal requests were answered differently: all answers, the most frequent one, or none."""
    near_duplicate_similarity: float = Field(0.8, ge=0.5, le=1)
    """Jaccard similarity from which two calls of one site are near duplicates (training/near_duplicates.py)."""
    max_near_duplicates: int = Field(3, ge=1)
    """Most train examples of one group of near duplicates with the same answer; those of a calibration or test call
    leave train whatever this is."""
    max_client_share: float = Field(0.8, gt=0, le=1)
    """Largest share of one client in the train examples of a call site that several clients use; 1 caps nothing."""
    drop_flagged: bool = False
    """Whether calls with a flag (planted instructions, hidden text) leave train; they are counted and marked anyway."""
    ray_data_min_calls: int = Field(50_000, ge=1)
    """From so many calls on, redaction runs on Ray Data if Ray is connected; below, starting it costs more."""
    redact: RedactConfig = RedactConfig()


def curate(
    store: Store,
    config: CurateConfig,
    key: bytes | None = None,
    work: pathlib.Path | None = None,
    paraphrase: Paraphrase | None = None,
) -> Snapshot:
    """Curate all calls of the store, or find the snapshot that was made of them.

    Args:
        key: secret behind the surrogates; the store's own pseudonym key where None.
        work: folder for the index and the encrypted spill, emptied at the end; where Ray Data is used every node must
            see it. None takes this machine's temporary folder, and this process alone.
        paraphrase: what rewords passages where `redact.paraphrase` asks for it; must pickle where Ray Data is used.

    Raises:
        InputError: the store holds no calls.
        ConfigError: the spaCy model is not installed, or the store's key cannot be read.
    """
    names = _read_names(store)
    secret = key if key is not None else load_pseudonym_key(store.uri)
    key_id = hmac.digest(secret, b"name of this key", "sha256").hex()[:16]
    made_by = {"config": config.model_dump(mode="json"), "version": CURATION_VERSION, "key_id": key_id}
    snapshot_id = content_hash([names.sha256, *made_by.values()])[:16]
    folder = f"{EXAMPLES_FOLDER}/{snapshot_id}"
    if store.is_published(folder):
        return load_snapshot(store, snapshot_id)
    # What is wrong with the redaction's options is said before any call is read.
    Redactor(config.redact, secret, paraphrase)
    if work is not None:
        work = work.absolute()  # Ray's workers stand in folders of their own.
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="curate-", dir=work) as name:
        spill = pathlib.Path(name)
        shards = ShardWork(
            store,
            folder,
            spill,
            os.urandom(32),
            config.redact,
            hmac.digest(secret, b"surrogates", "sha256"),
            paraphrase,
        )
        index = CallIndex(spill / "calls.sqlite")
        try:
            on_ray = work is not None and names.num_calls >= config.ray_data_min_calls and is_ray_connected()
            counts, parts = _curate(index, shards, config, secret, names.num_calls, on_ray)
        finally:
            index.close()
        nothing = spill / "nothing"
        nothing.mkdir()
        store.publish(folder, nothing, {"counts": counts.model_dump(), "parts": parts, **made_by})
    return Snapshot(id=snapshot_id, counts=counts)


class _Names(NamedTuple):
    num_calls: int
    sha256: str


def _read_names(store: Store) -> _Names:
    """What names the calls, 16 bytes of memory each. Outcomes count as content: feedback that arrives later may change
    what is kept. The order in which calls are stored, and how often, does not."""
    table = read_call_columns(store, ["call_id", "outcome", "action"])
    # What a specialist was asked off the path is nobody's call, and its answer nobody's target.
    table = table.filter(pc.fill_null(pc.not_equal(table["action"], _SHADOW), True)).drop_columns(["action"])
    if not table.num_rows:
        raise InputError(
            f"store={store.uri}: calls/ is empty; allowed: captured or ingested calls; next: understudy ingest FILE"
        )
    digests = bytearray()
    for batch in table.to_batches(max_chunksize=_ROWS_PER_PART):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digests += hashlib.blake2b(repr(row).encode(errors="surrogatepass"), digest_size=16).digest()
    for row in read_feedback(store):
        digests += hashlib.blake2b(row.feedback_id.encode(), digest_size=16).digest()
    distinct = np.unique(np.frombuffer(bytes(digests), "V16").view("S16"))
    return _Names(len(distinct), hashlib.sha256(distinct.tobytes()).hexdigest())


def _curate(
    index: CallIndex, work: ShardWork, config: CurateConfig, secret: bytes, num_stored: int, on_ray: bool
) -> tuple[CurationCounts, dict[str, list[str]]]:
    num_shards = -(-num_stored // _CALLS_PER_SHARD)
    _read_calls(index, work, config, secret, num_shards)
    audits = _count_audits(index)
    # One call for each of the client's: the LLM's answer in the background stands for both.
    index.sql.execute("DELETE FROM calls WHERE call_id IN (SELECT audit_of FROM calls WHERE audit_of IS NOT NULL)")
    _list_faulty(index, work.store)
    drawn = assign_splits(index.sql, config.split)
    # What a specialist did not keep is what it finds hard: it may teach, but held out it would misrepresent the task,
    # so there only the reference stream speaks for tasks that have a specialist.
    index.drop(BIASED, "split != 'train' AND is_biased")
    num_ambiguous = clean_train(
        index,
        min_reward=config.min_reward,
        drop_flagged=config.drop_flagged,
        conflicts=config.conflicts,
        near_duplicate_similarity=config.near_duplicate_similarity,
        max_near_duplicates=config.max_near_duplicates,
        max_client_share=config.max_client_share,
    )
    parts = _write_held_out(index, work)
    _plan(index, work)
    result = curate_shards(work, range(num_shards), on_ray=on_ray)
    counts = CurationCounts(
        num_calls=index.count("SELECT COUNT(*) FROM calls"),
        dropped=index.count_by("reason", "reason IS NOT NULL"),
        num_examples=index.count_splits(IS_EXAMPLE),
        num_source_calls=index.count_splits("reason IS NULL"),
        num_train_requests_with_several_answers=num_ambiguous,
        redacted=dict(sorted(result.redacted.items())),
        paraphrased=result.paraphrased,
        logprobs=result.logprobs,
        audits=audits,
        flagged=index.count_flags(),
        num_clients=index.count("SELECT COUNT(DISTINCT client) FROM calls"),
        num_sessions={s: index.count(f"SELECT COUNT(*) FROM sessions WHERE split = '{s}'") for s in SPLITS},
        test_drawn=drawn,
    )
    return counts, {**parts, **result.parts}


def _read_calls(index: CallIndex, work: ShardWork, config: CurateConfig, secret: bytes, num_shards: int) -> None:
    """The only reading of content: facts to the index, what may be learned from to the spill."""
    reader = FactReader(
        index,
        secret,
        keep_faces_person=config.keep_faces_person,
        max_prompt_chars=config.max_prompt_chars,
        num_shards=num_shards,
    )
    writer = SpillWriter(work.spill, work.spill_key)
    served = (call for call in iterate_calls(work.store) if call.route is None or call.route.action != _SHADOW)
    for seq, call in enumerate(served, 1):
        facts = reader.read(seq, call)
        index.add(facts)
        if facts.shard is not None and learned_split_of(call.session_id, config.split) in REDACTED_SPLITS:
            request = {field: call.request[field] for field in ANSWER_FIELDS if call.request.get(field) is not None}
            content = [seq, call.client_id, call.session_id, request, call.message, call.logprobs]
            writer.append(content_stream(facts.shard), content)
    writer.close()
    index.flush()


def _count_audits(index: CallIndex) -> dict[str, AuditCounts]:
    """By task: an audit whose own call was lost counts as well, one whose answer cannot be used does not."""
    rows = index.sql.execute(
        """SELECT task, COUNT(*), SUM(is_audited) FROM (
            SELECT MAX(audited_task) AS task, MAX(audit_of IS NOT NULL AND reason IS NULL) AS is_audited
            FROM calls WHERE audited_task IS NOT NULL GROUP BY COALESCE(audit_of, call_id)
        ) GROUP BY task ORDER BY task"""
    )
    return {task: AuditCounts(num_kept=kept, num_audited=audited) for task, kept, audited in rows}


def _list_faulty(index: CallIndex, store: Store) -> None:
    """A quarantine row for each call that is itself at fault."""
    rows = index.sql.execute("SELECT call_id, reason, detail FROM calls WHERE detail IS NOT NULL ORDER BY ts, call_id")
    while batch := rows.fetchmany(_ROWS_PER_PART):
        faulty = [
            QuarantineRow(source="calls/", line=None, reason=reason, detail=f"call {call_id}: {detail}")
            for call_id, reason, detail in batch
        ]
        write_quarantine(store, "curate", faulty)


def _write_held_out(index: CallIndex, work: ShardWork) -> dict[str, list[str]]:
    """Calibration and test, without content."""
    parts: dict[str, list[str]] = {}
    for split in SPLITS:
        if split in REDACTED_SPLITS:
            continue
        rows = (row for _, _, row in _examples(index, split))
        batches = iter(lambda rows=rows: list(itertools.islice(rows, _ROWS_PER_PART)), [])
        parts[split] = [write_part(work.store, work.folder, split, batch) for batch in batches]
    return parts


def _plan(index: CallIndex, work: ShardWork) -> None:
    """Tell each shard which of its calls become what."""
    writer = SpillWriter(work.spill, work.spill_key)
    for split in REDACTED_SPLITS:
        for seq, shard, row in _examples(index, split):
            writer.append(plan_stream(shard), [seq, row])
    writer.close()


def _examples(index: CallIndex, split: Split) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Number, shard and row without content of each example of a split."""
    cursor = index.sql.execute(
        "SELECT merged, shard, call_id, session, client, ts, reference, faces_person, cost_usd, latency_ms, flags"
        " FROM calls WHERE split = ? AND reason IS NULL ORDER BY merged, ts, call_id",
        [split],
    )
    for seq, group in itertools.groupby(cursor, key=lambda row: row[0]):
        calls = list(group)
        _, shard, call_id, session, _, ts, reference, faces_person, cost_usd, latency_ms, flags = calls[0]
        digest = hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()
        row = {
            "example_id": f"ex-{digest[:16]}",
            "split": split,
            "session_id": session,
            "client_ids": list(dict.fromkeys(call[4] for call in calls)),
            "ts": ts,
            "request": None,
            "target": None,
            "reference": reference,
            "source_call_ids": [call[2] for call in calls],
            "faces_person": bool(faces_person),
            "flags": [flag for flag in flags.split("\n") if flag],
            "cost_usd": cost_usd,
            "latency_ms": latency_ms,
            "logprobs": None,
        }
        yield seq, shard, row
