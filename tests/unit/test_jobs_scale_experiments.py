"""What experiments conclude from worlds whose law is known, and what one cell does with a model of a few steps."""

from __future__ import annotations

import asyncio
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from cluster.records import Example, TaskSpec
from jobs.recipe import load_recipe
from jobs.scale import data, fleet, model, rank, serve, tasks
from jobs.scale.cells import Cell, Measured
from jobs.scale.laboratory import Laboratory
from jobs.scale.material import Material, save_material
from jobs.scale.trial import NUMBERS_FILE, Workbench, train_cell
from training.catalog import find_entry
from training.scratch import init_model, train_tokenizer

NUM_TEST = 400
Error = Callable[[Mapping[str, Any], str], float]


class World(Laboratory):
    """A laboratory whose trainings are wrong as often as a law says."""

    error: Error

    def train(
        self, experiment: str, material: Sequence[Material], parameters: Sequence[Mapping[str, Any]]
    ) -> list[Measured]:
        rng = np.random.default_rng(0)
        found = []
        for one in parameters:
            facts = {}
            for task_id in one["tasks"]:
                right = "".join("01"[rng.random() > self.error(one, task_id)] for _ in range(NUM_TEST))
                facts[task_id] = {
                    "right": right,
                    "kept": right,
                    "refused": "",
                    "agreement": right.count("1") / NUM_TEST,
                }
            size = one["base"]["hidden_size"] ** 2 if isinstance(one["base"], dict) else 1
            result = {"tasks": facts, "parameters": size, "steps": one["steps"], "seconds": 1.0, "cpu_seconds": 1.0}
            found.append(Measured(Cell(experiment=experiment, parameters=dict(one), code="", data=""), result))
        return found


def make_task(name: str, count: int = 6000, kind: str = "json") -> Material:
    examples = [make_example(f"{name}{number}", number) for number in range(count)]
    spec = TaskSpec(
        task_id=name, name=name, signature=name, kind=kind, reference="gold", num_calls=count, share_calls=1.0,
        share_cost=1.0, num_examples={"train": count}, static_lines=("Turn the command into JSON.",),
    )  # fmt: skip
    held_out = examples[:80]
    return Material(spec, "", {"train": examples, "validation": held_out, "calibration": held_out, "test": held_out})


def make_example(name: str, number: int) -> Example:
    device, level = ("lamp", "fan", "radio")[number % 3], ("low", "high")[number % 2]
    messages = [
        {"role": "system", "content": "Turn the command into JSON."},
        {"role": "user", "content": f"put the {device} on {level}"},
    ]
    target = {"role": "assistant", "content": json.dumps({"device": device, "level": level})}
    return Example(
        example_id=name, split="train", session_id=name, ts=1.0, request={"messages": messages}, target=target,
        reference="gold", source_call_ids=(name,),
    )  # fmt: skip


def world(tmp_path: pathlib.Path, error: Error, *material: Material, size: str = "small") -> World:
    """The laboratory of `error`, in which examples are read by nobody."""
    recipe = load_recipe([f"store={tmp_path / 'store'}", "select.base=scratch-micro"])
    lab = World(recipe, tmp_path, size, lambda: material, lambda one: (tmp_path, "data"), lambda line: None)
    type(lab).error = staticmethod(error)
    return lab


def test_data_finds_the_power_and_where_the_data_stops(tmp_path: pathlib.Path) -> None:
    lab = world(tmp_path, lambda one, task: 0.8 * (one["examples"] / 50) ** -0.5, make_task("a"), make_task("b"))
    found = data.run(lab)
    for task in ("a", "b"):
        law = found.laws[task]["agreement"]["law"]
        assert law["rates"][0] == pytest.approx(0.5, abs=0.12)
        nine = found.laws[task]["agreement"]["needed"][1]
        assert nine["is_measured"] and nine["size"] == pytest.approx(50 * 64, rel=0.35)
        assert nine["low"] < nine["size"] < nine["high"]
    assert "2 of 2 tasks reach 90% agreement within the data" in found.sentence
    assert "the data stops at 6,000 examples, below the rule of thumb's 10,000" in found.sentence
    beyond = [note for note in found.notes if note.startswith("a: agreement of 95%")]
    assert len(beyond) == 1 and "beyond the 6,000 that there are" in beyond[0]
    assert len(found.pictures) == 2 and len(found.records) == len(found.rows) * 3


def test_data_that_is_never_learned_or_always_has_no_law(tmp_path: pathlib.Path) -> None:
    found = data.run(world(tmp_path, lambda one, task: 1.0, make_task("a")))
    perfect = data.run(world(tmp_path, lambda one, task: -1.0, make_task("a")))
    assert perfect.laws == {"a": {}} and "1 of 1 tasks reach 90% agreement within the data (from 50" in perfect.sentence
    assert found.laws == {"a": {}} and "0 of 1 tasks reach 90%" in found.sentence and "power" not in found.sentence
    assert "<svg" not in found.pictures[1] and "No gate opened" in found.pictures[1]


