"""S2: calls/ -> examples/SNAPSHOT/: what may be learned from, cleaned, split by session, redacted and deduplicated.

Train is redacted and has exact duplicates merged. Validation is stored redacted, calibration and test without content;
these three keep the traffic's frequencies, and `load_split` joins what was served to them, in memory only. A session's
split follows from a hash of its id alone, so it never moves when more calls arrive. What also occurs in a held-out
split is removed from train, never from those (training/leakage.py). A call that no later stage could read is dropped,
counted and listed in quarantine/ (training/validity.py). A snapshot is named by the hash of what it was made from:
curating the same calls again finds it. Holds all calls in memory.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import pathlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from cluster.access import load_pseudonym_key
from cluster.calls import read_call_columns, read_calls
from cluster.config import Config
from cluster.errors import InputError, StoreError
from cluster.quarantine import QuarantineRow, write_quarantine
from cluster.records import AgentCall, Example, Record, Split
from cluster.store import Store, content_hash
from training.leakage import answer_fields, request_hash, without_leaks
from training.redact import RedactConfig, Redactor
from training.validity import find_problem

EXAMPLES_FOLDER = "examples"
CURATION_VERSION = 2
"""Part of every snapshot's name: raise it when the same calls would give other examples, be it by what is dropped, how
sessions are split, what is recognised as personal or what it is replaced with."""
SPLITS: tuple[Split, ...] = get_args(Split)
EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("session_id", pa.string()),
        pa.field("ts", pa.float64()),
        pa.field("request", pa.string()),
        pa.field("target", pa.string()),
        pa.field("reference", pa.string()),
        pa.field("source_call_ids", pa.list_(pa.string())),
        pa.field("faces_person", pa.bool_()),
        pa.field("cost_usd", pa.float64()),
        pa.field("latency_ms", pa.float64()),
    ]
)

BIASED = "left to the LLM by a specialist, outside the reference stream"
BAD_OUTCOME = "outcome below curate.min_reward"


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

    @model_validator(mode="after")
    def _adds_up(self) -> SplitConfig:
        total = sum(getattr(self, split) for split in SPLITS)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + calibration + test is {total:g}; allowed: exactly 1")
        return self


class CurateConfig(Config):
    """What becomes an example, and of which split."""

    split: SplitConfig = SplitConfig()
    min_reward: float | None = None
    """Lowest outcome (reward, score or correct) to learn from; None keeps all. The other splits stay as served."""
    keep_faces_person: bool = False
    """Whether calls whose answer goes straight to a person are kept too."""
    max_prompt_chars: int = Field(100_000, gt=0)
    """Longest prompt, messages and tools together; longer ones enter no split and are listed in quarantine/."""
    redact: RedactConfig = RedactConfig()


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
    """Distinct train requests that were answered in more than one way."""
    redacted: dict[str, int]
    """Kind of personal value -> distinct values replaced, summed over the sessions of train and validation."""
    audits: dict[str, AuditCounts] = {}
    """task_id -> its reference stream where a specialist answered."""


class Snapshot(Record):
    """One curated set of examples, immutable."""

    id: str
    counts: CurationCounts

    @property
    def folder(self) -> str:
        return f"{EXAMPLES_FOLDER}/{self.id}"


def curate(store: Store, config: CurateConfig, key: bytes | None = None) -> Snapshot:
    """Curate all calls of the store, or find the snapshot that was made of them.

    Args:
        key: secret behind the surrogates; the store's own pseudonym key where None.

    Raises:
        InputError: the store holds no calls.
        ConfigError: the spaCy model is not installed, or the store's key cannot be read.
    """
    rows = _call_rows(store)
    secret = key if key is not None else load_pseudonym_key(store.uri)
    key_id = hmac.digest(secret, b"name of this key", "sha256").hex()[:16]
    snapshot_id = content_hash([rows, config.model_dump(mode="json"), CURATION_VERSION, key_id])[:16]
    folder = f"{EXAMPLES_FOLDER}/{snapshot_id}"
    if store.is_published(folder):
        return load_snapshot(store, snapshot_id)
    stored = read_calls(store)
    calls = _without_audited(stored)
    kept, dropped, faulty = _select(calls, config)
    by_split = _split_calls(kept, config.split, dropped)
    by_split["train"] = _clean_train(by_split, config, dropped)
    redactor = Redactor(config.redact, hmac.digest(secret, b"surrogates", "sha256"))
    redacted: Counter[str] = Counter()
    examples: dict[Split, list[dict[str, Any]]] = {
        split: [_to_row(call, split) for call in by_split[split]] for split in SPLITS
    }
    for split in ("train", "validation"):
        redacted += _redact_rows(redactor, by_split[split], examples[split])
    examples["train"], num_ambiguous = _merge_duplicates(examples["train"])
    counts = CurationCounts(
        num_calls=len(calls),
        dropped=dict(sorted(dropped.items())),
        num_examples={split: len(rows) for split, rows in examples.items()},
        num_source_calls={split: len(part) for split, part in by_split.items()},
        num_train_requests_with_several_answers=num_ambiguous,
        redacted=dict(sorted(redacted.items())),
        audits=_count_audits(stored, kept),
    )
    write_quarantine(store, "curate", faulty)
    made_by = {"config": config.model_dump(mode="json"), "version": CURATION_VERSION, "key_id": key_id}
    _publish(store, folder, examples, {"counts": counts.model_dump(), **made_by})
    return Snapshot(id=snapshot_id, counts=counts)


def load_snapshot(store: Store, snapshot_id: str) -> Snapshot:
    """Raises StoreError where there is no such snapshot."""
    manifest = store.manifest(f"{EXAMPLES_FOLDER}/{snapshot_id}")
    return Snapshot(id=snapshot_id, counts=CurationCounts.model_validate(manifest["counts"]))


def load_split(store: Store, snapshot_id: str, split: Split, *, as_served: bool) -> list[Example]:
    """Examples of one split in order of time.

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
    load_snapshot(store, snapshot_id)
    rows = store.read_table(f"{EXAMPLES_FOLDER}/{snapshot_id}/{split}.parquet").to_pylist()
    if as_served:
        _join_served(store, rows)
    else:
        for row in rows:
            row.update(request=json.loads(row["request"]), target=json.loads(row["target"]))
    return [Example(**row) for row in rows]


