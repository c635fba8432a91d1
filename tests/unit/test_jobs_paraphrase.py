"""Paraphrasing by the LLM node: a real endpoint on loopback rewords what a recipe asks for, and answers survive."""

from __future__ import annotations

import http.server
import json
import pathlib
import threading
from collections.abc import Iterator

import pytest

from cluster.calls import write_calls
from cluster.config import validate
from cluster.errors import ConfigError
from cluster.records import AgentCall
from cluster.store import Store
from cluster.upstream import UpstreamConfig
from jobs.paraphrase import LLMParaphrase, paraphrase_of
from jobs.recipe import Recipe
from training.curate import CurateConfig, curate
from training.redact import RedactConfig
from training.snapshot import load_split
from training.splits import SplitConfig, learned_split_of

SPLIT = SplitConfig(train=0.9, validation=0.04, calibration=0.03, test=0.03, test_by="hash")
SESSION = next(f"s{n}" for n in range(99) if learned_split_of(f"s{n}", SPLIT) == "train")


class _Rewords(http.server.BaseHTTPRequestHandler):
    """An LLM that changes every word but the last."""

    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        reply = {"choices": [{"message": {"role": "assistant", "content": f"Reworded, about {text.split()[-1]}"}}]}
        data = json.dumps(reply).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[UpstreamConfig]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Rewords)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield validate(
        UpstreamConfig, {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "max_attempts": 1}
    )
    server.shutdown()
    thread.join()
    server.server_close()
    _Rewords.status = 200


def _curated(tmp_path: pathlib.Path, endpoint: UpstreamConfig, answer: str) -> tuple[str, str, dict[str, int]]:
    """What train says after curation: the user's text, the answer, and how passages fared."""
    store = Store(str(tmp_path / "store"))
    said = "Hello, my name is Zelda Quimby and I want order-4711"
    call = AgentCall(
        call_id="c", ts=1.7e9, client_id="p", agent="a", session_id=SESSION, step=0,
        request={"messages": [{"role": "user", "content": said}]},
        response={"choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]},
    )  # fmt: skip
    write_calls(store, [call])
    config = CurateConfig(split=SPLIT, redact=RedactConfig(paraphrase=True))
    snapshot = curate(store, config, paraphrase=LLMParaphrase(endpoint))
    (example,) = load_split(store, snapshot.id, "train", as_served=False)
    return example.request["messages"][0]["content"], example.target["content"], snapshot.counts.paraphrased


def test_a_structured_answer_survives_and_the_passage_is_reworded(tmp_path, endpoint):
    said, answer, counts = _curated(tmp_path, endpoint, '{"order": "order-4711"}')
    assert said == "Reworded, about order-4711" and json.loads(answer) == {"order": "order-4711"}
    assert counts == {"reworded": 1}


def test_a_rewording_that_loses_what_is_copied_is_not_taken(tmp_path, endpoint):
    said, answer, counts = _curated(tmp_path, endpoint, '{"wish": "I want order-4711"}')
    assert said.endswith("and I want order-4711") and "Zelda" not in said and counts == {"kept": 1}
    assert json.loads(answer) == {"wish": "I want order-4711"}


def test_an_llm_that_fails_leaves_the_text_as_it_was(tmp_path, endpoint):
    _Rewords.status = 500
    said, _, counts = _curated(tmp_path, endpoint, '{"order": "order-4711"}')
    assert said.endswith("and I want order-4711") and counts == {"kept": 1}


def test_nothing_is_reworded_unless_asked_for():
    assert paraphrase_of(Recipe()) is None


@pytest.mark.parametrize("upstream", [(), ({"base_url": "http://127.0.0.1:9/v1"},)])
def test_without_a_model_to_ask_it_is_refused_before_any_work(upstream):
    recipe = validate(Recipe, {"upstream": upstream, "curate": {"redact": {"paraphrase": True}}})
    with pytest.raises(ConfigError, match="next: upstream.0"):
        paraphrase_of(recipe)
