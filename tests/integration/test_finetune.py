"""A LoRA fine-tune on real Ray Train: a killed worker costs time and nothing else, and nothing is compiled."""

from __future__ import annotations

import json
import pathlib
import threading
from typing import Any

import psutil
import pytest

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


def test_a_killed_worker_continues_from_its_checkpoint_to_the_same_result(
    ray_cluster: None, toy: Any, extensions_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rows = _many_rows(toy, tmp_path / "rows")
    arguments = {
        "method": "lora",
        "base_path": toy.base_path,
        "train_path": rows,
        "validation_path": toy.rows_path,
        "pad_token_id": toy.tokenizer.pad_token_id,
        "storage": tmp_path / "runs",
    }
    killer = Killer(tmp_path / "runs" / "disturbed")
    killer.start()
    try:
        model, disturbed = finetune("disturbed", CONFIG, **arguments)
    finally:
        killer.finish()
    _, undisturbed = finetune("undisturbed", CONFIG, **arguments)

    assert len(killer.killed) == 1
    assert 4 <= killer.step_at_kill < CONFIG.num_steps
    steps = list(killer.steps.values())
    assert steps.count(4) == 1, "it began again from the beginning"
    assert steps[-1] == disturbed["step"] == undisturbed["step"] == CONFIG.num_steps
    for name in ("loss", "validation_loss"):
        assert disturbed[name] == pytest.approx(undisturbed[name], abs=1e-6)
    assert (model / "adapter_model.safetensors").stat().st_size > 0
    assert list(extensions_dir.iterdir()) == [], "DeepSpeed compiled something"


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
