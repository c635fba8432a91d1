"""A curated snapshot under examples/SNAPSHOT/: its schema, its counts, how its parts are written and read.

Train and validation hold redacted content; calibration and test hold none, and `load_split` joins what was served to
them, in memory only. What calls said and what surrogates stand for is encrypted. A snapshot exists once its manifest
does, which names its parts; nothing changes it but the forgetting of a client. Knows nothing of why a call became an
example.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.calls import read_calls
from cluster.errors import InputError, StoreError
from cluster.records import Example, Record, Split
from cluster.store import MANIFEST, Store

EXAMPLES_FOLDER = "examples"
EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("session_id", pa.string()),
        pa.field("client_ids", pa.list_(pa.string())),
        pa.field("ts", pa.float64()),
        pa.field("request", pa.string()),
        pa.field("target", pa.string()),
        pa.field("reference", pa.string()),
        pa.field("source_call_ids", pa.list_(pa.string())),
        pa.field("faces_person", pa.bool_()),
        pa.field("flags", pa.list_(pa.string())),
        pa.field("cost_usd", pa.float64()),
        pa.field("latency_ms", pa.float64()),
        pa.field("logprobs", pa.string()),
    ]
)
GOLD_LABEL = "gold"
"""Kind of label that is a person's answer to the call."""
_ENCRYPTED = ("request", "target", "logprobs")
_MAPPING = "mapping"
"""Among the parts of the splits: those that say what surrogates stand for."""
MAPPING_SCHEMA = pa.schema([(name, pa.string()) for name in ("session_id", "surrogate", "original")])


class AuditCounts(Record):
    """How much of one task's reference stream is left of what a specialist answered.

    Where audits are lost, the calls a specialist keeps weigh less in it than they should: it speaks too much for those
    it leaves to the LLM.
    """

    num_kept: int
    """Calls drawn into the reference stream whose client got the specialist's answer."""
    num_audited: int
    """Of these, the calls that the LLM's answer is known for."""


class CurationCounts(Record):
    """What became of every call: num_calls = dropped + source calls of the examples of all splits."""

    num_calls: int
    dropped: dict[str, int]
    """Reason -> calls."""
    num_examples: dict[str, int]
    """Split -> examples."""
    num_source_calls: dict[str, int]
    """Split -> calls behind them; more than the examples only in train."""
    num_train_requests_with_several_answers: int
    """Distinct train requests that were answered in more than one way, before `curate.conflicts` was applied."""
    redacted: dict[str, int]
    """Kind of personal value -> distinct values replaced, summed over the sessions of train and validation."""
    paraphrased: dict[str, int] = {}
    """Passages that an LLM reworded, and that were kept because the rewording lost what an answer copies."""
    logprobs: dict[str, int] = {}
    """What became of the log-probabilities that answers of train and validation carry -> examples: kept, unreadable (of
    no known shape, or without alternatives), or redacted (they are of other texts than what is learned)."""
    audits: dict[str, AuditCounts] = {}
    """task_id -> its reference stream where a specialist answered."""
    flagged: dict[str, int] = {}
    """Flag -> source calls of the examples that carry it, over all splits."""
    num_clients: int = 0
    """Distinct clients of all calls, whatever became of them."""
    num_sessions: dict[str, int] = {}
    """Split -> sessions."""
    test_drawn: dict[str, int] = {}
    """How sessions were drawn for test, "by time" or "by hash" -> sessions; see training/splits.py."""


class Snapshot(Record):
    """One curated set of examples."""

    id: str
    counts: CurationCounts

    @property
    def folder(self) -> str:
        return f"{EXAMPLES_FOLDER}/{self.id}"


