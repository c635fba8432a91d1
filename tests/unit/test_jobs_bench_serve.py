"""jobs/bench/serve.py and its parts: which number stands for what, and checkers that do see what is wrong."""

from __future__ import annotations

import asyncio
import json
import math
import pathlib
import sys

import pytest

from cluster.calls import write_calls
from cluster.errors import ConfigError
from cluster.faces import FacesConfig, Facing
from cluster.prompts import PromptFormat
from cluster.records import AgentCall
from cluster.servable import ask_engine
from cluster.store import Store
from jobs.__main__ import main
from jobs.bench import autoscale, serve, serve_faults
from jobs.bench.autoscale import Answers, Replicas
from jobs.bench.core_gateway import lone_gateway
from jobs.bench.fake_llm import answer_text
from jobs.bench.gateway_profile import shares_by_package
from jobs.bench.graph_tax import compare, compare_routers, turn_of
from jobs.bench.http_load import Reply, http_request, load, percentile, slope, unchunked
from jobs.bench.passthrough import check_stream, check_unary, request_body, summarize
from jobs.bench.processes import Usage, module, server
from jobs.bench.results import write_results
from jobs.bench.rollout import adapter_of, request_of, what_is_mixed
from jobs.bench.serve import bench_serve, gather_numbers
from jobs.bench.serve_faults import Trial, is_captured_once, summarize_trials, wrong_of_upstream
from jobs.bench.soak import SHAPES, shape_bodies, summarize_looks
from jobs.bench.stage import make_stage, task_request
from jobs.bench.stub_graph import StubEngine, stub_confidence, stub_text
from serving.specialist_config import SpecialistConfig

AUTOSCALE = ("autoscale_up_s", "autoscale_down_s", "cold_start_s", "autoscale_client_errors")
PROMISED = {
    *("cpu_ms", "requests_per_s", "vs_litellm", "vs_floor", "graph_tax", "mixed_vs_one_adapter", "replica_efficiency"),
    *("fault_trials", "fault_client_errors", "captured_exactly_once", "rollout_requests", "rollout_failed"),
    *("rollout_mixed", "soak_rss_slope_mib_per_h", *AUTOSCALE),
}


def cell(name: str, cpu_ms: float, *, mode: str = "unary", kb: float = 5, p50: float = 1.0, p99: float = 2.0) -> dict:
    return {
        **{"server": name, "mode": mode, "concurrency": 8, "kb": kb, "requests_per_s": 10.0},
        **{"cpu_ms": cpu_ms, "p50_ms": p50, "p99_ms": p99},
    }


def test_every_promised_number_comes_from_its_part():
    found = {
        "passthrough": {"summary": summarize([cell("ours", 1.0), cell("litellm", 12.0), cell("floor", 0.5)])},
        "rollout": {"rollout_requests": 10, "rollout_failed": 1, "rollout_mixed": 2, "changes": {}},
        "faults": {"fault_trials": 5, "fault_client_errors": 1, "captured_exactly_once": False, "faults": {}},
        "graph_tax": {
            "graph_tax": 0.1,
            "merged_vs_one_adapter": 1.2,
            "mixed_vs_one_adapter": 0.9,
            "replica_efficiency": 0.8,
            "adapter_router_vs_default": {},
        },
        "autoscale": {**dict.fromkeys(AUTOSCALE, 1.0), "replicas": []},
        "soak": {"soak_rss_slope_mib_per_h": 3.0, "rss_mib": []},
    }
    numbers = gather_numbers(found)
    assert numbers.keys() >= PROMISED
    assert numbers["cpu_ms"] == {"unary": {"8": {"floor": 0.5, "litellm": 12.0, "ours": 1.0}}}
    assert (numbers["rollout_failed"], numbers["fault_client_errors"], numbers["captured_exactly_once"]) == (
        1,
        1,
        False,
    )
    assert gather_numbers({"soak": found["soak"]}) == {"soak_rss_slope_mib_per_h": 3.0}


def test_a_part_that_is_none_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="--part speed: no such part; allowed: passthrough, rollout, "):
        bench_serve(print, ["soak", "speed"])


