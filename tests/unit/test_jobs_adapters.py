"""jobs/adapters.py: which tasks train in one run, and which no run of several has room for."""

from __future__ import annotations

import pathlib

import pytest
from tiny_models import make_rows, save_tiny_base

from cluster.prompts import PromptFormat
from cluster.records import TaskSpec
from cluster.store import Store
from jobs.adapters import AdapterPlan, Start, _adapter_task, _plan_groups, plan_adapters
from jobs.recipe import Recipe, load_recipe
from training.dataset import TaskData, save_dataset
from training.memory import shape_of
from training.multi_finetune import load_of
from training.multi_memory import plan_many


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def recipe_of(*words: str) -> Recipe:
    fixed = ("select.base=scratch-tiny", "finetune.lora_rank=256", "specialists.max_lora_rank=256")
    return load_recipe([*fixed, "fleet.mode=multi_lora", *words])


def plan_of(name: str, work: pathlib.Path, longest: int, mean_tokens: int) -> AdapterPlan:
    save_dataset(make_rows(20, seed=len(name), longest=longest), work / name / "train")
    counts = {"num_calls": 1, "share_calls": 1.0, "share_cost": 1.0, "num_examples": {}}
    task = TaskSpec(task_id=name, name=name, signature="s", kind="json", reference="llm", **counts)
    form = PromptFormat(kind="compact", answer_kind="json", max_prompt_tokens=100)
    fields = {"max_answer_tokens": 9, "mean_tokens": mean_tokens, "has_validation": False}
    return AdapterPlan(task=task, prompt_format=form, run_id=name, **fields)


def test_tasks_share_a_run_as_far_as_memory_goes_and_one_that_fits_nowhere_is_told(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    missing = {name: plan_of(name, tmp_path, 30, mean) for name, mean in (("a", 9), ("b", 8), ("c", 7))}
    missing["long"] = plan_of("long", tmp_path, 400, 60)
    recipe = recipe_of()
    loads = [load_of(_adapter_task(recipe, missing[name], tmp_path), base) for name in "ab"]
    # Room for two of the small ones, by the same arithmetic.
    two = plan_many(shape_of(base, recipe.finetune), recipe.finetune, loads, 2**40, 256).memory.total
    room = (two + 2**20) / 0.9 / 2**30
    groups, failed = _plan_groups(recipe_of(f"finetune.device_gib={room}"), missing, base, tmp_path, places=1)
    assert {first: [plan.run_id for plan in group] for first, group in groups.items()} == {"a": ["a", "b"], "c": ["c"]}
    assert set(failed) == {"long"} and "are longer than the base's window of 128 tokens" in failed["long"]
    plenty, none = _plan_groups(recipe_of("finetune.device_gib=64.0"), missing, base, tmp_path, places=1)
    assert len(plenty) == 1 and set(none) == {"long"}
    nothing, failed = _plan_groups(recipe_of("finetune.device_gib=0.5"), missing, base, tmp_path, places=1)
    assert not nothing and "multi-LoRA run of b: needs" in failed["b"]
    assert "what would fit: a device of" in failed["b"] and "finetune.batch_size=8" in failed["b"]
    alone, none = _plan_groups(recipe_of("fleet.mode=solo"), missing, base, tmp_path, places=1)
    assert list(alone) == list(missing) and not none


def test_what_a_run_goes_on_from_is_part_of_its_name_and_of_no_other_task_s(tmp_path: pathlib.Path) -> None:
    plans = {name: plan_of(name, tmp_path, 20, 9) for name in ("a", "bb")}
    data = {name: TaskData(one.prompt_format, make_rows(9, seed=1, longest=20), [], 0) for name, one in plans.items()}
    start = Start(adapter="adapters/a/1", sha256="0" * 64, num_new=6, num_replayed=3, replay_share=0.4)

    def names(starts: dict[str, Start]) -> dict[str, str]:
        tasks = [one.task for one in plans.values()]
        found = plan_adapters(recipe_of(), Store(str(tmp_path / "store")), tmp_path, tasks, data, "bases/b", 9, starts)
        assert {one.task.task_id: one.start for one in found if one.start} == starts
        return {one.task.task_id: one.run_id for one in found}

    cold, warm = names({}), names({"a": start})
    other = names({"a": start.model_copy(update={"replay_share": 0.5})})
    assert len({cold["a"], warm["a"], other["a"]}) == 3 and cold["bb"] == warm["bb"] == other["bb"]
