"""One local Ray for all integration tests, and one tiny base of a made-up task: utterance -> JSON.

The environment is set before Ray starts, because its processes inherit it then and not later.
"""

from __future__ import annotations

import pathlib
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from cluster.prompts import PromptFormat
from cluster.records import Example
from cluster.session import connect
from training.catalog import load_catalog
from training.dataset import build_task_data, num_answer_tokens, save_dataset
from training.scratch import init_model, texts_of, train_tokenizer

SYSTEM = "Turn the command into JSON with device and level."
DEVICES = ("lamp", "heater", "fan", "radio")
LEVELS = ("low", "medium", "high")
SEED = 3


THIRD_PARTY_WARNINGS = (
    # Ray Data's context, which Ray Train builds, sets its own deprecated fields while it is constructed.
    "ignore:`use_push_based_shuffle` is deprecated:DeprecationWarning",
    "ignore:`use_polars` is deprecated:DeprecationWarning",
    "ignore:`use_arrow_tensor_v2` is deprecated:DeprecationWarning",
    # Ray Serve's config classes give pydantic keywords in a way of pydantic 1.
    "ignore:Using extra keyword arguments on `Field` is deprecated:pydantic.warnings.PydanticDeprecatedSince20",
    # Imported by the engine; torch's own use of its old compiler.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every warning stays an error but those above, which Ray gives and this project cannot mend."""
    here = pathlib.Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for one in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(one))


class Toy(NamedTuple):
    """The task, an untrained base for it, and its tokenised examples."""

    examples: list[Example]
    prompt_format: PromptFormat
    tokenizer: Any
    base_path: pathlib.Path
    rows_path: pathlib.Path
    max_answer_tokens: int


@pytest.fixture(scope="session")
def extensions_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where torch would put what DeepSpeed compiles; named in the environment of every Ray process."""
    return tmp_path_factory.mktemp("torch_extensions")


@pytest.fixture(scope="session")
def ray_cluster(extensions_dir: pathlib.Path) -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        # Niceness 15, Ray's default, starves its workers beside any other process.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_TRAIN_V2_ENABLED", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        # Serve tells after half a minute that a replica finds no room; here sooner.
        patch.setenv("SERVE_SLOW_STARTUP_WARNING_S", "3")
        patch.setenv("SERVE_SLOW_STARTUP_WARNING_PERIOD_S", "3")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions_dir))
        connect(num_cpus=2)
        yield
        from ray import serve

        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="session")
def serve_port(ray_cluster: None) -> int:
    """The one port of Serve's proxy, which every app takes its turn on."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return port


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    examples = [_example(device, level) for device in DEVICES for level in LEVELS]
    prompt_format = PromptFormat(kind="compact", answer_kind="json", static_lines=(SYSTEM,), max_prompt_tokens=200)
    entry = load_catalog().get("scratch-tiny")
    tokenizer = train_tokenizer(texts_of(examples, prompt_format.static_lines), entry.vocab_size)
    init_model(entry, tokenizer, folder / "base", SEED)
    data = build_task_data(examples, [], prompt_format, tokenizer)
    assert data.num_skipped == 0
    save_dataset(data.train, folder / "rows")
    longest = max(map(num_answer_tokens, data.train))
    return Toy(examples, data.prompt_format, tokenizer, folder / "base", folder / "rows", 2 * longest)


def _example(device: str, level: str) -> Example:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Please put the {device} on {level} now"},
    ]
    return Example(
        example_id=f"{device}-{level}",
        split="train",
        session_id=f"{device}-{level}",
        ts=1.0,
        request={"messages": messages, "response_format": {"type": "json_object"}},
        target={"role": "assistant", "content": f'{{"device":"{device}","level":"{level}"}}'},
        reference="llm",
        source_call_ids=(f"{device}-{level}",),
    )