def test_ratios_tell_the_worst_cell_as_well_as_the_mean():
    cells = [
        *(cell("ours", 1.0, kb=0.5), cell("litellm", 20.0, kb=0.5, p50=2.0, p99=1.0), cell("floor", 0.5, kb=0.5)),
        *(cell("ours", 2.0, kb=50), cell("litellm", 22.0, kb=50, p50=2.0, p99=3.0), cell("floor", 0.5, kb=50)),
    ]
    found = summarize(cells)
    assert found["vs_litellm"] == {"unary": {"worst": 11.0, "mean_cpu": 14.0}}
    assert found["vs_floor"] == {"unary": {"worst": 4.0, "mean_cpu": 3.0}}
    assert found["cpu_ms"]["unary"]["8"] == {"floor": 0.5, "litellm": 21.0, "ours": 1.5}
    assert found["faster_than_litellm"] == {"p50_ms": 1.0, "p99_ms": 0.5}
    assert summarize([one for one in cells if one["server"] != "litellm"])["vs_litellm"] == {}


def test_statistics():
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0 and percentile(list(range(1, 101)), 0.99) == 99
    assert math.isnan(percentile([], 0.5))
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0) and slope([(1.0, 1.0)]) == 0.0
    # Warming up, then flat: the slope is that of what came after.
    looks = [(0.0, 100.0, 9), (1_000.0, 300.0, 20), (2_000.0, 300.0, 20), (3_600.0, 300.0, 11)]
    assert summarize_looks(looks) == {"soak_rss_slope_mib_per_h": 0.0, "rss_mib": [100.0, 300.0], "handles": [9, 11]}
    began = Usage({1: 2.0, 2: 1.0}, 0.0, 0, {1: "a", 2: "b"})
    ended = Usage({1: 2.5, 3: 0.25}, 0.0, 0, {1: "a", 3: "c"})
    assert ended.cpu_ms_since(began) == 750.0 and ended.cpu_ms_by_name(began) == {"a": 500.0, "c": 250.0}
    rates = {"one": {"requests_per_s": 9.0}, "mixed": {"requests_per_s": 8.1}}
    bare = {"one": {"requests_per_s": 10.0}, "merged": {"requests_per_s": 12.0}}
    assert compare(bare, {1: rates, 2: {"one": {"requests_per_s": 14.4}}}) == {
        **{"graph_tax": 0.1, "merged_vs_one_adapter": 1.2, "mixed_vs_one_adapter": 0.9},
        "replica_efficiency": 0.8,
    }


def test_replicas_that_come_and_go_are_seen_and_so_is_another_calls_answer():
    replicas, answers = Replicas(), Answers()
    for num in (0, 0, 1, 3, 3, 0):
        replicas.note(num)
    assert [num for _, num in replicas.changes] == [0, 1, 3, 0] and replicas.num == 0
    assert asyncio.run(replicas.wait_for(0)) == 0.0

    def reply(status: int, text: str) -> Reply:
        return Reply(status, {"x-understudy-route": "accept"}, text.encode(), 1.0, 1.0)

    assert answers.check(3, reply(200, "adapters/t50-triage #7#")) is None
    assert "#7#" in answers.check(4, reply(200, "adapters/t50-triage #7#")), "the answer to another call"
    assert answers.check(3, reply(503, "#7#")).startswith("503, accept") and answers.by_route == {"accept": 3}


def test_a_paced_engine_answers_as_many_at_once_as_it_is_told_to(monkeypatch):
    monkeypatch.setattr(autoscale, "SERVICE_S", 0.01)
    monkeypatch.setattr(autoscale, "START_S", 0.0)

    async def scenario() -> tuple[int, set[str]]:
        engine, most = autoscale.PacedEngine(SpecialistConfig(max_num_seqs=2)), 0

        async def ask(number: int) -> str:
            request = {"messages": [{"role": "user", "content": f"#{number}#"}]}
            return (
                await engine.answer(
                    "adapters/t50-a", PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=100), request, 16
                )
            ).text

        asking = [asyncio.create_task(ask(number)) for number in range(6)]
        while not all(one.done() for one in asking):
            await asyncio.sleep(0.001)
            most = max(most, 2 - engine._places._value)
        return most, {one.result() for one in asking}

    most, texts = asyncio.run(scenario())
    assert most == 2 and texts == {stub_text("adapters/t50-a", number) for number in range(6)}