def split_of(session_id: str, config: SplitConfig) -> Split:
    """The split of a session: depends on its id and the shares alone."""
    digest = hashlib.blake2b(session_id.encode(errors="surrogatepass"), key=b"understudy split", digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    bounds = itertools.accumulate(getattr(config, split) for split in SPLITS)
    return next((split for split, bound in zip(SPLITS, bounds, strict=True) if position < bound), SPLITS[-1])


def _call_rows(store: Store) -> list[tuple[str, str | None]]:
    """What names the calls. Outcomes count as content: feedback that arrives later may change what is kept."""
    table = read_call_columns(store, ["call_id", "outcome"])
    if not table.num_rows:
        raise InputError(
            f"store={store.uri}: calls/ is empty; allowed: captured or ingested calls; next: understudy ingest FILE"
        )
    return sorted(zip(table["call_id"].to_pylist(), table["outcome"].to_pylist(), strict=True), key=str)


def _without_audited(calls: list[AgentCall]) -> list[AgentCall]:
    """One call for each of the client's: where the LLM was asked again in the background, its answer stands for both."""
    audited = {call.audit_of for call in calls}
    return [call for call in calls if call.call_id not in audited]


def _select(
    calls: Iterable[AgentCall], config: CurateConfig
) -> tuple[list[AgentCall], Counter[str], list[QuarantineRow]]:
    """Calls that can become examples, how many cannot by reason, and a row for each call that is itself at fault."""
    kept, dropped, faulty = [], Counter[str](), []
    for call in calls:
        problem = find_problem(
            call, keep_faces_person=config.keep_faces_person, max_prompt_chars=config.max_prompt_chars
        )
        if problem is None:
            kept.append(call)
            continue
        dropped[problem.reason] += 1
        if problem.detail is not None:
            detail = f"call {call.call_id}: {problem.detail}"
            faulty.append(QuarantineRow(source="calls/", line=None, reason=problem.reason, detail=detail))
    return kept, dropped, faulty


def _count_audits(stored: Iterable[AgentCall], kept: Iterable[AgentCall]) -> dict[str, AuditCounts]:
    """By task: an audit whose own call was lost counts as well, one whose answer cannot be used does not."""
    tasks: dict[str, str] = {}
    for call in stored:
        if call.audit_of or (call.served_by == "specialist" and call.is_reference):
            tasks[call.audit_of or call.call_id] = (call.route and call.route.task_id) or ""
    audited = {call.audit_of for call in kept}
    num_kept = Counter(tasks.values())
    num_audited = Counter(task for call_id, task in tasks.items() if call_id in audited)
    return {task: AuditCounts(num_kept=n, num_audited=num_audited[task]) for task, n in sorted(num_kept.items())}


def _split_calls(
    calls: Iterable[AgentCall], config: SplitConfig, dropped: Counter[str]
) -> dict[Split, list[AgentCall]]:
    """Calls by split. What a specialist did not keep is what it finds hard: it may teach, but held out it would
    misrepresent the task, so there only the reference stream speaks for tasks that have a specialist."""
    by_split: dict[Split, list[AgentCall]] = {split: [] for split in SPLITS}
    for call in calls:
        split = split_of(call.session_id, config)
        if split != "train" and call.route and call.route.specialist and not call.is_reference:
            dropped[BIASED] += 1
        else:
            by_split[split].append(call)
    return by_split


def _clean_train(
    by_split: dict[Split, list[AgentCall]], config: CurateConfig, dropped: Counter[str]
) -> list[AgentCall]:
    """Train without bad outcomes and without what the other splits say, both counted in `dropped`."""
    good = [call for call in by_split["train"] if not _is_bad(call, config.min_reward)]
    if len(good) < len(by_split["train"]):
        dropped[BAD_OUTCOME] += len(by_split["train"]) - len(good)
    return without_leaks({**by_split, "train": good}, dropped)


def _is_bad(call: AgentCall, min_reward: float | None) -> bool:
    """A call without an outcome is not bad."""
    outcome = call.outcome or {}
    rewards = (outcome.get(name) for name in ("reward", "score", "correct"))
    reward = next((float(value) for value in rewards if isinstance(value, bool | int | float)), None)
    return min_reward is not None and reward is not None and reward < min_reward


def _to_row(call: AgentCall, split: Split) -> dict[str, Any]:
    """An example without content."""
    return {
        "example_id": f"ex-{hashlib.sha256(call.call_id.encode(errors='surrogatepass')).hexdigest()[:16]}",
        "split": split,
        "session_id": call.session_id,
        "ts": call.ts,
        "request": None,
        "target": None,
        "reference": "gold" if call.served_by == "gold" else "llm",
        "source_call_ids": [call.call_id],
        "faces_person": call.faces_person,
        "cost_usd": call.cost_usd,
        "latency_ms": call.latency_ms,
    }


def _redact_rows(redactor: Redactor, calls: Sequence[AgentCall], rows: Sequence[dict[str, Any]]) -> Counter[str]:
    """Fill `rows` with the redacted content of their calls, session by session."""
    sessions: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, call in enumerate(calls):
        sessions[call.client_id, call.session_id].append(index)
    counts: Counter[str] = Counter()
    for (client_id, session_id), indices in sessions.items():
        turns = [(answer_fields(calls[i].request), calls[i].message or {}) for i in indices]
        redacted, found = redactor.redact_session(turns, f"{client_id}/{session_id}")
        counts += found
        for index, (request, target) in zip(indices, redacted, strict=True):
            rows[index].update(request=_dump(request), target=_dump(target))
    return counts


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _merge_duplicates(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The first of equal examples with the call ids of all, and how many requests have several answers."""
    merged: dict[str, dict[str, Any]] = {}
    answers: dict[bytes, set[bytes]] = defaultdict(set)
    for row in rows:
        request, target = json.loads(row["request"]), _without_ids(json.loads(row["target"]))
        asked, answered = request_hash(request), content_hash(target)
        answers[asked].add(answered.encode())
        name = f"{asked.hex()}/{answered}/{row['reference']}"
        if name in merged:
            merged[name]["source_call_ids"].extend(row["source_call_ids"])
        else:
            merged[name] = row
    return list(merged.values()), sum(len(found) > 1 for found in answers.values())


def _without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the ids of its tool calls, which are made up anew each time."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [{**call, "id": ""} for call in message["tool_calls"]]}


def _publish(store: Store, folder: str, examples: dict[Split, list[dict[str, Any]]], meta: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        local = pathlib.Path(name)
        for split, rows in examples.items():
            pq.write_table(pa.Table.from_pylist(rows, EXAMPLE_SCHEMA), local / f"{split}.parquet", compression="zstd")
        store.publish(folder, local, meta)


def _join_served(store: Store, rows: Sequence[dict[str, Any]]) -> None:
    served = {call.call_id: call for call in read_calls(store, {row["source_call_ids"][0] for row in rows})}
    for row in rows:
        call = served.get(row["source_call_ids"][0])
        if call is None or not call.message:
            raise StoreError(
                f"calls/: call {row['source_call_ids'][0]} of example {row['example_id']} is gone; curate again"
            )
        row.update(request=call.request, target=call.message)