def write_part(store: Store, folder: str, name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Write some rows of a snapshot that is not published yet; returns the part's path."""
    return _write(store, folder, name, pa.Table.from_pylist(list(rows), EXAMPLE_SCHEMA), _ENCRYPTED)


def write_mapping(store: Store, folder: str, name: str, rows: Sequence[dict[str, str]]) -> str:
    """Write what surrogates stand for, where a recipe keeps that; returns the part's path."""
    return _write(store, folder, name, pa.Table.from_pylist(list(rows), MAPPING_SCHEMA), ("surrogate", "original"))


def _write(store: Store, folder: str, name: str, table: pa.Table, encrypted: tuple[str, ...]) -> str:
    """The one place where curated content comes to rest.

    Its path is unique: a part whose writer died is never written again but left behind.
    """
    path = f"{folder}/{name}-{uuid.uuid4().hex[:12]}.parquet"
    store.write_table(path, table, encrypted)
    return path


def load_snapshot(store: Store, snapshot_id: str) -> Snapshot:
    """Raises StoreError where there is no such snapshot."""
    manifest = store.manifest(f"{EXAMPLES_FOLDER}/{snapshot_id}")
    return Snapshot(id=snapshot_id, counts=CurationCounts.model_validate(manifest["counts"]))


def part_paths(store: Store, snapshot_id: str) -> dict[str, list[str]]:
    """Split -> store paths of its parts.

    Raises:
        StoreError: there is no such snapshot.
    """
    parts = store.manifest(f"{EXAMPLES_FOLDER}/{snapshot_id}")["parts"]
    return {split: paths for split, paths in parts.items() if split != _MAPPING}


def remove_examples(store: Store, snapshot_id: str, call_ids: set[str]) -> int:
    """Write the snapshot anew without the examples that any of these calls went into, and what their sessions'
    surrogates stand for; returns how many examples went.

    New parts first, then the manifest, then the old parts go: whoever reads meanwhile and fails may read again.

    Raises:
        KeyAccessError: the content key is not to be had.
    """
    folder = f"{EXAMPLES_FOLDER}/{snapshot_id}"
    manifest = store.manifest(folder)
    wanted = pa.array(sorted(call_ids), pa.string())
    removed, sessions, count = [], set(), 0
    for split, paths in sorted(manifest["parts"].items(), key=lambda item: item[0] == _MAPPING):
        for number, path in enumerate(paths):
            table = store.read_table(path)
            if split == _MAPPING:
                gone = pc.is_in(table["session_id"], value_set=pa.array(sorted(sessions), pa.string()))
            else:
                gone = _is_made_of(table["source_call_ids"], wanted)
            if not pc.any(gone).as_py():
                continue
            if split != _MAPPING:
                count += pc.sum(gone).as_py()
                sessions |= set(table["session_id"].filter(gone).to_pylist())
            kept = table.filter(pc.invert(gone))
            secret = ("surrogate", "original") if split == _MAPPING else _ENCRYPTED
            encrypted = tuple(one for one in secret if one in kept.column_names)
            name = path.rsplit("/", 1)[-1].rpartition("-")[0]
            paths[number] = _write(store, folder, name, kept, encrypted)
            removed.append(path)
    if removed:
        store.write_json(f"{folder}/{MANIFEST}", manifest)
    for path in removed:
        store.delete(path)
    return count


def _is_made_of(source_call_ids: pa.ChunkedArray, wanted: pa.Array) -> pa.Array:
    """For each example, whether one of its calls is wanted."""
    lists = source_call_ids.combine_chunks()
    rows = pc.list_parent_indices(lists).filter(pc.is_in(pc.list_flatten(lists), value_set=wanted))
    return pc.is_in(pa.array(range(len(lists)), rows.type), value_set=rows)


def read_rows(store: Store, snapshot_id: str, split: Split, columns: list[str] | None = None) -> pa.Table:
    """The stored rows of one split, in no order.

    Raises:
        StoreError: there is no such snapshot.
    """
    paths = part_paths(store, snapshot_id)[split]
    names = columns or EXAMPLE_SCHEMA.names
    empty = pa.schema([EXAMPLE_SCHEMA.field(name) for name in names]).empty_table()
    return store.read_table(paths, columns=columns) if paths else empty


def read_mapping(store: Store, snapshot_id: str) -> dict[str, dict[str, str]]:
    """Session -> surrogate -> the value it stands for; empty unless `redact.reversible` was set when it was curated.

    Raises:
        StoreError: there is no such snapshot.
        KeyAccessError: the content key is not to be had.
    """
    paths = store.manifest(f"{EXAMPLES_FOLDER}/{snapshot_id}")["parts"].get(_MAPPING, [])
    mapping: dict[str, dict[str, str]] = {}
    for row in (row for path in paths for row in store.read_table(path).to_pylist()):
        mapping.setdefault(row["session_id"], {})[row["surrogate"]] = row["original"]
    return mapping


def load_split(store: Store, snapshot_id: str, split: Split, *, as_served: bool) -> list[Example]:
    """Examples of one split in order of time, all in memory.

    Args:
        as_served: True joins what was served (validation, calibration, test), for the memory alone; False gives the
            redacted content that is stored (train, validation).

    Raises:
        InputError: this split has no such form.
        StoreError: the snapshot is unfinished, or one of its calls is gone from calls/.
    """
    allowed = ("validation", "calibration", "test") if as_served else ("train", "validation")
    if split not in allowed:
        raise InputError(
            f"split={split!r}, as_served={as_served}: no such content; allowed with it: {', '.join(allowed)}"
        )
    rows = read_rows(store, snapshot_id, split).to_pylist()
    rows.sort(key=lambda row: (row["ts"], row["example_id"]))
    if as_served:
        _join_served(store, rows)
    else:
        for row in rows:
            content = {name: row.get(name) for name in _ENCRYPTED}
            row.update({name: None if text is None else json.loads(text) for name, text in content.items()})
    return [Example(**row) for row in rows]


def _join_served(store: Store, rows: Sequence[dict[str, Any]]) -> None:
    served = {call.call_id: call for call in read_calls(store, {row["source_call_ids"][0] for row in rows})}
    for row in rows:
        call = served.get(row["source_call_ids"][0])
        if call is None or not call.message:
            raise StoreError(
                f"calls/: call {row['source_call_ids'][0]} of example {row['example_id']} is gone; curate again"
            )
        gold = call.label if call.label_kind == GOLD_LABEL and call.served_by == "llm" else None
        row.update(request=call.request, target=call.message, usage=call.usage, gold=gold)