def test_routers_are_compared_on_conversations_that_go_on_where_they_were():
    slow, quick = {"requests_per_s": 2.0, "cpu_ms": 400.0}, {"requests_per_s": 2.5, "cpu_ms": 300.0}
    found = compare_routers({"default": slow, "adapter": quick})
    assert found["adapter_router_vs_default"] == {"requests_per_s": 1.25, "cpu_ms": 0.75}
    texts = [turn_of(number, 6)["messages"] for number in range(24)]
    for number, (system, user) in enumerate(texts[6:], 6):
        assert system == texts[number - 6][0] and user["content"].startswith(texts[number - 6][1]["content"])
    assert len({json.dumps(one) for one in texts}) == 24 and len({one[0]["content"] for one in texts}) == 4


def kept(release: str, number: int, **headers: str) -> Reply:
    """The answer that a release keeps to an odd-numbered request of `orders`."""
    adapter = adapter_of(release, "orders")
    right = {"task": f"orders-{release}", "route": "accept", "confidence": f"{stub_confidence(adapter, number):.6f}"}
    body = {"choices": [{"message": {"content": stub_text(adapter, number)}}]}
    named = {f"x-understudy-{name}": value for name, value in {**right, **headers}.items()}
    return Reply(200, {"content-type": "application/json", **named}, json.dumps(body).encode(), 1.0, 1.0)


def test_what_two_releases_gave_together_is_seen():
    assert what_is_mixed(3, kept("a", 3), "a") is None
    assert "never promoted" in what_is_mixed(3, kept("a", 3), None)
    assert "orders-b" in what_is_mixed(3, kept("a", 3, task="orders-b"), "a"), "another release's router"
    assert "route" in what_is_mixed(3, kept("a", 3, route="escalate"), "a"), "another release's threshold"
    other = kept("a", 3)._replace(body=kept("b", 3).body)
    assert "instead of" in what_is_mixed(3, other, "a"), "another release's adapter"
    assert "instead of" in what_is_mixed(9, kept("a", 3), "a"), "another request's answer"
    kinds = {json.dumps(request_of(number)["messages"][0]) for number in range(6)}
    assert len(kinds) == 3 and sum("stream" in request_of(number) for number in range(6)) == 3


def test_what_a_client_must_not_see_of_a_fault_is_seen():
    error = json.dumps({"error": {"message": "no"}}).encode()
    good = Reply(503, {}, error, 1.0, 1.0)
    assert wrong_of_upstream(good, "hang", {503}) is None
    assert "status 503" in wrong_of_upstream(good, "hang", {504})
    assert "shape" in wrong_of_upstream(good._replace(body=b'{"detail": "no"}'), "hang", {503})
    half = Reply(200, {}, b'data: {"choices": []}\n\ndata: [DONE]\n\n', 1.0, 1.0)
    assert "says nothing" in wrong_of_upstream(half, "cut", {200})
    assert wrong_of_upstream(half._replace(body=b'data: {"error": {}}\n\n'), "cut", {200}) is None
    assert is_captured_once({"a": 1, "b": 1}, ["a", None], 2)
    assert not is_captured_once({"a": 1}, ["a", "b"], 2), "one is missing"
    assert not is_captured_once({"a": 2, "b": 1}, ["a", "b"], 3), "one is there twice"
    assert not is_captured_once({"a": 1, "b": 1}, ["a"], 1), "one was never sent"
    found = summarize_trials([Trial("cut", "1", None), Trial("cut", "2", "half"), Trial("hang", "3", None)])
    assert (found["fault_trials"], found["fault_client_errors"]) == (3, 1)
    assert found["faults"]["cut"] == {"trials": 2, "wrong": 1, "first": "half"}


def test_the_time_of_c_functions_is_their_callers():
    ours, theirs = ("/app/serving/gateway.py", 1, "complete"), ("/venv/aiohttp/client.py", 2, "post")
    stats = {
        ours: (1, 1, 2.0, 9.0, {}),
        theirs: (1, 1, 1.0, 4.0, {ours: (1, 1, 1.0, 4.0)}),
        ("~", 0, "<built-in loads>"): (4, 4, 5.0, 5.0, {ours: (3, 3, 4.0, 4.0), theirs: (1, 1, 1.0, 1.0)}),
    }
    assert shares_by_package(stats) == {"serving": 0.75, "aiohttp": 0.25}


