"""The serving graph over real HTTP: gateway, a real engine with a LoRA adapter, a scripted LLM, the official client."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
from background_loop import background_loop
from otlp import Collector, listening
from teaching import teach

from cluster import registry
from cluster.access import ApiKeys, keys_folder
from cluster.calls import read_calls
from cluster.engine import EngineAnswer
from cluster.feedback import read_outcomes
from cluster.prompts import PromptFormat
from cluster.records import AgentCall, Gate, Release, Specialist
from cluster.route_model import RouteModel
from cluster.signature import signature_of
from cluster.store import Store, content_hash
from serving.app import KEYS_FILE, ServeArgs, build
from serving.engine_options import fingerprint_of
from serving.late_engines import ServeApps, engine_app
from serving.specialist import NO_TELEMETRY, find_engine
from serving.specialist_config import SpecialistConfig
from training.finetune import FinetuneConfig, finetune
from training.merged_weights import publish_merged

pytestmark = pytest.mark.integration

APP, TASK, LLM = "test-serving", "command", "scripted-llm-v1"
BASE, ADAPTER, ROUTES = "bases/toy", f"adapters/{TASK}/one", "route_model/toy"
SPECIALISTS = SpecialistConfig(max_adapters=1, max_lora_rank=8, max_model_tokens=512, max_num_seqs=8)
READY_TIMEOUT_S, CAPTURE_TIMEOUT_S = 120.0, 30.0
UNKNOWN = [{"role": "system", "content": "No release knows this prompt."}, {"role": "user", "content": "Hello there"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup_order",
        "parameters": {"type": "object", "properties": {"order_id": {"type": "string"}}},
    },
}
TOOL_REQUEST = {
    "model": LLM,
    "messages": [
        {"role": "system", "content": "Help the customer by calling exactly one tool."},
        {"role": "user", "content": "Where is AB-12345?"},
    ],
    "tools": [TOOL],
}


class Endpoint(NamedTuple):
    """A running gateway, the client of one key of it, and what it serves from."""

    client: openai.OpenAI
    store: Store
    release: str
    specialist: Specialist
    traces: Collector
    """What the gateway's and the engine's processes send their spans to."""
    args: ServeArgs


@pytest.fixture(scope="module")
def endpoint(serve_port: int, toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from ray import serve

    folder = tmp_path_factory.mktemp("serving")
    store = Store(str(folder / "store"))
    release, specialist = _publish(store, toy, folder)
    key = ApiKeys(keys_folder(store.uri) / KEYS_FILE).create("test-agent", "agent")
    stack = contextlib.ExitStack()
    llm, llm_url = _start_llm()
    try:
        traces = stack.enter_context(_collector())
        upstream = [{"base_url": f"{llm_url}/v1"}]
        telemetry = {"otlp_endpoint": traces.url}
        args = ServeArgs.model_validate(
            {"store": store.uri, "upstream": upstream, "specialists": SPECIALISTS, "telemetry": telemetry}
        )
        serve.run(build(args), name=APP, route_prefix="/")
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{serve_port}/v1", api_key=key, max_retries=0, timeout=READY_TIMEOUT_S
        ) as client:
            _wait_for_release(client, release)
            yield Endpoint(client, store, release, specialist, traces, args)
    finally:
        for app in serve.status().applications:
            serve.delete(app)
        llm.terminate()
        llm.wait(timeout=10)
        llm.stdout.close()
        stack.close()


def test_a_learned_call_is_accepted_with_its_headers_and_captured(endpoint: Endpoint, toy: Any) -> None:
    example = toy.examples[0]
    reply = endpoint.client.chat.completions.with_raw_response.create(model=LLM, **example.request)
    completion = reply.parse()
    assert reply.headers["x-understudy-route"] == "accept", reply.headers.get("x-understudy-reason")
    assert reply.headers["x-understudy-task"] == TASK
    assert reply.headers["x-understudy-specialist"] == endpoint.specialist.name == completion.model
    assert reply.headers["x-understudy-release"] == endpoint.release
    assert 0.0 < float(reply.headers["x-understudy-confidence"]) <= 1.0
    assert completion.choices[0].message.content == example.target["content"]
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None and completion.usage.completion_tokens > 0
    call = _captured(endpoint, reply.headers["x-understudy-call-id"])
    assert (call.served_by, call.status) == ("specialist", 200)
    assert call.message is not None and call.message["content"] == example.target["content"]
    assert call.route is not None and call.route.action == "accept" and call.route.release == endpoint.release


def test_an_accepted_answer_streams_as_the_client_asked(endpoint: Endpoint, toy: Any) -> None:
    example = toy.examples[1]
    with endpoint.client.chat.completions.with_streaming_response.create(
        model=LLM, stream=True, stream_options={"include_usage": True}, **example.request
    ) as reply:
        chunks = list(reply.parse())
        headers = reply.headers
    assert headers["x-understudy-route"] == "accept", headers.get("x-understudy-reason")
    assert _joined(chunks) == example.target["content"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert _captured(endpoint, headers["x-understudy-call-id"]).served_by == "specialist"


def test_a_prompt_too_long_for_the_specialist_escalates_to_the_llm(endpoint: Endpoint, toy: Any) -> None:
    system, user = toy.examples[0].request["messages"]
    long = {**user, "content": user["content"] + " and again" * 200}
    request = {**toy.examples[0].request, "messages": [system, long]}
    reply = endpoint.client.chat.completions.with_raw_response.create(model=LLM, **request)
    assert reply.headers["x-understudy-route"] == "escalate"
    assert reply.headers["x-understudy-task"] == TASK
    assert reply.parse().model == LLM
    call = _captured(endpoint, reply.headers["x-understudy-call-id"])
    assert call.served_by == "llm" and call.route is not None and call.route.action == "escalate"


def test_the_engine_gives_up_what_a_gate_would_refuse_and_nothing_else(endpoint: Endpoint, toy: Any) -> None:
    engine = find_engine(APP, BASE)
    system, user = toy.examples[0].request["messages"]
    asked = {**toy.examples[0].request, "messages": [system, {**user, "content": "heater heater radio, fan or low"}]}

    async def answer(stop_below: float) -> EngineAnswer:
        return await engine.answer(ADAPTER, toy.prompt_format, asked, 64, stop_below)

    async def scenario() -> None:
        whole = await answer(0.0)
        assert whole.completion_tokens > 2 and whole.finish_reason in ("stop", "length")
        early = await answer(0.999999)
        assert early.finish_reason == "rejected" and early.message is None
        assert early.completion_tokens < whole.completion_tokens
        assert whole.confidence <= early.confidence < 0.999999
        assert await answer(whole.confidence) == whole, "at its own confidence it is kept"

    asyncio.run(scenario())


def test_an_answer_is_held_to_the_schema_of_its_request_where_there_is_one_that_an_engine_can_hold_it_to(
    endpoint: Endpoint,
) -> None:
    engine = find_engine(APP, BASE)
    chat = PromptFormat(kind="chat", answer_kind="json", max_prompt_tokens=200)
    free = {"messages": [{"role": "user", "content": "put the lamp on high"}]}
    allowed = [{"device": device, "level": level} for device in ("lamp", "fan") for level in ("low", "high")]
    fields = {"device": {"enum": ["lamp", "fan"]}, "level": {"enum": ["low", "high"]}}
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}

    tool = {"name": "set", "parameters": schema, "strict": True}

    async def answer(schema: dict[str, Any] | None) -> str:
        form = {"response_format": {"type": "json_schema", "json_schema": {"name": "command", "schema": schema}}}
        return (await engine.answer(None, chat, {**free, **(form if schema else {})}, 60)).text

    async def scenario() -> None:
        # A base that never saw a chat: what it says by itself is no JSON of that kind.
        unheld = await answer(None)
        assert unheld not in map(json.dumps, allowed)
        assert json.loads(await answer(schema)) in allowed
        assert await answer({"type": "no type of JSON"}) == unheld
        # What one backend of vLLM cannot hold an answer to goes to no other one, which would then be asked all that follows.
        assert await answer({"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 3}}}) == unheld
        calls = chat.model_copy(update={"answer_kind": "tool_call"})
        said = await engine.answer(None, calls, {**free, "tools": [{"type": "function", "function": tool}]}, 60)
        (call,) = said.message["tool_calls"] if said.message else ()
        assert json.loads(call["function"]["arguments"]) in allowed and call["function"]["name"] == "set"

    asyncio.run(scenario())


def test_an_unknown_call_goes_to_the_llm(endpoint: Endpoint) -> None:
    reply = endpoint.client.chat.completions.with_raw_response.create(model=LLM, messages=UNKNOWN)
    assert reply.headers["x-understudy-route"] == "llm"
    assert "x-understudy-specialist" not in reply.headers
    assert reply.parse().model == LLM
    assert _captured(endpoint, reply.headers["x-understudy-call-id"]).served_by == "llm"


def test_the_stream_of_the_llm_passes_through_and_is_captured_whole(endpoint: Endpoint) -> None:
    with endpoint.client.chat.completions.with_streaming_response.create(
        model=LLM, messages=UNKNOWN, stream=True
    ) as reply:
        chunks = list(reply.parse())
        headers = reply.headers
    assert headers["x-understudy-route"] == "llm"
    assert len(chunks) > 2, "the LLM's answer came in one piece"
    message = _captured(endpoint, headers["x-understudy-call-id"]).message
    assert message is not None and message["content"] == _joined(chunks) != ""


def test_tool_calls_pass_through(endpoint: Endpoint) -> None:
    reply = endpoint.client.chat.completions.with_raw_response.create(**TOOL_REQUEST)
    choice = reply.parse().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    function = choice.message.tool_calls[0].function
    assert (function.name, function.arguments) == ("lookup_order", '{"order_id":"AB-12345"}')
    message = _captured(endpoint, reply.headers["x-understudy-call-id"]).message
    assert message is not None and message["tool_calls"][0]["function"]["name"] == "lookup_order"


def test_streamed_tool_calls_are_captured_as_one(endpoint: Endpoint) -> None:
    with endpoint.client.chat.completions.with_streaming_response.create(stream=True, **TOOL_REQUEST) as reply:
        chunks = list(reply.parse())
        headers = reply.headers
    pieces = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert "".join(piece.function.arguments or "" for piece in pieces) == '{"order_id":"AB-12345"}'
    message = _captured(endpoint, headers["x-understudy-call-id"]).message
    assert message is not None
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"order_id":"AB-12345"}']


def test_models_of_the_llm_and_the_specialists_are_listed(endpoint: Endpoint) -> None:
    assert {LLM, f"understudy/{TASK}"} <= {model.id for model in endpoint.client.models.list()}


def test_a_trace_goes_from_the_client_through_the_gateway_into_the_engine_s_replica(
    endpoint: Endpoint, toy: Any
) -> None:
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
    endpoint.client.chat.completions.create(model=LLM, extra_headers=headers, **toy.examples[0].request)
    name, deadline = f"chat {endpoint.specialist.adapter}", time.monotonic() + CAPTURE_TIMEOUT_S
    while len(seen := [one for one in endpoint.traces.spans if one.trace_id == trace_id]) < 4:
        assert time.monotonic() < deadline, [one.name for one in seen]
        time.sleep(0.1)
    (root,) = (one for one in seen if one.kind == "server" and one.service == "understudy-gateway")
    (asked,) = (one for one in seen if one.name == name and one.kind == "client")
    (answered,) = (one for one in seen if one.name == name and one.service == "understudy-specialist")
    assert root.parent_id == parent_id and asked.parent_id == root.span_id and answered.parent_id == asked.span_id
    assert answered.facts["gen_ai.usage.output_tokens"] > 0 and root.facts["understudy.action"] == "accept"


def test_the_page_and_what_it_shows_come_through_serve(endpoint: Endpoint) -> None:
    keys = ApiKeys(keys_folder(endpoint.store.uri) / KEYS_FILE)
    base = str(endpoint.client.base_url).removesuffix("/v1/")
    with httpx.Client(base_url=base, headers={"authorization": f"Bearer {keys.create('ann', 'viewer')}"}) as viewer:
        assert "<title>Understudy</title>" in viewer.get("/").text
        assert viewer.get("/status/page.js").headers["content-type"].startswith("text/javascript")
        facts = viewer.get("/status/overview").json()
        assert facts["release"] == facts["here"]["release"] == endpoint.release
        assert [(task["task_id"], task["state"]) for task in facts["tasks"]] == [(TASK, "live")]
        assert viewer.get("/status/live").json()["decisions"] and viewer.get(f"/status/tasks/{TASK}").json()["gate"]
        assert viewer.post("/status/freeze", json={}).status_code == 403
    agent = {"authorization": f"Bearer {endpoint.client.api_key}"}
    assert httpx.get(f"{base}/status/overview", headers=agent).status_code == 403


def test_no_replica_listens_beyond_this_machine(endpoint: Endpoint) -> None:
    replicas = [one for one in psutil.process_iter(["name"]) if one.info["name"].startswith("ray::ServeRep")]
    heard = [conn.laddr.ip for one in replicas for conn in one.net_connections("inet") if conn.status == "LISTEN"]
    assert len(replicas) >= 3 and len(heard) >= 3, "gateway, steward, engine"
    assert all(ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in heard), heard


def test_a_wrong_key_is_turned_away(endpoint: Endpoint) -> None:
    with pytest.raises(openai.AuthenticationError):
        endpoint.client.with_options(api_key="us-wrong").chat.completions.create(model=LLM, messages=UNKNOWN)


def test_paths_of_the_allow_list_reach_the_llm_and_others_do_not(endpoint: Endpoint) -> None:
    # The scripted LLM has no embeddings: its own 404, and not the gateway's.
    with pytest.raises(openai.NotFoundError) as passed:
        endpoint.client.embeddings.create(model=LLM, input="x")
    assert "gateway.passthrough" not in str(passed.value)
    with pytest.raises(openai.NotFoundError, match="gateway.passthrough"):
        endpoint.client.files.list()


def test_feedback_becomes_the_outcome_of_its_call(endpoint: Endpoint) -> None:
    reply = endpoint.client.chat.completions.with_raw_response.create(model=LLM, messages=UNKNOWN)
    call = _captured(endpoint, reply.headers["x-understudy-call-id"])
    taken = endpoint.client.post("/feedback", body={"call_id": call.call_id, "score": 0.25}, cast_to=httpx.Response)
    assert taken.status_code == 202
    deadline = time.monotonic() + CAPTURE_TIMEOUT_S
    while (outcome := read_outcomes(endpoint.store).of(call)) is None:
        assert time.monotonic() < deadline, "the feedback was not stored"
        time.sleep(0.2)
    assert outcome == {"score": 0.25}


def test_a_first_release_of_merged_weights_is_served_by_a_graph_that_was_started_before_it(
    endpoint: Endpoint, toy: Any
) -> None:
    """The last one here: it leaves another graph than it found."""
    from ray import serve

    store, first = endpoint.store, endpoint.specialist
    merged = publish_merged(store, TASK, BASE, ADAPTER)
    fingerprint = fingerprint_of(store.manifest(merged)["sha256"], SPECIALISTS, "merged")
    gate = first.gate.model_copy(update={"fingerprint": fingerprint})
    specialist = first.model_copy(update={"merged": merged, "gate": gate, "sha": content_hash([merged, fingerprint])})
    release = Release(specialists={TASK: specialist}, refused={}, route_model=ROUTES, snapshot="toy", created_ts=1.0)

    def ask(example: Any) -> tuple[str, str]:
        reply = endpoint.client.chat.completions.with_raw_response.create(model=LLM, **example.request)
        return reply.headers["x-understudy-route"], str(reply.parse().choices[0].message.content)

    serve.delete(APP)
    pathlib.Path(store.uri, registry.CURRENT).unlink()
    serve.run(build(endpoint.args), name=APP, route_prefix="/")
    assert ask(toy.examples[0])[0] == "llm"
    sha, app = registry.publish_release(store, release), engine_app(store.uri, merged)
    registry.promote(store, sha)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while ask(toy.examples[0])[0] == "llm":
        assert time.monotonic() < deadline, "no engine was started for it"
        time.sleep(0.2)
    assert [ask(example) for example in toy.examples] == [("accept", one.target["content"]) for one in toy.examples]
    empty = release.model_copy(update={"specialists": {}})
    registry.promote(store, registry.publish_release(store, empty))
    _wait_for_release(endpoint.client, str(registry.current_sha(store)))
    assert app in serve.status().applications, "a rollback would serve it again"
    ServeApps(store.uri, SPECIALISTS, NO_TELEMETRY).end(app)
    while app in ServeApps(store.uri, SPECIALISTS, NO_TELEMETRY).states():
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.2)


@contextlib.contextmanager
def _collector() -> Iterator[Collector]:
    with background_loop() as loop:
        context = listening()
        found = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10)
        try:
            yield found
        finally:
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)


def _publish(store: Store, toy: Any, folder: pathlib.Path) -> tuple[str, Specialist]:
    """Teach a base the toy's answers, train an adapter on it on Ray Train; promote a release that accepts them all."""
    base = folder / "base"
    shutil.copytree(toy.base_path, base)
    teach(base, toy.rows_path, toy.tokenizer.pad_token_id, num_steps=120)
    toy.tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").write_text("{% for one in messages %}{{ one.content }}{% endfor %}<|answer|>")
    paths = {"train_path": toy.rows_path, "validation_path": None, "pad_token_id": toy.tokenizer.pad_token_id}
    tune = FinetuneConfig(num_steps=10, batch_size=12, warmup_steps=2, checkpoint_every=10, learning_rate=1e-4)
    adapter, _ = finetune("adapter", tune, base_path=base, storage=folder / "runs", **paths)
    (adapter / "README.md").unlink(missing_ok=True)
    base_sha = store.publish(BASE, base, {"kind": "test"})["sha256"]
    adapter_sha = store.publish(ADAPTER, adapter, {"kind": "test"})["sha256"]
    specialist = _specialist(toy, fingerprint_of(base_sha, SPECIALISTS), adapter_sha)
    routes = {signature_of(example.request): TASK for example in toy.examples}
    RouteModel(routes, {}).save(store, ROUTES)
    release = Release(
        specialists={TASK: specialist}, refused={}, route_model=ROUTES, snapshot="toy", created_ts=time.time()
    )
    sha = registry.publish_release(store, release)
    registry.promote(store, sha)
    return sha, specialist


