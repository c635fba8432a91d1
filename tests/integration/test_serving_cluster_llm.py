"""A model served on the cluster as the LLM node, behind a dead endpoint, asked over HTTP by the official client.

The model is made from scratch here and untrained: what it says means nothing, how it is said and captured is tested.
"""

from __future__ import annotations

import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import openai
import pytest

from cluster.calls import read_calls
from cluster.records import AgentCall
from cluster.store import Store
from serving.app import ServeArgs, build
from serving.policy import LLM_MODEL

pytestmark = pytest.mark.integration

APP, MODEL = "test-cluster-llm", "made-from-scratch"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MESSAGES = [{"role": "user", "content": "Please put the lamp on low now"}]
NUM_TOKENS, MAX_MODEL_TOKENS, TIMEOUT_S = 6, 256, 60.0
DEAD = {"base_url": "http://127.0.0.1:9/v1", "max_attempts": 1, "breaker_reset_s": 600.0, "breaker_failures": 1}
ASKED: dict[str, Any] = {"model": "gpt-x", "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0.0}
WHOLE = {"extra_body": {"ignore_eos": True}}
"""An untrained model may end at once; this way every answer has NUM_TOKENS tokens."""


class Endpoint(NamedTuple):
    """A running gateway and where it captures."""

    client: openai.OpenAI
    store: Store


@pytest.fixture(scope="module")
def endpoint(serve_port: int, toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from ray import serve

    folder = tmp_path_factory.mktemp("cluster-llm")
    store = Store(str(folder / "store"))
    model = {
        "cluster_model": str(_chat_model(toy, folder / "model")),
        "name": MODEL,
        "dtype": "float32",
        "max_model_tokens": MAX_MODEL_TOKENS,
        "max_num_seqs": 4,
        "prompt_usd_per_million": 1.0,
        "completion_usd_per_million": 2.0,
    }
    args = {"store": store.uri, "upstream": [DEAD, model], "gateway": {"auth": "open"}}
    try:
        serve.run(build(ServeArgs.model_validate(args)), name=APP, route_prefix="/")
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{serve_port}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        ) as client:
            yield Endpoint(client, store)
    finally:
        serve.delete(APP)


def test_a_whole_answer_comes_from_the_cluster_and_is_captured(endpoint: Endpoint) -> None:
    reply = endpoint.client.chat.completions.with_raw_response.create(**ASKED, **WHOLE)
    completion = reply.parse()
    assert completion.model == MODEL and completion.choices[0].finish_reason == "length"
    assert completion.usage is not None and completion.usage.completion_tokens == NUM_TOKENS
    call = _captured(endpoint.store, reply.headers["x-understudy-call-id"])
    assert (call.served_by, call.status, call.usage.completion_tokens) == ("llm", 200, NUM_TOKENS)
    assert call.request["model"] == "gpt-x" and call.response is not None and call.response["model"] == MODEL
    assert call.message is not None and call.message["content"] == completion.choices[0].message.content
    assert call.cost_usd == pytest.approx((completion.usage.prompt_tokens + 2 * NUM_TOKENS) / 1e6)


def test_a_stream_comes_in_pieces_and_is_captured_as_the_whole_answer_would_be(endpoint: Endpoint) -> None:
    whole = endpoint.client.chat.completions.create(**ASKED, **WHOLE)
    with endpoint.client.chat.completions.with_streaming_response.create(
        **ASKED, **WHOLE, stream=True, stream_options={"include_usage": True}
    ) as reply:
        chunks = list(reply.parse())
        headers = reply.headers
    assert len(chunks) > 2, "the answer came in one piece"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == NUM_TOKENS
    call = _captured(endpoint.store, headers["x-understudy-call-id"])
    assert call.message is not None and call.message["content"] == text
    assert call.status == 200 and call.usage.completion_tokens == NUM_TOKENS and call.cost_usd


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_the_model_refuses_is_the_clients_error(endpoint: Endpoint, is_stream: bool) -> None:
    long = [{"role": "user", "content": "lamp " * 2 * MAX_MODEL_TOKENS}]
    with pytest.raises(openai.BadRequestError) as caught:
        endpoint.client.chat.completions.create(**{**ASKED, "messages": long}, stream=is_stream)
    call = _captured(endpoint.store, caught.value.response.headers["x-understudy-call-id"])
    assert (call.status, call.response) == (400, None)


def test_the_model_is_listed(endpoint: Endpoint) -> None:
    assert [model.id for model in endpoint.client.models.list()] == [MODEL, LLM_MODEL]


def _chat_model(toy: Any, folder: pathlib.Path) -> pathlib.Path:
    """The toy's untrained base with a chat template."""
    shutil.copytree(toy.base_path, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def _captured(store: Store, call_id: str) -> AgentCall:
    """The stored call; capture writes at most a second later."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (calls := read_calls(store, {call_id})):
        assert time.monotonic() < deadline, f"call {call_id} was not captured"
        time.sleep(0.2)
    (call,) = calls
    return call