# Ray Serve's own, at its import.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_benchmarks_own_gateway_and_engine_are_what_the_product_asks_for(tmp_path):
    address, _ = make_stage(tmp_path / "stage")
    app = lone_gateway({"store": address, "upstream": [{"base_url": "http://127.0.0.1:9/v1"}]})
    assert callable(app.__serve_build_asgi_app__())
    request, prompt_format = (
        task_request("good", 1),
        PromptFormat(kind="chat", answer_kind="label", max_prompt_tokens=9),
    )
    asking = ask_engine(
        StubEngine(1), "adapters/t50-good", prompt_format, request, 16, Facing(FacesConfig(), False), stop_below=0.5
    )
    answer, invalid = asyncio.run(asking)
    assert (answer.text, invalid) == (stub_text("adapters/t50-good", 1), None)


def test_requests_have_the_sizes_that_are_said():
    for kb in (0.5, 5, 50):
        assert abs(len(request_body("stream", kb)) - kb * 1_000) < 60
    assert len(shape_bodies()) == len(SHAPES) == 13


def test_the_fake_llm_and_the_load_understand_each_other(tmp_path):
    async def ask(url: str, mode: str, **extra: str) -> tuple[int, list[str]]:
        body = {**json.loads(request_body(mode, 0.5)), **extra}
        checked = check_unary if mode == "unary" else check_stream
        turn = await load(
            url,
            [http_request(url, json.dumps(body).encode(), "key")],
            checked,
            concurrency=2,
            max_requests=6,
            max_seconds=30.0,
        )
        return len(turn.whole_ms), turn.errors

    with server(module("jobs.bench.fake_llm"), tmp_path / "llm.log") as (_, url):
        assert asyncio.run(ask(url, "unary")) == (6, []) == asyncio.run(ask(url, "stream"))
        num_whole, errors = asyncio.run(ask(url, "stream", user="fate:cut"))
        assert num_whole == 0 and len(errors) == 6
        num_whole, errors = asyncio.run(ask(url, "stream", user="fate:unfinished"))
        assert num_whole == 6 and errors == ["the stream is not whole"] * 6
        _, errors = asyncio.run(ask(url, "unary", user="fate:s429"))
        assert len(errors) == 6 and errors[0].startswith("status 429")


def test_chunks_are_put_together():
    assert unchunked(b"5\r\nhello\r\n6;name=x\r\n world\r\n0\r\n\r\n") == b"hello world"
    assert answer_text("#7#").startswith("#7# word0")


def test_a_part_measured_again_stands_beside_the_others_and_says_what_measured_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "serve.json"
    soaks = iter((3.0, 4.0))
    monkeypatch.setattr(
        serve,
        "_measures",
        lambda: {
            "rollout": lambda say, quick: {"rollout_requests": 10, "rollout_failed": 0, "rollout_mixed": 0},
            "soak": lambda say, quick: {"soak_rss_slope_mib_per_h": next(soaks)},
        },
    )
    for words in (["--part", "rollout", "soak"], ["--part", "soak"]):
        assert main(["bench", "serve", "--quick", "--json", str(path), *words]) == 0
    found = json.loads(path.read_text())
    assert found["rollout_requests"] == 10 and found["soak_rss_slope_mib_per_h"] == 4.0
    found["parts"]["rollout"]["provenance"]["git_sha"] = "a" * 40
    path.write_text(json.dumps(found))
    page = write_results(path.parent)
    assert "Part rollout: `understudy" in page and "commit aaaaaaaaaa" in page and "Part soak" not in page
    capsys.readouterr()
    assert main(["bench", "serve", "--json", str(path), "--part", "soak"]) == 2
    assert "is of bench serve, quick True; next" in capsys.readouterr().err
    path.write_text("[]")
    assert main(["bench", "serve", "--json", str(path), "--part", "soak"]) == 2
    assert "no measurement; allowed" in capsys.readouterr().err


def test_what_the_gateway_asks_again_by_itself_is_no_call_of_a_client(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    told = {"ts": 1.7e9, "client_id": "c", "agent": "a", "session_id": "s", "step": 0, "response": None}
    calls = [
        AgentCall(call_id=name, request={"messages": []}, audit_of=of, **told) for name, of in (("1", None), ("2", "1"))
    ]
    write_calls(store, calls)
    assert serve_faults._stored(store) == ["1"]
