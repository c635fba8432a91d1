"""`understudy serve` as a process of its own: answers at the base_url it prints, and SIGTERM loses no captured call."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest

from cluster.access import ApiKeys, keys_folder
from cluster.calls import read_calls
from cluster.store import Store
from serving.app import KEYS_FILE

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[2]
START_TIMEOUT_S, STOP_TIMEOUT_S = 120.0, 60.0


def test_serve_answers_until_it_is_told_to_stop_and_then_flushes(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    key = ApiKeys(keys_folder(store.uri) / KEYS_FILE).create("agent", "agent")
    llm = subprocess.Popen(
        [sys.executable, "-m", "jobs.demo.llm", "--port", "0", "--latency-scale", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert llm.stdout is not None
    upstream = f"upstream.0.base_url={llm.stdout.readline().strip()}/v1"
    # An hour between writes: whatever is stored was written because of the signal.
    words = [f"store={store.uri}", upstream, f"serve.http.port={_free_port()}", "capture.flush_interval_s=3600.0"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "serve", *words], stdout=out, stderr=err, cwd=ROOT, env=_environment()
        )
    try:
        base_url = _wait_for_base_url(process, tmp_path)
        with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=30) as client:
            messages = [{"role": "user", "content": "Hello"}]
            reply = client.chat.completions.with_raw_response.create(model="scripted-llm-v1", messages=messages)
        assert reply.headers["x-understudy-route"] == "llm" and reply.parse().choices[0].message.content
        assert read_calls(store) == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0, (tmp_path / "err").read_text()
        assert [call.call_id for call in read_calls(store)] == [reply.headers["x-understudy-call-id"]]
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT_S)
        llm.terminate()
        llm.wait(STOP_TIMEOUT_S)
        llm.stdout.close()


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OPENAI_"))}
    return kept | {"RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_NUM_THREADS": "1"}


def _wait_for_base_url(process: subprocess.Popen[bytes], folder: pathlib.Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (said := (folder / "out").read_text()).endswith("\n"):
        assert process.poll() is None, (folder / "err").read_text()
        assert time.monotonic() < deadline, "the endpoint did not start in time"
        time.sleep(0.3)
    return said.strip().removeprefix("base_url: ")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
