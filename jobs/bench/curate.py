"""`understudy bench curate`: what S1 and S2 find, break, cost and lose, in one run on one machine.

| numbers                                                                     | measured by                |
|-----------------------------------------------------------------------------|----------------------------|
| PII recall and precision beside stock Presidio's, false positives, broken tool calls, MB/s | jobs/bench/pii.py |
| calls a second and core, peak memory at 10,000 and 200,000 calls            | jobs/bench/curate_speed.py |
| added latency of a captured call by durability, calls lost to kill -9       | jobs/bench/capture.py      |

Needs data of the formats that `understudy ingest` and the PII files have; without paths the shared data is taken
(UNDERSTUDY_DATA, default ../shared/data). Nothing of it is kept.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import InputError
from jobs.provenance import machine

DATA_ENV = "UNDERSTUDY_DATA"
_PII = ("templates_x_tau", "restaurant8k", "nlupp_person", "tau_airline_silver")
_NEGATIVES = ("nlu/banking77.calls.jsonl.gz", "fc/bfcl.calls.jsonl.gz")
_AGENT_CALLS = ("agents/tau_airline.sessions.jsonl.gz",)
_TRAFFIC = (
    *(f"nlu/{name}.calls.jsonl.gz" for name in ("banking77", "clinc150", "nlupp", "restaurant8k", "snips")),
    "agents/metagpt.calls.jsonl.gz",
    "agents/http_crewai.calls.jsonl.gz",
)
SIZES = (10_000, 200_000)
_QUICK_SIZES = (500, 2_000)
_QUICK_PII = ("templates_x_tau",)
_QUICK_REQUESTS = 200


def bench_curate(
    pii: Sequence[pathlib.Path] = (),
    calls: Sequence[pathlib.Path] = (),
    say: Callable[[str], None] = print,
    quick: bool = False,
) -> dict[str, Any]:
    """Run all three. Takes about a quarter of an hour on two cores, most of it for 200,000 calls.

    Args:
        pii: files with {"id", "text", "spans"} lines instead of the shared ones.
        calls: call logs instead of the shared ones: tool calls that could break, and the traffic that is multiplied.
        quick: one file, few requests, small stores: shows that it runs, and measures nothing.

    Raises:
        InputError: a file is missing.
    """
    from jobs.bench.capture import measure_capture
    from jobs.bench.curate_speed import measure_curate
    from jobs.bench.pii import measure_pii

    data = pathlib.Path(os.environ.get(DATA_ENV, "../shared/data"))
    pii = pii or [data / f"pii/{name}.jsonl.gz" for name in (_QUICK_PII if quick else _PII)]
    agents = calls or [data / name for name in _AGENT_CALLS]
    traffic = calls or [data / name for name in _TRAFFIC]
    negatives = [] if quick else [path for path in (data / name for name in _NEGATIVES) if path.is_file()]
    sizes = _QUICK_SIZES if quick else SIZES
    _check([*pii, *agents, *traffic])
    result: dict[str, Any] = {"machine": machine()}
    say(f"bench curate: personal data in {len(pii)} files")
    result |= measure_pii(list(pii), list(agents), negatives)
    say("bench curate: capture off, async, sync")
    result |= measure_capture(*([_QUICK_REQUESTS] if quick else []))
    say(f"bench curate: {sizes[0]:,} and {sizes[-1]:,} calls")
    return result | measure_curate(list(traffic), sizes)


def _check(paths: Sequence[pathlib.Path]) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]}: no such file; allowed: files given with --pii and --calls, or the folder of the shared data in "
            f"{DATA_ENV}; next: {DATA_ENV}=/PATH understudy bench curate"
        )
