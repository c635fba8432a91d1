"""`ray job submit` and `--address` of a conversion to a cluster with token auth: a killed driver costs what was not finished.

The cluster is a head of its own on loopback, in its own process group, so that neither starting nor stopping it can
touch another Ray of this machine.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil
import pytest

from cluster.access import Pseudonyms, load_pseudonym_key
from cluster.registry import load_release
from cluster.store import Store
from jobs.ingest import ingest

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[2]
COLORS = ("red", "green", "blue", "white", "black", "amber")
NUM_CALLS = 120
START_TIMEOUT_S, STOP_TIMEOUT_S, ADAPTER_TIMEOUT_S, CONVERSION_TIMEOUT_S = 240, 60, 300, 400
STEPS = ("num_steps=2", "warmup_steps=1", "batch_size=4")
SMALL_ENGINE = ("max_adapters=1", "max_lora_rank=8", "max_model_tokens=256", "max_num_seqs=8")


class Head(NamedTuple):
    """A running head: where jobs are submitted, with what environment, and its processes."""

    address: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def submit(self, words: list[str], log: pathlib.Path) -> subprocess.Popen[bytes]:
        """Run `ray job submit` as README says; its output, the job's log in the middle, goes to `log`."""
        job = ["--working-dir", str(ROOT), "--", "python", "-m", "jobs", "convert", *words]
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ray", "job", "submit", "--address", self.address, *job],
                env=self.environment,
                stdout=output,
                stderr=subprocess.DEVNULL,
            )

    def convert(self, words: list[str], log: pathlib.Path) -> subprocess.Popen[bytes]:
        """Let the command line submit itself; `log` gets the job's log alone."""
        command = [
            sys.executable,
            "-m",
            "jobs",
            "convert",
            "--address",
            self.address,
            "--working-dir",
            str(ROOT),
            *words,
        ]
        with log.open("wb") as output:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=output, stderr=subprocess.DEVNULL)

    def look(self, token: str | None = None) -> str:
        """What the doctor says of this cluster; `token` instead of the right one."""
        code = (
            "import sys; from jobs.doctor.cluster import check_cluster; print([*check_cluster(sys.argv[1])][-1].found)"
        )
        environment = self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
        command = [sys.executable, "-c", code, self.address]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    def driver(self) -> psutil.Process | None:
        """The conversion itself."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.cmdline()[1:4] == ["-m", "jobs", "convert"]:
                    return process
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return None


@pytest.fixture
def head() -> Iterator[Head]:
    # Below pytest's own folder the paths of Ray's sockets would be longer than a socket's path may be.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="us-", dir="/tmp"))
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    environment = _environment(token)
    ports = _free_ports(8)
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            _head_command(folder / "ray", ports), env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for_port(process, ports[1])
        yield Head(f"http://127.0.0.1:{ports[1]}", environment, process)
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_conversion_continues_after_its_driver_was_killed(head: Head, tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    _ingest_calls(store, tmp_path)
    words = [f"store={store.uri}", "select.base=scratch-tiny", "discover.min_calls=10"]
    words += ["gate.epsilon=0.2", "gate.delta=0.2"]  # few calls can certify this
    words += [f"{section}.{step}" for section in ("pretrain", "finetune") for step in STEPS]
    words += [f"specialists.{limit}" for limit in SMALL_ENGINE]

    assert "answers" in head.look() and "refuses the token" in head.look(secrets.token_hex(32))

    first = head.submit(words, tmp_path / "first.log")
    adapter = _wait_for_adapter(store, first)
    driver = head.driver()
    assert driver is not None, "the conversion was over before it could be killed"
    driver.kill()
    assert first.wait(STOP_TIMEOUT_S) != 0, "a killed job counts as failed"
    assert store.list("releases") == []
    made = {path: (tmp_path / "store" / path).stat().st_mtime_ns for path in store.list("") if "manifest" in path}

    wrong = head.convert([*words, "select.base=scratch-huge"], tmp_path / "wrong.log")
    assert wrong.wait(STOP_TIMEOUT_S) == 2 and "'scratch-huge'" in (tmp_path / "wrong.log").read_text()

    second = head.convert(words, tmp_path / "second.log")
    assert second.wait(CONVERSION_TIMEOUT_S) == 0, (tmp_path / "second.log").read_text()[-4000:]
    lines = _job_lines(tmp_path / "second.log")
    release = pathlib.Path(lines[-1])
    assert release.parent == tmp_path / "store" / "releases" and release.is_file()
    assert not any(line.startswith(("base: ", "fine-tune ")) for line in lines), "something was trained again"
    assert {path: (tmp_path / "store" / path).stat().st_mtime_ns for path in made} == made
    assert list(load_release(store, release.stem).refused) == [adapter.split("/")[1]], "two steps teach nothing"
    beside = json.loads(release.with_suffix(".config.json").read_text())
    assert beside["config"]["finetune"]["num_steps"] == 2
    assert beside["packages"]["ray"] and beside["source"]["sha256"]


def _ingest_calls(store: Store, folder: pathlib.Path) -> None:
    records = []
    for number in range(NUM_CALLS):
        color = COLORS[number % len(COLORS)]
        messages = [
            {"role": "system", "content": "Say the color of the lamp as JSON."},
            {"role": "user", "content": f"Lamp {number} in room {number % 7} shines in {color} today"},
        ]
        answer = {"role": "assistant", "content": json.dumps({"color": color})}
        response = {"choices": [{"index": 0, "message": answer, "finish_reason": "stop"}]}
        request = {"model": "llm", "messages": messages}
        records.append({"id": f"c{number}", "session": f"s{number}", "request": request, "response": response})
    path = folder / "lamp.calls.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert ingest(store, [path], Pseudonyms(load_pseudonym_key(store.uri))).ingested == NUM_CALLS


def _wait_for_adapter(store: Store, job: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + ADAPTER_TIMEOUT_S
    while not (adapters := store.list("adapters", "manifest.json")):
        assert job.poll() is None, "the conversion ended without an adapter"
        assert time.monotonic() < deadline, "no adapter was trained in time"
        time.sleep(0.2)
    return adapters[0]


def _job_lines(log: pathlib.Path) -> list[str]:
    """What the job printed: the output of `ray job submit` without its own lines, which begin with a time and a level."""
    lines = map(str.strip, log.read_text().splitlines())
    return [line for line in lines if line and not re.match(r"[\d-]+ [\d:,]+\s+(INFO|SUCC)", line)]


def _environment(token: pathlib.Path) -> dict[str, str]:
    """The session Ray's address must not reach the other cluster, nor this cluster's token the other tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_worker_niceness": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def _head_command(folder: pathlib.Path, ports: list[int]) -> list[str]:
    options = {
        "port": ports[0],
        "dashboard-port": ports[1],
        "dashboard-agent-listen-port": ports[2],
        "dashboard-agent-grpc-port": ports[3],
        "runtime-env-agent-port": ports[4],
        "metrics-export-port": ports[5],
        "ray-client-server-port": ports[6],
        "node-manager-port": ports[7],
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "num-cpus": 2,
        "object-store-memory": 200_000_000,
        "temp-dir": folder,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return ["ray", "start", "--head", "--block", "--disable-usage-stats", *words]


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "ray start failed"
        assert time.monotonic() < deadline, "the head did not start in time"
        time.sleep(0.3)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the head and all that it started, and nothing else."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    os.killpg(process.pid, signal.SIGKILL)
    for one in below:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(STOP_TIMEOUT_S)
    psutil.wait_procs(below, STOP_TIMEOUT_S)