def _specialist(toy: Any, fingerprint: str, adapter_sha: str) -> Specialist:
    gate = Gate(
        reference="llm",
        population="calls of this task as served",
        epsilon=0.05,
        delta=0.05,
        threshold=0.0,
        num_calibration=100,
        num_accepted=100,
        num_disagreements=0,
        upper_bound=0.03,
        coverage=1.0,
        fingerprint=fingerprint,
    )
    return Specialist(
        task_id=TASK,
        sha=content_hash([adapter_sha, fingerprint]),
        base=BASE,
        adapter=ADAPTER,
        prompt_format=toy.prompt_format.model_dump(mode="json"),
        gate=gate,
        report=f"{ADAPTER}/report.json",
        max_answer_tokens=toy.max_answer_tokens,
    )


def _start_llm() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "jobs.demo.llm", "--port", "0", "--latency-scale", "0"]
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def _wait_for_release(client: openai.OpenAI, release: str) -> None:
    """The gateway may be up before its engine has the adapter; until then it names no release."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        reply = client.chat.completions.with_raw_response.create(model=LLM, messages=UNKNOWN)
        if reply.headers.get("x-understudy-release") == release:
            return
        assert time.monotonic() < deadline, "the gateway did not take up the release"
        time.sleep(0.5)


def _captured(endpoint: Endpoint, call_id: str) -> AgentCall:
    """The stored call; capture writes at most a second later, and exactly one row."""
    deadline = time.monotonic() + CAPTURE_TIMEOUT_S
    while not (calls := read_calls(endpoint.store, {call_id})):
        assert time.monotonic() < deadline, f"call {call_id} was not captured"
        time.sleep(0.2)
    (call,) = calls
    return call


def _joined(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
