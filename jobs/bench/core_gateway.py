"""The gateway of serving/app.py under uvicorn, without Ray: what Ray Serve adds is the difference.

    python -m jobs.bench.core_gateway '{"store": STORE, "upstream": [{"base_url": URL}]}' [PROFILE]

Takes the arguments of the serving graph as JSON; prints its address; ends with SIGTERM. With PROFILE, cProfile's statistics of the serving thread from SIGUSR1 on go to
that file.
"""

from __future__ import annotations

import cProfile
import gc
import json
import signal
import sys
import time
from typing import Any

from jobs.bench.floor_proxy import serve_on_loopback
from jobs.bench.processes import module
from serving.app import Gateway, ServeArgs


def core_command(store: str, llm: str, profile: str = "", **args: Any) -> list[str]:
    """The command that runs one, before the LLM at `llm`, with more arguments of the graph."""
    upstream = {"base_url": f"{llm}/v1", **args.pop("upstream", {})}
    words = [json.dumps({"store": store, "upstream": [upstream], **args}), *([profile] if profile else [])]
    return module("jobs.bench.core_gateway", *words)


def lone_gateway(args: dict[str, Any]) -> Gateway:
    """The gateway alone: no engine, no model on a cluster, no steward."""
    return Gateway(ServeArgs.model_validate(args).model_dump(mode="json"), {}, {}, None)


def main(words: str, profile: str | None = None) -> None:
    app = lone_gateway(json.loads(words)).__serve_build_asgi_app__()
    # As Ray Serve does with a replica that has started.
    gc.collect()
    gc.freeze()
    profiler = cProfile.Profile(time.thread_time)
    signal.signal(signal.SIGUSR1, lambda *_: profiler.enable())
    # uvicorn sends itself the signal again once it has ended in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve_on_loopback(app)
    finally:
        profiler.disable()
        if profile is not None:
            profiler.dump_stats(profile)


if __name__ == "__main__":
    main(*sys.argv[1:])
