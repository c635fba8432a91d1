"""A Ray cluster of two hosts on this machine: two network namespaces with a wire between them, and a store that both see.

Each host has an address of its own, and nothing but that wire between them: GCS, raylets, object transfers, Ray Train's
gloo and Serve's proxies go over it. A run of two workers, one on each host, is trained; the serving graph (stub engines,
jobs/bench/stub_graph.py) then answers at each host's own proxy; then one host is killed while it answers, and the other
goes on. Needs root, to make the namespaces; they are gone at the end.

    python -m jobs.bench.two_hosts [--json PATH]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from cluster.errors import ConfigError, TrainingError
from cluster.session import check_alone, connect, prepare_environment
from cluster.store import Store
from jobs.bench.faults import ELASTIC, make_run, train_run
from jobs.bench.http_load import connect as open_connection
from jobs.bench.http_load import http_request
from jobs.bench.stage import make_key, publish_stage, task_request
from jobs.bench.stub_graph import bind_stub_graph
from serving.app import ServeArgs
from serving.endpoint import APP

HOSTS = ("10.231.7.1", "10.231.7.2")
"""Addresses of the two; the first has the head."""
_GCS_PORT, _HTTP_PORT = 6379, 8000
_NUM_ASKED = 40
_CALM = 20
"""Answers in a row after which a graph that lost a host is whole again."""
_START_S, _JOB_S, _LOST_S = 90, 420, 90
_INTERFACE = "wire"
_ENVIRONMENT = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "GLOO_SOCKET_IFNAME": _INTERFACE}
"""Ray on this machine is kept to loopback elsewhere (cluster/session.py); here it listens on the hosts' addresses. Both hosts share
the machine's name, which is its loopback: torch is told the interface."""
_KILL_NOW = "one host may go now"


