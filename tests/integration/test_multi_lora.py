"""Many adapters in one real Ray Train run: two workers, uneven data, a killed worker, a sharded base.

The measure is the real solo run of each (training/loop.py under DeepSpeed) with as many workers.
"""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import pytest
from integration.test_finetune import Killer
from safetensors.torch import load_file

from cluster.errors import ConfigError
from cluster.records import TaskSpec
from cluster.store import Store
from training.dataset import save_dataset
from training.finetune import FinetuneConfig, finetune
from training.fleet import FleetConfig
from training.multi_finetune import AdapterTask, ManyTrained, finetune_many

pytestmark = pytest.mark.integration

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
COMMON = FinetuneConfig(num_workers=2, cpus_per_worker=1.0, max_failures=1, checkpoint_every=4, warmup_steps=2)
CONFIGS = {
    "wide": COMMON.model_copy(update={"num_steps": 16, "batch_size": 96, "seed": 5}),
    "narrow": COMMON.model_copy(
        update={
            "num_steps": 10,
            "batch_size": 7,
            "seed": 6,
            "lora_rank": 3,
            "lora_alpha": 5.0,
            "lora_targets": ("v_proj", "down_proj"),
            "learning_rate": 8e-3,
        }
    ),
}


@pytest.fixture(scope="module")
def tasks(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterTask]:
    """Row counts that neither the batch size nor the number of workers divides."""
    import datasets

    folder = tmp_path_factory.mktemp("many")
    rows = list(datasets.load_from_disk(str(toy.rows_path)))
    save_dataset(rows * 50 + rows[:3], folder / "wide")
    save_dataset(rows[:11], folder / "narrow")
    return [AdapterTask(name, config, folder / name, toy.rows_path) for name, config in CONFIGS.items()]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("many_runs")


@pytest.fixture(scope="module")
def arguments(ray_cluster: None, toy: Any, storage: pathlib.Path) -> dict[str, Any]:
    return {"base_path": toy.base_path, "pad_token_id": toy.tokenizer.pad_token_id, "storage": storage}


@pytest.fixture(scope="module")
def solo(tasks: list[AdapterTask], arguments: dict[str, Any]) -> dict[str, tuple[pathlib.Path, dict[str, Any]]]:
    return {
        task.name: finetune(
            f"solo-{task.name}",
            task.config,
            train_path=task.train_path,
            validation_path=task.validation_path,
            **arguments,
        )
        for task in tasks
    }


def test_after_a_kill_each_adapter_is_that_of_its_solo_run_with_two_workers(
    tasks: list[AdapterTask], arguments: dict[str, Any], solo: dict[str, Any], storage: pathlib.Path
) -> None:
    killer = Killer(storage / "killed")
    killer.start()
    try:
        many = finetune_many("killed", tasks, **arguments)
    finally:
        killer.finish()
    assert len(killer.killed) >= 1 and 4 <= killer.step_at_kill < CONFIGS["wide"].num_steps
    assert list(killer.steps.values()).count(4) == 1, "it began again from the beginning"
    assert_equal(many, solo)


def test_a_sharded_base_carries_the_same_adapters(
    tasks: list[AdapterTask], arguments: dict[str, Any], solo: dict[str, Any], extensions_dir: pathlib.Path
) -> None:
    sharded = [task._replace(config=task.config.model_copy(update={"zero_stage": 3})) for task in tasks]
    assert_equal(finetune_many("sharded", sharded, **arguments), solo)
    assert list(extensions_dir.iterdir()) == [], "DeepSpeed compiled something"


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_mix_gradients_are_refused_before_anything_starts(
    tasks: list[AdapterTask], stage: int, tmp_path: pathlib.Path
) -> None:
    mixed = [task._replace(config=task.config.model_copy(update={"zero_stage": stage})) for task in tasks]
    with pytest.raises(ConfigError, match=f"finetune.zero_stage={stage}: .*clipped or stopped by itself"):
        finetune_many("mixed", mixed, base_path=tmp_path, pad_token_id=0, storage=tmp_path)


def assert_equal(many: ManyTrained, solo: dict[str, tuple[pathlib.Path, dict[str, Any]]]) -> None:
    assert many.failed == {} and many.done.keys() == solo.keys()
    for name, (folder, metrics) in many.done.items():
        expected_folder, expected = solo[name]
        assert [point["step"] for point in metrics["curve"]] == [point["step"] for point in expected["curve"]]
        for own, other in zip(metrics["curve"], expected["curve"], strict=True):
            assert own["loss"] == pytest.approx(other["loss"], abs=LOSS_TOLERANCE)
            if other.get("validation_loss") is not None:
                assert own["validation_loss"] == pytest.approx(other["validation_loss"], abs=LOSS_TOLERANCE)
        saved, wanted = (load_file(f / "adapter_model.safetensors") for f in (folder, expected_folder))
        assert saved.keys() == wanted.keys()
        assert max(float((saved[key] - wanted[key]).abs().max()) for key in saved) < WEIGHT_TOLERANCE


def test_a_conversion_publishes_every_adapter_of_its_runs(
    ray_cluster: None, toy: Any, tasks: list[AdapterTask], tmp_path: pathlib.Path
) -> None:
    """What jobs/adapters.py makes of three tasks in two runs."""
    from jobs.adapters import AdapterPlan, train_adapters
    from jobs.recipe import Recipe

    recipe = Recipe(
        finetune=FinetuneConfig(num_steps=3, batch_size=4, warmup_steps=1),
        fleet=FleetConfig(mode="multi_lora", max_parallel=2),
    )
    store, work, said = Store(str(tmp_path / "store")), tmp_path / "work", []
    store.publish("bases/toy", toy.base_path, {"base": "toy"})
    plans = []
    for number, name in enumerate(("a", "b", "c")):
        spec = TaskSpec(
            task_id=name,
            name=name,
            signature=name,
            kind="json",
            reference="gold",
            num_calls=1,
            share_calls=0.3,
            share_cost=0.3,
            num_examples={"train": 11},
        )
        plans.append(
            AdapterPlan(
                task=spec,
                prompt_format=toy.prompt_format,
                run_id=f"run{name}",
                max_answer_tokens=9,
                mean_tokens=20 + number,
                has_validation=number == 0,
            )
        )
        shutil.copytree(tasks[1].train_path, work / f"run{name}" / "train")
    shutil.copytree(toy.rows_path, work / "runa" / "validation")
    losses, errors = train_adapters(recipe, store, work, "snapshot", plans, "bases/toy", toy.tokenizer, said.append)
    assert errors == {} and losses.keys() == {"a", "b", "c"} and "agreement" in losses["a"]
    assert all(store.is_published(plan.adapter) for plan in plans)
    assert store.list(plans[1].adapter) and not any((work / f"run{name}").exists() for name in "abc")
    assert sorted(line.split(":")[0] for line in said) == ["fine-tune a", "fine-tune b", "fine-tune c", "fleet"]
    assert len([folder for folder in (work / "runs").iterdir() if folder.is_dir()]) == 2, "two runs for three tasks"
