"""A LoRA fine-tune on real Ray Train: a killed worker costs time and nothing else, and nothing is compiled."""

from __future__ import annotations

import json
import pathlib
import threading
from typing import Any

import psutil
import pytest

from cluster.errors import TrainingError
from training.dataset import save_dataset
from training.finetune import FinetuneConfig, finetune

pytestmark = pytest.mark.integration

# Ray registers a checkpoint up to two seconds late; batches this size keep the kill well before the last step.
CONFIG = FinetuneConfig(num_steps=16, batch_size=256, warmup_steps=2, checkpoint_every=4, max_failures=1, seed=5)


class Killer(threading.Thread):
    """Watches a run's folder: kills its worker once, after the first checkpoint, and notes every checkpoint."""

    def __init__(self, run_folder: pathlib.Path) -> None:
        super().__init__(daemon=True)
        self._folder, self._done = run_folder, threading.Event()
        self.killed: list[int] = []
        self.step_at_kill = 0
        self.steps: dict[str, int] = {}
        """Checkpoint folder -> step, in the order of their appearance."""

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.look()

    def finish(self) -> None:
        self._done.set()
        self.join()
        self.look()

    def look(self) -> None:
        for facts in sorted(self._folder.glob("checkpoint_*/metrics.json")):
            try:
                self.steps.setdefault(facts.parent.name, json.loads(facts.read_text())["step"])
            except (ValueError, FileNotFoundError):
                continue  # half-written, or just replaced by the next one
        # The snapshot is what a restarted worker is given its checkpoint from.
        if not self.killed and any(self._folder.glob("checkpoint_manager_snapshot.json")):
            for process in _train_workers():
                process.kill()
                self.killed.append(process.pid)
                self.step_at_kill = max(self.steps.values())


@pytest.fixture(scope="module")
def arguments(ray_cluster: None, toy: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("finetune")
    return {
        "base_path": toy.base_path,
        "train_path": _many_rows(toy, folder / "rows"),
        "validation_path": toy.rows_path,
        "pad_token_id": toy.tokenizer.pad_token_id,
        "storage": folder / "runs",
    }


@pytest.fixture(scope="module")
def undisturbed(arguments: dict[str, Any]) -> dict[str, Any]:
    return finetune("undisturbed", CONFIG, **arguments)[1]


def test_a_killed_worker_continues_from_its_checkpoint_to_the_same_result(
    arguments: dict[str, Any], undisturbed: dict[str, Any], extensions_dir: pathlib.Path
) -> None:
    killer = Killer(arguments["storage"] / "disturbed")
    killer.start()
    try:
        model, disturbed = finetune("disturbed", CONFIG, **arguments)
    finally:
        killer.finish()

    assert len(killer.killed) == 1
    assert 4 <= killer.step_at_kill < CONFIG.num_steps
    steps = list(killer.steps.values())
    assert steps.count(4) == 1, "it began again from the beginning"
    assert steps[-1] == disturbed["step"] == undisturbed["step"] == CONFIG.num_steps
    for name in ("loss", "validation_loss"):
        assert disturbed[name] == pytest.approx(undisturbed[name], abs=1e-6)
    assert disturbed["curve"] == [pytest.approx(point, abs=1e-6) for point in undisturbed["curve"]]
    assert (model / "adapter_model.safetensors").stat().st_size > 0
    assert list(extensions_dir.iterdir()) == [], "DeepSpeed compiled something"


def test_zero_3_on_two_workers_trains_the_same_adapter(arguments: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"zero_stage": 3, "num_workers": 2, "batch_size": 128})
    model, sharded = finetune("sharded", config, **arguments)
    assert sharded["validation_loss"] == pytest.approx(undisturbed["validation_loss"], abs=1e-4)
    assert (model / "adapter_model.safetensors").stat().st_size > 0


def test_two_workers_share_a_run_of_packed_micro_batches_under_zero_2(arguments: dict[str, Any]) -> None:
    changes = {"zero_stage": 2, "num_workers": 2, "batch_size": 64, "micro_batch_size": 24, "packing": True}
    changes |= {"ema_decay": 0.9, "patience": 1}
    model, metrics = finetune("two", CONFIG.model_copy(update=changes), **arguments)
    curve = metrics["curve"]
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    graded = [point for point in curve if "agreement" in point]
    best = max(graded, key=lambda point: (point["agreement"], -point["validation_loss"]))
    assert metrics["released_step"] == best["step"]
    # It stops one checkpoint after the best one, or goes to its end.
    assert metrics["step"] in (best["step"] + CONFIG.checkpoint_every, CONFIG.num_steps)
    assert (model / "adapter_model.safetensors").stat().st_size > 0


def test_a_run_that_diverges_ends_at_once_and_says_where(arguments: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "batch_size": 8})
    with pytest.raises(
        TrainingError, match="run wild: step 2: the loss is nan at learning rate 9.37e.29; losses before: "
    ):
        finetune("wild", config, **arguments)


def _many_rows(toy: Any, folder: pathlib.Path) -> pathlib.Path:
    """The toy's rows often enough to fill batches; each step then draws its own."""
    import datasets

    save_dataset(list(datasets.load_from_disk(str(toy.rows_path))) * 300, folder)
    return folder


def _train_workers() -> list[psutil.Process]:
    """Only those below this process: another cluster on the machine is not ours to kill."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