def run_two_hosts() -> dict[str, Any]:
    """What the job on the two hosts found.

    Raises:
        ConfigError: no namespaces can be made here.
        TrainingError: the cluster did not come up, or the job failed.
    """
    check_alone("a cluster of two hosts")
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        raise ConfigError("two hosts: need root and the program ip; next: run as root, with iproute2 installed")
    # What a killed host leaves running for a moment may still write there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        names = stack.enter_context(_wire(ip))
        log = stack.enter_context((pathlib.Path(folder) / "ray.log").open("wb"))
        # In a folder of its own: `ray start` writes there which cluster is the machine's.
        head = ["--head", f"--port={_GCS_PORT}", "--include-dashboard=false", f"--temp-dir={folder}/ray"]
        # Of their own: a head takes the user's token where there is one, and whoever joins must then show it.
        environment = {**_ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        hosts = [stack.enter_context(_host(ip, names[0], HOSTS[0], head, log, environment))]
        joins = [f"--address={HOSTS[0]}:{_GCS_PORT}"]
        hosts.append(stack.enter_context(_host(ip, names[1], HOSTS[1], joins, log, environment)))
        command = [ip, "netns", "exec", names[0], sys.executable, "-m", "jobs.bench.two_hosts", "--job", folder]
        environment |= {"RAY_ADDRESS": f"{HOSTS[0]}:{_GCS_PORT}"}
        job = stack.enter_context(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
        )
        stack.callback(job.kill)
        watchdog = threading.Timer(_JOB_S, job.kill)
        watchdog.start()
        stack.callback(watchdog.cancel)
        assert job.stdout is not None
        last = ""
        for line in job.stdout:
            last = line.strip() or last
            if last == _KILL_NOW:
                os.killpg(hosts[1].pid, signal.SIGKILL)
        if job.wait() != 0:
            raise TrainingError(f"two hosts: the job ended with {job.returncode}; it said: {last[:300]}")
        return json.loads(last)


def run_job(folder: pathlib.Path) -> dict[str, Any]:
    """On the first host: train on both, serve on both, lose one."""
    import ray

    prepare_environment()
    deadline = time.monotonic() + _START_S
    while True:
        try:
            connect()
            break
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    while len(seen := sorted(one["NodeManagerAddress"] for one in ray.nodes() if one["Alive"])) < 2:
        if time.monotonic() > deadline:
            raise TrainingError(f"two hosts: after {_START_S} s the cluster has {seen}")
        time.sleep(0.5)
    make_run(folder)
    began = time.monotonic()
    curve = train_run(folder, "two-hosts", ELASTIC)["curve"]
    trained_s = round(time.monotonic() - began, 1)
    return {
        "hosts": seen,
        "trained_steps": curve[-1]["step"],
        "losses": [round(curve[place]["loss"], 4) for place in (0, -1)],
        "trained_s": trained_s,
        **_serve(folder),
    }


def _serve(folder: pathlib.Path) -> dict[str, Any]:
    from ray import serve

    store = Store(str(folder / "store"))
    publish_stage(store, "one", {"triage": ("adapters/t50-triage", 0.5, task_request("triage", 0))})
    key = make_key(store)
    args = ServeArgs.model_validate(
        {
            "store": store.uri,
            "upstream": [{"base_url": "http://127.0.0.1:9/v1", "max_attempts": 1}],
            "gateway": {"min_replicas": 2, "max_replicas": 2},
            "audit": {"share": 0.0},
        }
    )
    serve.start(proxy_location="EveryNode", http_options={"host": "0.0.0.0", "port": _HTTP_PORT})
    serve.run(bind_stub_graph(args, num_engines=2), name=APP, route_prefix="/")
    both = {host: dict(collections.Counter(_ask(host, key, n) for n in range(_NUM_ASKED))) for host in HOSTS}
    print(_KILL_NOW, flush=True)
    began, after, calm = time.monotonic(), collections.Counter[str](), 0
    while calm < _CALM and time.monotonic() - began < _LOST_S:
        told = _ask(HOSTS[0], key, sum(after.values()))
        after[told] += 1
        calm = calm + 1 if told == "200 accept" else 0
        time.sleep(0.25)
    whole_s = round(time.monotonic() - began - _CALM * 0.25, 1) if calm == _CALM else None
    return {"answers_by_host": both, "answers_after_a_host_was_lost": dict(after), "whole_again_s": whole_s}


def _ask(host: str, key: str, number: int) -> str:
    """Status and route of one call at a host's proxy; the name of what went wrong where there was no answer."""

    url = f"http://{host}:{_HTTP_PORT}"

    async def ask() -> str:
        body = json.dumps(task_request("triage", 2 * number + 1)).encode()
        async with asyncio.timeout(20):
            connection = await open_connection(url)
            try:
                reply = await connection.ask(http_request(url, body, key))
            finally:
                connection.close()
        return f"{reply.status} {reply.headers.get('x-understudy-route', '')}".strip()

    try:
        return asyncio.run(ask())
    except (OSError, TimeoutError) as error:
        return type(error).__name__


@contextlib.contextmanager
def _wire(ip: str) -> Iterator[list[str]]:
    """Two namespaces, an interface in each, and the wire between them."""
    names = [f"understudy-{os.getpid()}-{place}" for place in (1, 2)]
    ends = [f"us{os.getpid() % 100_000}e{place}" for place in (1, 2)]

    def do(*words: str) -> None:
        found = subprocess.run([ip, *words], capture_output=True, text=True)
        if found.returncode != 0:
            raise ConfigError(f"two hosts: ip {' '.join(words)}: {found.stderr.strip()}; next: root with CAP_NET_ADMIN")

    with contextlib.ExitStack() as undo:
        for name in names:
            do("netns", "add", name)
            undo.callback(do, "netns", "del", name)
        do("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, HOSTS, strict=True):
            do("link", "set", end, "netns", name, "name", _INTERFACE)
            for words in (
                ("addr", "add", f"{address}/24", "dev", _INTERFACE),
                ("link", "set", _INTERFACE, "up"),
                ("link", "set", "lo", "up"),
            ):
                do("-n", name, *words)
        yield names


@contextlib.contextmanager
def _host(
    ip: str, name: str, address: str, words: list[str], log: IO[bytes], environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray node of one CPU in a namespace, in a process group of its own."""
    ray = str(pathlib.Path(sys.executable).with_name("ray"))
    options = [f"--node-ip-address={address}", "--num-cpus=1", "--disable-usage-stats", "--block"]
    memory = ["--object-store-memory=200000000"]
    process = subprocess.Popen(
        [ip, "netns", "exec", name, ray, "start", *words, *options, *memory],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=environment,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--job", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(options.job)), flush=True)
        return
    found = run_two_hosts()
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