def test_data_does_not_carry_on_a_law_that_does_not_fit(tmp_path: pathlib.Path) -> None:
    up_and_down = {50: 0.9, 100: 0.3, 200: 0.7, 400: 0.2, 800: 0.8, 1600: 0.5, 3200: 0.6, 6000: 0.4}
    found = data.run(world(tmp_path, lambda one, task: up_and_down[one["examples"]], make_task("a")))
    assert "no power law fits any of 1 learned tasks" in found.sentence
    assert [note for note in found.notes if note.startswith("a: ")] == [
        f"a: no power law fits {what}: the likeliest lies outside the intervals of "
        f"{found.laws['a'][what]['law']['num_missed']} of 8 sizes, so nothing is said of what more examples would do"
        for what in ("agreement", "coverage")
    ]


def test_model_tells_a_larger_base_that_is_better_from_one_that_is_worse(tmp_path: pathlib.Path) -> None:
    def error(one: Mapping[str, Any], task: str) -> float:
        size = (one["base"]["hidden_size"] / 320) ** 2
        return 0.3 * (one["examples"] / 3000) ** -0.2 * size ** (0.1 if task == "worse" else -0.1)

    found = model.run(world(tmp_path, error, make_task("better"), make_task("worse")))
    better, worse = (found.laws[name]["rates"] for name in ("better", "worse"))
    assert better[0] == pytest.approx(0.1, abs=0.06) and worse[0] == pytest.approx(-0.1, abs=0.06)
    assert better[1] == pytest.approx(0.2, abs=0.12)
    steps = {row[1]: row[4] for row in found.rows}
    assert steps["scratch-0.3M"] > 20 * steps["scratch-10M"], "not the same compute"
    assert "better does best on 0.102M parameters" in found.sentence and len(found.pictures) == 2


def test_model_calls_no_base_best_that_may_be_none() -> None:
    rng = np.random.default_rng(0)
    alike = {size: (rng.random((3, 200)) < 0.7).astype(float) for size in (282_600, 688_768)}
    told = model._tell(make_task("alike", 90), {**alike, 2_016_960: np.zeros((3, 200))}, None)
    assert re.search(
        r"alike does best on 0\.(283|689)M parameters, agreement \d\d%, from which 0\.(283|689)M cannot be told$", told
    )
    nothing = model._tell(make_task("hard", 90), {size: np.eye(2, 10) for size in alike}, None)
    # One in ten is right; one in six would be, were it always the most frequent of the six answers.
    assert "hard is not learned by any base at this budget" in nothing and "best on" not in nothing


def test_a_base_outside_the_catalog_has_the_budget_of_its_own_size(tmp_path: pathlib.Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    shape = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    shape.save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"<|end|>": 0, "?": 1}, unk_token="?"))
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=chat).save_pretrained(
        tmp_path
    )
    recipe = load_recipe([f"store={tmp_path / 'store'}", f'select.candidates=["{tmp_path}", "scratch-micro"]'])
    lab = world(tmp_path, lambda *_: 0.5)._replace(recipe=recipe)
    (name, size), (other, larger) = model._bases(lab)
    assert (name, size, other) == (str(tmp_path), 744, "scratch-micro") and larger > size


def test_tasks_gives_every_way_the_same_steps_and_says_which_is_better(tmp_path: pathlib.Path) -> None:
    material = [make_task(name) for name in "abc"]
    worse = {"apart": 0.1, "apart+groups": 0.1, "shared": 0.3, "groups": 0.2}
    lab = world(tmp_path, lambda one, task: worse[one["way"]], *material)
    found = tasks.run(lab)
    spent: dict[tuple[str, int], int] = {}
    for ways, seed, _, steps in {
        (r["way"], r["seed"], tuple(r["tasks"]), r["steps"]) for r in map(_listed, found.records)
    }:
        for way in ways.split("+"):
            spent[way, seed] = spent.get((way, seed), 0) + steps
    assert {way for way, _ in spent} == {"apart", "groups", "shared"}
    trained = {(tuple(r["tasks"]), r["seed"]) for r in map(_listed, found.records)}
    assert len(trained) == 5 * 3, "a group of one task is trained a second time"
    assert len(set(spent.values())) == 1
    assert "specialists for each of 3 tasks are better than one shared model" in found.sentence
    assert found.laws["apart minus shared"]["mean"] == pytest.approx(0.2, abs=0.03)
    same = tasks.run(world(tmp_path, lambda one, task: 0.2, *material))
    assert "cannot be told from" in same.sentence
    chance = tasks.run(world(tmp_path, lambda one, task: 0.97 + 0.02 * one["way"].startswith("apart"), *material))
    assert "no way learns the 3 tasks" in chance.sentence, "ways are compared that all learned nothing"


def _listed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "tasks": list(record["tasks"])}


