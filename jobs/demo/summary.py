"""What the demo measured: the agent's results, the captured calls and the LLM's own answers -> one summary.

`share_off_llm` counts every fresh call. Kept answers are compared with what the LLM says to the same requests, asked
directly afterwards. Money is what the gateway captured for the fresh calls, audits included, plus the machine's price.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from cluster import answers
from cluster.prices import tokens_cost_usd
from cluster.records import AgentCall, TaskSpec, Usage
from cluster.upstream import UpstreamConfig
from jobs.convert import Conversion
from jobs.demo.agent import CallResult
from training.evaluation import gain_over_base
from training.gate import clopper_pearson_interval

_WARMED_UP = 0.99


class LLMAnswer(NamedTuple):
    """What the LLM says to a call that a specialist answered."""

    message: dict[str, Any]
    usage: Usage


def is_kept(result: CallResult) -> bool:
    """Whether a specialist's answer reached the agent."""
    return result.error is None and result.headers.get("x-understudy-route") == "accept"


def summarise_agreement(
    conversion: Conversion, captured: list[CallResult], fresh: list[CallResult], references: list[LLMAnswer]
) -> dict[str, Any]:
    """Everything but money and time; `references` are the LLM's answers to the kept calls, in their order."""
    kept = [result for result in fresh if is_kept(result)]
    kinds = {task.task_id: task.kind for task in conversion.tasks}
    agrees = [
        answers.grade(r.message or {}, reference.message, kinds[r.headers["x-understudy-task"]], r.request).agrees
        for r, reference in zip(kept, references, strict=True)
    ]
    wrong = agrees.count(False)
    low, high = clopper_pearson_interval(wrong, len(kept))
    latencies = sorted(result.latency_ms for result in fresh)
    routes = Counter(f"{r.site}:{r.headers.get('x-understudy-route', 'error')}" for r in fresh)
    return {
        "tasks_released": sum(e.gate.is_open for e in conversion.evaluations),
        "tasks_refused": len(conversion.refused),
        "calls": len(fresh),
        "share_off_llm": len(kept) / len(fresh),
        "agreement_accepted": 1 - wrong / len(kept) if kept else None,
        "agreement_interval": [1 - high, 1 - low],
        "client_errors": sum(r.error is not None for r in [*captured, *fresh]),
        "p50_ms": round(statistics.median(latencies), 1),
        "p99_ms": round(latencies[int(_WARMED_UP * (len(latencies) - 1))], 1),
        "routes": dict(sorted(routes.items())),
        "disagreements_by_site": dict(Counter(r.site for r, ok in zip(kept, agrees, strict=True) if not ok)),
        "seconds": conversion.seconds,
        "tasks": [_describe(task, conversion) for task in conversion.tasks],
    }


def summarise_costs(
    calls: Sequence[AgentCall],
    references: Sequence[LLMAnswer],
    upstream: UpstreamConfig,
    *,
    fresh_s: float,
    conversion_s: float,
    usd_per_hour: float,
) -> dict[str, Any]:
    """Spend of the fresh traffic against what it had been with every call on the LLM; training cost stands apart.

    Args:
        calls: the fresh calls as captured, audits among them.
        references: the LLM's answers to the kept calls: what keeping them saved.
        usd_per_hour: price of the machine that served and trained.
    """
    by_llm = [call for call in calls if call.served_by == "llm"]
    audits = [call for call in by_llm if call.route and call.route.action == "audit"]
    upstream_usd = sum(_llm_usd(call.usage, upstream) for call in by_llm)
    audits_usd = sum(_llm_usd(call.usage, upstream) for call in audits)
    all_llm_usd = upstream_usd - audits_usd + sum(_llm_usd(answer.usage, upstream) for answer in references)
    machine_usd = fresh_s / 3600 * usd_per_hour
    return {
        "cost_ratio": (upstream_usd + machine_usd) / all_llm_usd,
        "upstream_usd": upstream_usd,
        "audits": len(audits),
        "audits_usd": audits_usd,
        "machine_usd": machine_usd,
        "all_llm_usd": all_llm_usd,
        "training_usd": conversion_s / 3600 * usd_per_hour,
        "fresh_s": round(fresh_s, 1),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Show the tasks and the totals as tables in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tasks = Table("task", "kind", "calls", "coverage", "decision", title="Tasks")
    for task in summary["tasks"]:
        coverage = f"{task['coverage']:.0%}" if task["released"] else "-"
        decision = "[green]specialist[/]" if task["released"] else f"[yellow]stays on the LLM[/]: {task['reason']}"
        tasks.add_row(task["name"], task["kind"], str(task["num_calls"]), coverage, decision)
    console.print(tasks)
    low, high = summary["agreement_interval"]
    agreement = summary["agreement_accepted"]
    totals = Table(show_header=False, title=f"Fresh traffic: {summary['calls']} calls")
    for name, value in (
        ("kept by specialists", f"{summary['share_off_llm']:.1%} of all calls"),
        (
            "agreement of kept answers",
            "-" if agreement is None else f"{agreement:.2%} (95% interval {low:.2%} to {high:.2%})",
        ),
        ("errors shown to the agent", str(summary["client_errors"])),
        (
            "cost",
            f"{summary['cost_ratio']:.2f} of all calls on the LLM (training apart: {summary['training_usd']:.3f} USD)",
        ),
        ("latency", f"p50 {summary['p50_ms']:.0f} ms, p99 {summary['p99_ms']:.0f} ms"),
        ("whole run", f"{summary['wall_s']:.0f} s"),
    ):
        totals.add_row(name, value)
    console.print(totals)


def _llm_usd(usage: Usage, upstream: UpstreamConfig) -> float:
    cost = tokens_cost_usd(
        usage,
        prompt_usd_per_million=upstream.prompt_usd_per_million,
        completion_usd_per_million=upstream.completion_usd_per_million,
    )
    return cost or 0.0


def _describe(task: TaskSpec, conversion: Conversion) -> dict[str, Any]:
    evaluation = next((e for e in conversion.evaluations if e.task_id == task.task_id), None)
    reason = conversion.refused.get(task.task_id)
    gain = gain_over_base(evaluation) if evaluation else None
    return {
        "task_id": task.task_id,
        "name": task.name,
        "kind": task.kind,
        "num_calls": task.num_calls,
        "released": reason is None,
        "coverage": evaluation.gate.coverage if evaluation else 0.0,
        "bound": evaluation.gate.upper_bound if evaluation else None,
        "gain_over_base": [gain.gain, *gain.interval] if gain else None,
        "reason": reason,
    }
