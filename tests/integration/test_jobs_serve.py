"""`understudy serve` as a process of its own: answers at the base_url it prints, and SIGTERM cuts no stream
that ends within the drain time and loses no captured call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from background_loop import background_loop
from fakes import LLM_TEXT, FakeLLM

from cluster.access import ApiKeys, keys_folder
from cluster.calls import read_calls
from cluster.store import Store
from serving.app import KEYS_FILE

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[2]
MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
START_TIMEOUT_S, STOP_TIMEOUT_S = 120.0, 60.0
_HOLD_S, _DRAIN_S = 5.0, 8.0


def test_serve_answers_until_it_is_told_to_stop_and_then_finishes_and_flushes(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    key = ApiKeys(keys_folder(store.uri) / KEYS_FILE).create("agent", "agent")
    with _running_llm() as (llm, url, loop):
        # An hour between writes: whatever is stored was written because of the signal.
        words = [f"store={store.uri}", f"upstream.0.base_url={url}", f"serve.http.port={_free_port()}"]
        words += ["capture.flush_interval_s=3600.0", f"gateway.drain_timeout_s={_DRAIN_S}"]
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs", "serve", *words], stdout=out, stderr=err, cwd=ROOT, env=_environment()
            )
        try:
            base_url = _wait_for_base_url(process, tmp_path)
            with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=30) as client:
                reply = client.chat.completions.with_raw_response.create(model="llm-1", messages=MESSAGES)
                assert reply.headers["x-understudy-route"] == "llm" and reply.parse().choices[0].message.content
                assert read_calls(store) == []
                loop.call_soon_threadsafe(llm.may_go_on.clear)
                stream = client.chat.completions.create(model="llm-1", messages=MESSAGES, stream=True)
                said = next(stream).choices[0].delta.content
                loop.call_soon_threadsafe(setattr, llm, "fate", "hang")
                endless = client.chat.completions.create(model="llm-1", messages=MESSAGES, stream=True)
                assert next(endless).choices[0].delta.content
                loop.call_soon_threadsafe(setattr, llm, "fate", "finish")
                process.send_signal(signal.SIGTERM)
                # What waits for nobody is gone by then: the stream would be cut.
                time.sleep(_HOLD_S)
                loop.call_soon_threadsafe(llm.may_go_on.set)
                said += "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
                assert said == LLM_TEXT
                with pytest.raises(openai.APIError, match="This gateway stops"):
                    list(endless)
            assert process.wait(STOP_TIMEOUT_S) == 0, (tmp_path / "err").read_text()
            calls = read_calls(store)
            assert reply.headers["x-understudy-call-id"] in {call.call_id for call in calls}
            assert [call.status for call in calls if call.request.get("stream")] == [200, 503]
        finally:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def _running_llm() -> Iterator[tuple[FakeLLM, str, asyncio.AbstractEventLoop]]:
    llm = FakeLLM()
    with background_loop() as loop:
        try:
            yield llm, asyncio.run_coroutine_threadsafe(llm.start(), loop).result(10), loop
        finally:
            asyncio.run_coroutine_threadsafe(llm.close(), loop).result(10)


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
