"""Bases from local folders: a measured probe chooses one on real Ray Tune, and its chat format trains."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from fakes import FakeEngine
from teaching import teach

from cluster.calls import write_calls
from cluster.config import validate
from cluster.records import AgentCall, Example, TaskSpec
from cluster.store import Store
from jobs.convert import convert
from jobs.recipe import Recipe
from training.bases import open_base, publish_loaded_base
from training.candidates import Scope
from training.dataset import save_dataset, tokenise_tasks
from training.finetune import FinetuneConfig
from training.scratch import PretrainConfig
from training.selection import SelectConfig, select_base

pytestmark = pytest.mark.integration

SYSTEM = "Turn the command into JSON with device and level."
DEVICES, LEVELS = ("lamp", "heater", "fan", "radio"), ("low", "medium", "high")
TASK, ABSENT = "command", "no-such-org/no-such-model"
WINDOW = 512
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FINETUNE = FinetuneConfig(num_steps=40, batch_size=12, warmup_steps=3, checkpoint_every=40, learning_rate=2e-3)


class Folders(NamedTuple):
    """Bases as a user would have them."""

    able: str
    """Knows the task already."""
    large: str
    """Larger, and knows nothing."""
    broken: str
    """Its weights are missing."""


@pytest.fixture(scope="module")
def folders(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("bases")
    tokenizer = _tokenizer(toy.examples)
    able, large, broken = root / "able", root / "large", root / "broken"
    _write_base(able, tokenizer, layers=2)
    _write_base(large, tokenizer, layers=4)
    _teach(able, toy.examples)
    # A published sampling setting that contradicts itself; save_pretrained would refuse it.
    (able / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    shutil.copytree(able, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    return Folders(str(able), str(large), str(broken))


@pytest.fixture
def scope(toy: Any) -> Scope:
    examples = {TASK: toy.examples}
    return Scope(
        tasks=[_task(toy.examples)],
        by_split={"train": examples, "validation": examples},
        max_model_tokens=WINDOW,
        max_prompt_tokens=WINDOW * 3 // 4,
        machine_gib=6.0,
    )


def test_the_smallest_good_enough_candidate_is_chosen_and_the_others_are_recorded(
    ray_cluster: None, folders: Folders, scope: Scope, tmp_path: pathlib.Path
) -> None:
    names = (folders.large, ABSENT, "qwen3-8b", folders.broken, folders.able, "scratch-tiny")
    config = validate(SelectConfig, {"candidates": names, "probe_steps": 8, "probe_examples": 12})
    store = Store(str(tmp_path / "store"))
    chosen = select_base(store, "one", config, scope, PretrainConfig(), FINETUNE, tmp_path / "work")

    assert chosen.base == folders.able and not chosen.is_scratch
    found = {one.name: one for one in chosen.candidates}
    assert tuple(found) == names
    assert {name: one.status for name, one in found.items()} == {
        folders.able: "chosen",
        folders.large: "measured",
        "scratch-tiny": "measured",
        ABSENT: "unavailable",
        folders.broken: "unavailable",
        "qwen3-8b": "rejected",
    }
    assert "cannot be loaded" in found[ABSENT].reason
    assert found[folders.broken].reason.startswith("probe failed: ") and "OSError" in found[folders.broken].reason, (
        found[folders.broken].reason
    )
    assert "> budget 2.000 GiB" in found["qwen3-8b"].reason
    able = found[folders.able]
    assert [rung.num_steps for rung in able.rungs] == [0, 2, 4, 8]
    assert able.rungs[0].score == able.rungs[-1].score == 1.0 == able.rungs[-1].task_scores[TASK]
    assert able.few_shot is not None and able.few_shot.num_shots == {TASK: 4} and able.few_shot.score > 0
    assert found["scratch-tiny"].few_shot is None
    assert found[folders.large].rungs[0].score == found["scratch-tiny"].rungs[0].score == 0.0
    assert store.read_json("tasks/selection-one.json") == chosen.model_dump(mode="json")
    again = select_base(store, "one", config, scope, PretrainConfig(), FINETUNE, tmp_path / "elsewhere")
    assert again == chosen and not (tmp_path / "elsewhere").exists(), "it was measured twice"


def test_a_grid_of_ranks_and_examples_foretells_the_full_training(
    ray_cluster: None, folders: Folders, scope: Scope, tmp_path: pathlib.Path
) -> None:
    sizes = {"ranks": (2, 4), "example_counts": (6, 12), "probe_steps": 8, "probe_examples": 12}
    config = validate(SelectConfig, {"candidates": (folders.able, "scratch-micro"), "target": 0.9, "shots": 0, **sizes})
    said: list[str] = []
    store = Store(str(tmp_path / "store"))
    chosen = select_base(store, "one", config, scope, PretrainConfig(), FINETUNE, tmp_path / "work", said.append)

    assert (chosen.base, chosen.lora_rank) == (folders.able, 2)
    assert chosen.rule == "after 8 steps: the smallest that reaches the target 0.9"
    able, micro = chosen.candidates
    assert len(able.probes) == 4 and [probe.lora_rank for probe in micro.probes] == [None, None]
    assert said[0] == f"select: {chosen.budget}" and said[0].startswith("select: 6 probes of 2 bases, at most 8 steps")
    assert chosen.forecast is not None and chosen.forecast.unit == "examples"
    assert [point.size for point in chosen.forecast.tasks[0].points] == [6.0, 12.0]
    assert "agreement" in said[1] and "cost unknown" in said[1]


def test_a_probe_may_take_several_workers(
    ray_cluster: None, folders: Folders, scope: Scope, tmp_path: pathlib.Path
) -> None:
    config = validate(SelectConfig, {"candidates": (folders.able,), "probe_steps": 4, "probe_examples": 12})
    finetune = FINETUNE.model_copy(update={"num_workers": 2, "zero_stage": 2})
    store = Store(str(tmp_path / "store"))
    chosen = select_base(store, "one", config, scope, PretrainConfig(), finetune, tmp_path / "work")
    assert [(rung.num_steps, rung.score) for rung in chosen.candidates[0].rungs] == [(k, 1.0) for k in (0, 1, 2, 4)]
    import ray

    # What a probe leaves reserved would stop every later training.
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.util.placement_group_table()
        time.sleep(0.2)


def test_a_conversion_on_a_base_from_a_folder_trains_its_chat_format_and_publishes_it(
    ray_cluster: None, folders: Folders, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"))
    write_calls(store, [_call(number) for number in range(240)])
    learned: list[list[dict[str, Any]]] = []

    def save(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
        learned.append(rows)
        save_dataset(rows, path)

    monkeypatch.setattr("jobs.adapters.save_dataset", save)
    select = {"base": folders.large}
    settings = {"store": store.uri, "select": select, "specialists": {"max_model_tokens": WINDOW}}
    settings["gate"] = {"epsilon": 0.2, "delta": 0.2}  # 60 calibration calls can certify this
    recipe = validate(Recipe, {**settings, "finetune": FINETUNE.model_dump()})
    said: list[str] = []

    @contextlib.contextmanager
    def engine_of(base: str) -> Iterator[FakeEngine]:
        yield FakeEngine(text="{}")

    conversion = convert(recipe, say=said.append, engine_of=engine_of)
    (task,) = conversion.tasks
    (candidate,) = conversion.selection.candidates
    assert (conversion.selection.base, conversion.selection.arm) == (folders.large, "untrained base")
    assert candidate.p99_prompt_tokens > 0 and not candidate.is_p99_estimated
    assert store.read_json(f"tasks/selection-{conversion.snapshot}.json")["candidates"][0]["status"] == "chosen"
    curve = [point["loss"] for point in conversion.losses[task.task_id]["curve"]]
    assert curve[-1] < 0.7 * curve[0]

    (base,) = {path.rsplit("/", 1)[0] for path in store.list("bases") if path.endswith("manifest.json")}
    assert base == publish_loaded_base(store, folders.large) and base.startswith("bases/large-")
    assert not list(pathlib.Path(store.uri).glob("work/*/train")), "what was learned from still lies about"
    text = open_base(str(store.fetch(base, tmp_path))).tokenizer.decode(learned[0][0]["input_ids"])
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>") and text.endswith('"}<|im_end|>')
    assert any(path.endswith("adapter_model.safetensors") for path in store.list(f"adapters/{task.task_id}"))


def test_an_edited_folder_is_a_new_base(folders: Folders, tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    first = publish_loaded_base(store, folders.able)
    saved = store.fetch(first, tmp_path / "cache")
    assert "temperature" not in json.loads((saved / "generation_config.json").read_text())
    config = saved / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-4}))
    assert publish_loaded_base(store, str(saved)) != first


def _call(number: int) -> AgentCall:
    device, level = DEVICES[number % 4], LEVELS[number // 4 % 3]
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Please put the {device} on {level} for {number} minutes"},
    ]
    answer = {"role": "assistant", "content": f'{{"device":"{device}","level":"{level}"}}'}
    return AgentCall(
        call_id=f"call-{number}",
        ts=float(number),
        client_id="client",
        agent="home",
        session_id=f"session-{number}",
        step=0,
        request={"messages": messages, "response_format": {"type": "json_object"}},
        response={"choices": [{"message": answer, "finish_reason": "stop"}]},
    )


def _task(examples: list[Example]) -> TaskSpec:
    return TaskSpec(
        task_id=TASK,
        name="put device on level",
        signature="s",
        kind="json",
        reference="llm",
        num_calls=len(examples),
        share_calls=1.0,
        share_cost=1.0,
        num_examples={"train": len(examples)},
        static_lines=(examples[0].request["messages"][0]["content"],),
    )


def _tokenizer(examples: list[Example]) -> Any:
    """A byte-level BPE with chat marks of its own and, as with many published ones, no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [message["content"] for e in examples for message in (*e.request["messages"], e.target)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=marks[1], chat_template=TEMPLATE)


def _write_base(folder: pathlib.Path, tokenizer: Any, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16 if layers > 2 else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _teach(folder: pathlib.Path, examples: list[Example]) -> None:
    """Train the base on the task so that its zero-shot answers are right."""
    base = open_base(str(folder))
    data = tokenise_tasks(
        [_task(examples)], {TASK: examples}, {TASK: []}, base.tokenizer, is_scratch=False, max_prompt_tokens=WINDOW
    )
    save_dataset(data[TASK].train, folder.parent / "rows")
    teach(folder, folder.parent / "rows", base.tokenizer.pad_token_id, num_steps=120)