def test_rank_gives_full_training_two_thirds_of_the_steps_and_names_the_best(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "_start", lambda lab, material, entry: tmp_path)
    lab = world(tmp_path, lambda one, task: 0.5 / one["finetune"].get("lora_rank", 1) ** 0.5, make_task("a"))
    found = rank.run(lab)
    steps = {row[0]: row[3] for row in found.rows}
    assert steps["full"] == pytest.approx(steps["lora, rank 8"] * 2 / 3, abs=4)
    assert "lora, rank 32 is best" in found.sentence and found.laws["best minus rank 1"]["a"]["low"] > 0
    assert {row[0]: row[1] for row in found.rows}["dora, rank 8"] == "no"
    nothing = rank.run(world(tmp_path, lambda one, task: 0.98, make_task("a"))).sentence
    assert "a is not learned in any way" in nothing and "best at" not in nothing


@pytest.mark.parametrize(("slower", "within"), [(1.0, 5), (1.4, 0)])
def test_fleet_reports_how_far_off_its_simulator_was(
    slower: float, within: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a world that is as calibrated the error is 0; in one that has become slower it is told."""

    def run_real(folder: pathlib.Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
        factor = slower if parameters["kind"] == "checked" else 1.0
        seconds = {f"{k}": factor * (12 + 0.05 * steps) for k, steps in enumerate(parameters["steps"])}
        plan = fleet.plan_fleet(seconds, parameters["places"])
        return {"makespan_s": plan.makespan_s, "lower_bound_s": plan.lower_bound_s, "run_s": seconds}

    monkeypatch.setattr(fleet, "_run_real", run_real)
    monkeypatch.setattr(fleet, "_write_inputs", lambda folder: None)
    found = fleet.run(world(tmp_path, lambda one, task: 0.0))
    assert len(found.rows) == 12 >= 10
    told = re.search(r"foretells (\d+) of 12 real fleets within 15%", found.sentence)
    assert told and int(told[1]) == (12 if within else 0)
    assert found.laws["error"]["median"] == pytest.approx(1 - 1 / slower, abs=0.01)
    simulated = {(one["tasks"], one["gpus"]): one for one in found.laws["simulated"]}
    assert simulated[10, 1]["efficiency"] == pytest.approx(1) and simulated[10, 1000]["efficiency"] < 0.02
    assert all(one["over_bound"] >= 1 for one in simulated.values()) and found.is_simulated


def test_a_paced_engine_is_slower_with_others_in_flight() -> None:
    async def ask(count: int) -> float:
        engine = serve.paced_engine(0.02, 0.02)(8)
        loop = asyncio.get_running_loop()
        await engine.load("adapters/t50-a")
        begin = loop.time()
        request = {"messages": [{"role": "user", "content": "#1#"}]}
        answers = [engine.answer("adapters/t50-a", None, request, 8) for _ in range(count)]
        assert {answer.text for answer in await asyncio.gather(*answers)} == {"adapters/t50-a #1#"}
        assert (await engine.facts())["num_loads"] == 1
        return loop.time() - begin

    alone, together = asyncio.run(ask(1)), asyncio.run(ask(8))
    # The last of eight begins with seven others in flight: no less than .02 + 7 * .02 s, whatever else the machine does.
    assert alone >= 0.02 and together >= 0.16


def test_a_cell_trains_grades_and_gates_and_fine_tunes_what_is_trained_already(tmp_path: pathlib.Path) -> None:
    one = make_task("a", count=90)
    sha = save_material([one], tmp_path / "material")
    assert sha == save_material([one], tmp_path / "material")
    bench = Workbench(load_recipe([f"store={tmp_path / 'store'}"]), tmp_path / "material")
    common = {"tasks": ["a"], "base": "scratch-micro", "examples": 60, "batch_size": 16, "seed": 0}
    found = train_cell(bench, {**common, "steps": 60})
    facts = found["tasks"]["a"]
    assert facts["agreement"] == facts["right"].count("1") / 80 > 0.9, "six utterances were not learned"
    assert facts["certified_coverage"] > 0.9 and not facts["refused"] and facts["num_train"] == 60
    assert found["flops"] == pytest.approx(6 * found["parameters"] * found["num_tokens"])

    entry, base = find_entry("scratch-micro"), tmp_path / "base"
    texts = [str(example.request) + str(example.target) for example in one.splits["train"]]
    init_model(entry, train_tokenizer(texts, entry.vocab_size), base, 0)  # type: ignore[arg-type, union-attr]
    (base / NUMBERS_FILE).write_text('{"a": 5}')
    flops = {}
    for method in ("lora", "dora", "full"):
        changes = {"method": method, "lora_rank": 2, "lora_alpha": 4.0}
        told = train_cell(bench, {**common, "steps": 4, "start": str(base), "finetune": changes})
        flops[method] = told["flops"] / told["num_tokens"] / told["parameters"]
    assert flops == pytest.approx({"lora": 4, "dora": 4, "full": 6})
