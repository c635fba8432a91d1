"""Metric names with their units, and structured logs.

Counts are kept in this process and, inside a Ray worker, exported through ray.util.metrics (Prometheus). Metrics are
made at their first use, so importing this loads no Ray. Never give message content to either.
"""

from __future__ import annotations

import collections
import json
import logging
import sys
from typing import Any, Literal, NamedTuple


class MetricSpec(NamedTuple):
    """One metric: what it counts and by what."""

    kind: Literal["counter", "histogram", "gauge"]
    description: str
    tags: tuple[str, ...]


METRICS: dict[str, MetricSpec] = {
    "understudy_calls_total": MetricSpec("counter", "Calls by what was done with them", ("action", "task_id")),
    "understudy_calls_facing_person_total": MetricSpec(
        "counter", "Calls whose answer went straight to a person, by what was done with them", ("action",)
    ),
    "understudy_passthrough_total": MetricSpec(
        "counter", "Requests passed on as they are, by path and status", ("path", "status")
    ),
    "understudy_feedback_total": MetricSpec("counter", "Feedback taken, by role of who gave it", ("role",)),
    "understudy_call_latency_ms": MetricSpec("histogram", "Milliseconds from request to last byte", ("action",)),
    "understudy_specialist_latency_ms": MetricSpec("histogram", "Milliseconds a specialist took", ("task_id",)),
    "understudy_early_rejections_total": MetricSpec(
        "counter", "Answers of a specialist given up while it spoke, because their confidence was lost", ("task_id",)
    ),
    "understudy_hedges_total": MetricSpec(
        "counter", "Calls of a slow specialist that the LLM was asked as well, by who was first", ("winner",)
    ),
    "understudy_calls_captured_total": MetricSpec("counter", "Calls written to the store", ()),
    "understudy_calls_dropped_total": MetricSpec("counter", "Calls not written, by reason", ("reason",)),
    "understudy_calls_journaled_total": MetricSpec("counter", "Calls on the disk before their client's last byte", ()),
    "understudy_journal_damaged_total": MetricSpec("counter", "Journal records that could not be recovered", ()),
    "understudy_audits_total": MetricSpec(
        "counter", "Kept answers compared with the LLM's, by task and whether they agree", ("task_id", "agrees")
    ),
    "understudy_audits_missed_total": MetricSpec("counter", "Audits drawn and not done, by reason", ("reason",)),
    "understudy_audit_spend_usd_total": MetricSpec("counter", "US dollars of LLM tokens spent on audits", ()),
    "understudy_audit_share": MetricSpec(
        "gauge", "Share of calls in the reference stream this minute, as far as audit.max_usd_per_day allows", ()
    ),
    "understudy_shadows_total": MetricSpec(
        "counter", "Specialists' answers compared off the path, by task and whether they agree", ("task_id", "agrees")
    ),
    "understudy_shadows_missed_total": MetricSpec("counter", "Shadows not done, by reason", ("reason",)),
    "understudy_release_changes_total": MetricSpec(
        "counter", "Changes of the served release by the steward, by kind and task", ("kind", "task_id")
    ),
    "understudy_upstream_failures_total": MetricSpec(
        "counter", "LLM calls that failed, by endpoint number", ("endpoint",)
    ),
    "understudy_llm_spend_usd_total": MetricSpec(
        "counter",
        "US dollars of LLM tokens, by endpoint number and whether the LLM reported the tokens or they are estimated",
        ("endpoint", "basis"),
    ),
    "understudy_avoided_usd_total": MetricSpec(
        "counter", "US dollars that LLMs would have asked for kept answers, estimated, by task", ("task_id",)
    ),
    "understudy_specialist_usd_total": MetricSpec(
        "counter", "US dollars that specialists, audits and LLMs asked in vain cost, by task", ("task_id",)
    ),
    "understudy_requests_failed_total": MetricSpec(
        "counter", "Requests answered with an error, by status", ("status",)
    ),
    "understudy_finetune_step": MetricSpec("gauge", "Steps of a fine-tune that are done", ("run",)),
    "understudy_finetune_loss": MetricSpec("gauge", "Mean loss of a fine-tune's last steps", ("run",)),
    "understudy_finetune_agreement": MetricSpec(
        "gauge", "Share of held-out examples that a fine-tune would answer as their reference", ("run",)
    ),
    "understudy_finetune_tokens_per_s": MetricSpec("gauge", "Tokens a second that a fine-tune learns from", ("run",)),
}
_BOUNDARIES_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000]


class Meter:
    """Counts and observes by the names in METRICS."""

    def __init__(self, export: bool = False) -> None:
        """With `export`, hand every value to ray.util.metrics too; that needs to run inside Ray."""
        self.counts: dict[tuple[str, ...], float] = collections.defaultdict(int)
        """(name, tag values in the order of METRICS) -> total, counters alone."""
        self._export = export
        self._exported: dict[str, Any] = {}

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        """Add `value`, at least 0, to a counter."""
        spec = METRICS[name]
        self.counts[(name, *(tags[tag] for tag in spec.tags))] += value
        # Ray refuses to add 0.
        if self._export and value:
            self._metric(name).inc(value, tags=tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add one value to a histogram."""
        if self._export:
            self._metric(name).observe(value, tags=tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Give a gauge its value."""
        if self._export:
            self._metric(name).set(value, tags=tags)

    def total(self, name: str) -> float:
        """Sum of a counter over all its tags."""
        return sum(value for key, value in self.counts.items() if key[0] == name)

    def _metric(self, name: str) -> Any:
        if name not in self._exported:
            from ray.util import metrics

            spec = METRICS[name]
            if spec.kind == "histogram":
                self._exported[name] = metrics.Histogram(name, spec.description, _BOUNDARIES_MS, spec.tags)
            else:
                made = metrics.Counter if spec.kind == "counter" else metrics.Gauge
                self._exported[name] = made(name, spec.description, spec.tags)
        return self._exported[name]


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, and the fields given to `log_event`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        line = {"ts": round(record.created, 3), "level": record.levelname, "event": record.getMessage(), **fields}
        return json.dumps(line, ensure_ascii=True, default=str)


def configure_logging(level: int = logging.INFO) -> None:
    """Send this project's logs to stderr as JSON lines; calling it again changes only the level."""
    logger = logging.getLogger("understudy")
    logger.setLevel(level)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
        logger.addHandler(handler)


def log_event(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log what happened, with identifiers and numbers; never with message content."""
    logging.getLogger("understudy").log(level, event, extra={"fields": fields})
