"""The second pass of curation: one shard of sessions at a time, read from the spill, redacted, written as parts.

A shard holds whole sessions, so what is found in one call is replaced in all of its session. The same function runs
in this process or, where the calls are many and Ray is connected, on Ray Data, over the same files: the folder must be
one that every node sees. Knows nothing of how calls were chosen: the plan says which become what.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from cluster.records import Split
from cluster.store import Store
from training.paraphrase import Paraphrase
from training.redact import RedactConfig, Redactor
from training.snapshot import write_mapping, write_part
from training.spill import read_spill
from training.stored_logprobs import Stored, read_logprobs

REDACTED_SPLITS: tuple[Split, ...] = ("train", "validation")
"""The splits whose content is stored."""


class ShardWork(NamedTuple):
    """What every shard of one curation needs; goes to Ray workers."""

    store: Store
    folder: str
    """Store path of the snapshot."""
    spill: pathlib.Path
    spill_key: bytes
    redact: RedactConfig
    surrogate_key: bytes
    paraphrase: Paraphrase | None = None


class ShardResult(NamedTuple):
    """What one shard wrote."""

    parts: dict[str, list[str]]
    redacted: dict[str, int]
    """Kind of personal value -> distinct values, summed over sessions."""
    paraphrased: dict[str, int]
    """Passages reworded, and kept as they were."""
    logprobs: dict[str, int]
    """What became of the log-probabilities of examples that carry any."""


def content_stream(shard: int) -> str:
    """Stream of [seq, client, session, request, answer, log-probabilities of its tokens]."""
    return f"content-{shard:05d}"


def plan_stream(shard: int) -> str:
    """Stream of [seq, row of the example without content]."""
    return f"plan-{shard:05d}"


def curate_shard(work: ShardWork, shard: int) -> ShardResult:
    """Write the examples of one shard. Holds the shard in memory.

    Raises:
        StoreError: the spill was changed, or the store cannot be written.
    """
    plan = dict(read_spill(work.spill, work.spill_key, plan_stream(shard)))
    sessions: dict[tuple[str, str, str], list[tuple[dict[str, Any], Any, Any, Any]]] = defaultdict(list)
    for seq, client, session, request, answer, logprobs in read_spill(
        work.spill, work.spill_key, content_stream(shard)
    ):
        row = plan.get(seq)
        if row is not None:
            sessions[client, session, row["split"]].append((row, request, answer, logprobs))
    # A redactor of its own: what it remembers goes with the shard.
    redactor = Redactor(work.redact, work.surrogate_key, work.paraphrase)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    redacted, kept = Counter[str](), Counter[str]()
    restored: list[dict[str, str]] = []
    for (client, session, split), calls in sessions.items():
        turns, found = redactor.redact_session(
            [(request, answer) for _, request, answer, _ in calls], f"{client}/{session}"
        )
        redacted += found
        mapping = redactor.mapping_of(f"{client}/{session}")
        restored += [{"session_id": session, "surrogate": new, "original": old} for new, old in mapping.items()]
        for (row, *served, logprobs), (request, target) in zip(calls, turns, strict=True):
            stored = None
            if logprobs is not None:
                stored, became = _keep_logprobs(logprobs, is_as_served=served == [request, target])
                kept[became] += 1
            content = {"request": _dump(request), "target": _dump(target), "logprobs": stored and _dump(stored)}
            rows[split].append({**row, **content})
    parts = {s: [write_part(work.store, work.folder, f"{s}-{shard:05d}", own)] for s, own in rows.items()}
    if restored:
        parts["mapping"] = [write_mapping(work.store, work.folder, f"mapping-{shard:05d}", restored)]
    return ShardResult(parts, dict(redacted), dict(redactor.paraphrased), dict(kept))


def _keep_logprobs(logprobs: Any, *, is_as_served: bool) -> tuple[Stored | None, str]:
    """What is stored of them, and what became of them.

    Those of a call that redaction changed would name, among what else the LLM might have said, what was removed.
    """
    if not is_as_served:
        return None, "redacted"
    stored = read_logprobs(logprobs)
    return stored, "kept" if stored else "unreadable"


def curate_shards(work: ShardWork, shards: Iterable[int], *, on_ray: bool) -> ShardResult:
    """Write the examples of all shards."""
    parts: dict[str, list[str]] = {split: [] for split in REDACTED_SPLITS}
    redacted, paraphrased, logprobs = Counter[str](), Counter[str](), Counter[str]()
    results = _on_ray(work, list(shards)) if on_ray else (curate_shard(work, shard) for shard in shards)
    for result in results:
        for split, paths in result.parts.items():
            parts.setdefault(split, []).extend(paths)
        redacted.update(result.redacted)
        paraphrased.update(result.paraphrased)
        logprobs.update(result.logprobs)
    sorted_parts = {split: sorted(paths) for split, paths in parts.items()}
    return ShardResult(sorted_parts, dict(redacted), dict(paraphrased), dict(logprobs))


def is_ray_connected() -> bool:
    """Whether this process already speaks to a Ray cluster; imports and starts nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _on_ray(work: ShardWork, shards: list[int]) -> Iterable[ShardResult]:
    import ray.data

    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    for row in rows.map(_curate_row, fn_kwargs={"work": work}).iter_rows():
        yield ShardResult(**json.loads(row["result"]))


def _curate_row(row: dict[str, Any], work: ShardWork) -> dict[str, Any]:
    return {"result": json.dumps(curate_shard(work, row["shard"])._asdict())}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
