"""A gateway that is told to stop: what is over within its drain time is answered, the rest ended with an error and kept."""

from __future__ import annotations

import asyncio
import inspect
import pathlib
import threading

import pytest
from fakes import LLM_TEXT, Running, gateway

from cluster.errors import UpstreamError
from cluster.session import on_replica_stop
from cluster.sse import SseReader
from serving.draining import Drain


async def _asked(run: Running) -> None:
    while not run.llm.requests:
        await asyncio.sleep(0.001)


def test_a_stream_that_goes_on_is_ended_with_an_error_and_captured_as_cut(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, drain_timeout_s=0.2) as run:
            run.llm.may_go_on.clear()
            asking = asyncio.create_task(run.ask(stream=True, n=2))
            await _asked(run)
            run.core.drain.begin()
            async with asyncio.timeout(5):
                reply = await asking
            assert reply.status_code == 200 and b"[DONE]" not in reply.content
            assert SseReader().feed(reply.content)[-1]["error"]["code"] == "shutting_down"
            (call,) = await run.captured()
            assert (call.status, call.error) == (503, "the LLM broke off its answer: shutting_down")
            assert call.message is not None and call.message["content"] == LLM_TEXT[:4]
            while not run.llm.num_left:
                await asyncio.sleep(0.001)

    asyncio.run(scenario())


@pytest.mark.parametrize("degraded", ["fail", "specialist"])
def test_a_whole_answer_that_is_late_is_an_error_and_captured(tmp_path: pathlib.Path, degraded: str) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, drain_timeout_s=0.1, degraded=degraded) as run:
            run.llm.may_answer.clear()
            run.engine.confidence = 0.2
            asking = asyncio.create_task(run.ask())
            await _asked(run)
            run.core.drain.begin()
            async with asyncio.timeout(5):
                reply = await asking
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
            assert int(reply.headers["retry-after"]) >= 1 and run.engine.num_asked == 1
            (call,) = await run.captured()
            assert (call.status, call.error) == (503, "the LLM gave no answer: shutting_down")
            late = await run.ask(n=2)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")

    asyncio.run(scenario())


def test_what_is_over_within_the_drain_time_is_answered(tmp_path: pathlib.Path) -> None:
    async def scenario() -> None:
        async with gateway(tmp_path, drain_timeout_s=30.0) as run:
            run.llm.may_go_on.clear()
            asking = asyncio.create_task(run.ask(stream=True, n=2))
            await _asked(run)
            run.core.drain.begin()
            await asyncio.sleep(0.02)
            run.llm.may_go_on.set()
            assert b"[DONE]" in (await asking).content
            assert (await run.ask(n=2)).status_code == 200
            assert [call.status for call in await run.captured()] == [200, 200]

    asyncio.run(scenario())


def test_it_may_be_begun_from_any_thread_and_twice_and_ends_each_once() -> None:
    async def scenario() -> list[UpstreamError]:
        drain, ended = Drain(0.01), []
        drain.begin()
        drain.attach()
        with drain.watch(ended.append):
            with drain.watch(lambda _: pytest.fail("it is over before")):
                pass
            for _ in range(2):
                thread = threading.Thread(target=drain.begin)
                thread.start()
                thread.join()
            await asyncio.sleep(0.1)
        return ended

    (error,) = asyncio.run(scenario())
    assert error.status == 503


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serve_s_replica_tells_of_its_stop_before_it_waits_for_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a new Serve has no such method: then calls beyond the drain time would be lost again."""
    from ray.serve._private import replica

    order: list[str] = []

    async def stop(_: object) -> None:
        order.append("stop")

    assert inspect.iscoroutinefunction(replica.Replica.perform_graceful_shutdown)
    assert "self._replica_impl.perform_graceful_shutdown()" in inspect.getsource(replica.ReplicaActor)
    monkeypatch.setattr(replica.Replica, "perform_graceful_shutdown", stop)
    on_replica_stop(lambda: order.append("told"))
    asyncio.run(replica.Replica.perform_graceful_shutdown(None))
    assert order == ["told", "stop"]
