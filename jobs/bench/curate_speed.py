"""How fast curation is per core and how its memory grows: the same stage on stores of 10,000 and 200,000 calls.

Each store repeats the calls of the given files, perturbed so that texts are distinct but realistic: digits are drawn
anew and one word in five is replaced by another of the same files, alike in all steps of a session. Each size is curated
in a fresh process, redaction's libraries loaded before the clock starts, on one thread. Writing the stores is not timed.

    python -m jobs.bench.curate_speed FILE.calls.jsonl.gz... --sizes 10000 200000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cluster.access import Pseudonyms
from cluster.calls import MAX_CALLS_PER_PART, write_calls
from cluster.records import AgentCall
from cluster.store import Store
from training.curate import CurateConfig, curate
from training.formats import LogReader
from training.redact import RedactConfig, Redactor

SIZES = (10_000, 200_000)
NUM_CLIENTS = 20
FIRST_TS, SECONDS_PER_CALL = 1_750_000_000.0, 1.7
REPLACED_WORDS = 0.2
_KEY = b"benchmark of curation, no secret"
_WORD = re.compile(r"\d+|[^\W\d_]{4,}")
_MIB = 1024 * 1024


def measure_curate(calls: list[pathlib.Path], sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Curate stores of these sizes, made of the given files.

    Returns:
        calls_per_s_core and mb_per_s_core (per CPU second, at the largest size; MB are 10^6 bytes of requests and
        responses), peak_rss_mib_SIZE for each size in thousands, and `growth`: the numbers of every size.
    """
    originals = list(_read(calls))
    # So that every size is made of the same mix.
    random.Random(0).shuffle(originals)
    growth = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="curate-speed-") as folder:
            num_bytes = fill_store(Store(folder), originals, size)
            growth.append({"calls": size, "mb": round(num_bytes / 1e6, 1), **_measure(folder, num_bytes, size)})
    last = growth[-1]
    peaks = {f"peak_rss_mib_{one['calls'] // 1000}k": one["peak_rss_mib"] for one in growth}
    return {
        "calls_per_s_core": last["calls_per_s_core"],
        "mb_per_s_core": last["mb_per_s_core"],
        **peaks,
        "growth": growth,
    }


def fill_store(store: Store, originals: Sequence[AgentCall], num_calls: int) -> int:
    """Write `num_calls` calls; returns the bytes of their requests and responses."""
    words = sorted({word for call in originals for word in _WORD.findall(_last_text(call)) if word.isalpha()})
    part: list[AgentCall] = []
    num_bytes = 0
    for number in range(num_calls):
        copy, place = divmod(number, len(originals))
        call = _repeat(originals[place], copy, number, words)
        num_bytes += len(json.dumps([call.request, call.response]))
        part.append(call)
        if len(part) == MAX_CALLS_PER_PART:
            write_calls(store, part)
            part = []
    write_calls(store, part)
    return num_bytes


def _read(paths: Iterable[pathlib.Path]) -> Iterator[AgentCall]:
    reader = LogReader(Pseudonyms(_KEY), FIRST_TS)
    for path in paths:
        yield from (item for item in reader.read(path) if isinstance(item, AgentCall))


def _last_text(call: AgentCall) -> str:
    content = call.request["messages"][-1].get("content")
    return content if isinstance(content, str) else ""


def _repeat(call: AgentCall, copy: int, number: int, words: Sequence[str]) -> AgentCall:
    def perturb(text: str) -> str:
        digest = hashlib.blake2b(f"{copy}\n{text}".encode(errors="surrogatepass"), digest_size=8).digest()
        rng = random.Random(digest)

        def replace(match: re.Match[str]) -> str:
            if match[0].isdigit():
                return "".join(rng.choice("0123456789") for _ in match[0])
            return rng.choice(words) if rng.random() < REPLACED_WORDS else match[0]

        return _WORD.sub(replace, text)

    messages = [_map_content(m, perturb) if m.get("role") in ("user", "tool") else m for m in call.request["messages"]]
    session = f"{call.session_id}-{copy}"
    client = int.from_bytes(hashlib.blake2b(session.encode(), digest_size=4).digest(), "big") % NUM_CLIENTS
    return call.model_copy(
        update={
            "call_id": f"{call.call_id}-{copy}",
            "ts": FIRST_TS + number * SECONDS_PER_CALL,
            "client_id": f"client-{client}",
            "session_id": session,
            "request": {**call.request, "messages": messages},
        }
    )


def _map_content(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": change(content)} if isinstance(content, str) else message


def _measure(folder: str, num_bytes: int, num_calls: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.bench.curate_speed", "--curate", folder]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    facts = json.loads(run.stdout.splitlines()[-1])
    return {
        **facts,
        "calls_per_s_core": round(num_calls / facts["cpu_s"], 1),
        "mb_per_s_core": round(num_bytes / 1e6 / facts["cpu_s"], 2),
    }


def _curate_here(folder: str) -> dict[str, Any]:
    """Runs in the fresh process."""
    Redactor(RedactConfig(), _KEY).redact_session([({"messages": []}, {"role": "assistant", "content": "x"})], "")
    loaded = _peak_rss_mib()
    began, cpu_began = time.perf_counter(), time.process_time()
    snapshot = curate(Store(folder), CurateConfig(), _KEY)
    return {
        "cpu_s": round(time.process_time() - cpu_began, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "peak_rss_mib": _peak_rss_mib(),
        "loaded_rss_mib": loaded,
        "examples": sum(snapshot.counts.num_examples.values()),
        "dropped": snapshot.counts.dropped,
    }


def _peak_rss_mib() -> float:
    """Of this program: getrusage's peak is also that of the process which started it (Linux, proc(5): VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return round(kib * 1024 / _MIB, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="*", type=pathlib.Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--curate", metavar="STORE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    facts = _curate_here(args.curate) if args.curate else measure_curate(args.calls, args.sizes)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
