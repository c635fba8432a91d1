"""What serving costs, withstands and never shows: `understudy bench serve`, its parts one after another into one JSON.

passthrough: calls that no specialist answers, beside LiteLLM's proxy and the floor for Python; rollout: releases that
change under load; faults: everything that may break, under a client that looks at every answer; soak: memory over time;
graph_tax: specialists through the graph beside vLLM alone; autoscale: replicas that come with load and go after it. Each part is a file beside this one that says how it
measures. Speeds are compared within a part alone, so parts may be run at different times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cluster.errors import ConfigError
from cluster.session import check_alone

PARTS = ("passthrough", "rollout", "faults", "graph_tax", "autoscale", "soak")


def bench_serve(
    say: Callable[[str], object],
    parts: Sequence[str] = PARTS,
    quick: bool = False,
    keep: Callable[[dict[str, Any]], object] = lambda numbers: None,
    before: Mapping[str, Any] = MappingProxyType({}),
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Measure the parts named, in the order of `PARTS`. Starts and ends local Ray clusters.

    Args:
        parts: of `PARTS`.
        keep: given everything so far after each part, so that a later one that fails loses nothing.
        before: parts that were measured earlier and are not named, kept as they are.
        facts: provenance, written beside each part that is measured.
        quick: few requests and short times: shows that it runs, and measures nothing.

    Returns:
        The numbers of all parts, and under `parts` everything that was measured.

    Raises:
        ConfigError: a part that is none, or RAY_ADDRESS names a cluster.
    """
    if wrong := sorted(set(parts) - set(PARTS)):
        raise ConfigError(f"--part {wrong[0]}: no such part; allowed: {', '.join(PARTS)}")
    check_alone("bench serve")
    found: dict[str, Any] = dict(before)
    for name, measure in _measures().items():
        if name in parts:
            say(f"-- {name}")
            found[name] = {**measure(say, quick), "provenance": dict(facts)}
            keep(gather_numbers(found) | {"quick": quick, "parts": found})
    return gather_numbers(found) | {"quick": quick, "parts": found}


def _measures() -> dict[str, Callable[[Callable[[str], object], bool], dict[str, Any]]]:
    from jobs.bench.autoscale import measure_autoscale
    from jobs.bench.graph_tax import measure_graph_tax
    from jobs.bench.passthrough import measure_passthrough
    from jobs.bench.rollout import measure_rollout
    from jobs.bench.serve_faults import measure_faults
    from jobs.bench.soak import measure_soak

    measures = (
        *(measure_passthrough, measure_rollout, measure_faults),
        *(measure_graph_tax, measure_autoscale, measure_soak),
    )
    return dict(zip(PARTS, measures, strict=True))


def gather_numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that stand for each part."""
    numbers: dict[str, Any] = {}
    if passthrough := found.get("passthrough"):
        numbers |= passthrough["summary"]
    for name, keys in (
        ("rollout", ("rollout_requests", "rollout_failed", "rollout_mixed")),
        ("faults", ("fault_trials", "fault_client_errors", "captured_exactly_once")),
        (
            "graph_tax",
            (
                "graph_tax",
                "merged_vs_one_adapter",
                "mixed_vs_one_adapter",
                "replica_efficiency",
                "adapter_router_vs_default",
            ),
        ),
        ("autoscale", ("autoscale_up_s", "autoscale_down_s", "cold_start_s", "autoscale_client_errors")),
        ("soak", ("soak_rss_slope_mib_per_h",)),
    ):
        if name in found:
            numbers |= {key: found[name][key] for key in keys}
    return numbers
