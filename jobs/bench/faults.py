"""What a fine-tune loses when a worker, a node or its driver is killed at a random step: nothing but time.

A local Ray cluster of three nodes on this machine: a head without CPUs, and two nodes of one CPU each, so that a killed
node leaves another to go on at. Each trial trains the same small run, kills one thing by SIGKILL at a random step, and
compares every point of its curve with the undisturbed run's. A killed driver is started again, as a user would.

One run more has two workers and may go on with one (finetune.min_workers): it loses a node and ends as the undisturbed run
of two workers does, within what rounding does to sums over two.

    python -m jobs.bench.faults [--trials N] [--kinds KIND ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cluster.errors import TrainingError
from cluster.session import prepare_environment
from training.catalog import load_catalog
from training.dataset import save_dataset
from training.finetune import FinetuneConfig, finetune

KINDS = ("worker", "node", "driver")
CONFIG = FinetuneConfig(num_steps=36, batch_size=192, warmup_steps=2, checkpoint_every=6, max_failures=2, seed=7)
ELASTIC = CONFIG.model_copy(update={"num_workers": 2, "min_workers": 1, "batch_size": CONFIG.batch_size // 2})
"""Steps of the same examples, shared by two workers."""
_ELASTIC_STEP = 15
_NUM_ROWS, _ROW_TOKENS, _NUM_PROMPT = 2400, 32, 20
_POLL_S = 0.02
_TRIAL_TIMEOUT_S = 240


class Trial(NamedTuple):
    """What one kill did."""

    kind: str
    step_at_kill: int
    steps_repeated: int
    """Steps trained twice because no checkpoint held them."""
    max_loss_diff: float
    seconds: float


def measure_faults(
    say: Callable[[str], object], trials: int = 20, seed: int = 0, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """Kill things, each of these kinds in turn.

    Returns:
        {kill_trials, kill_recovered, kill_max_loss_diff, kill_max_steps_repeated, checkpoint_every, trials: [...],
        elastic: the trial of the run of two workers, None where it did not recover}.

    Raises:
        TrainingError: the undisturbed run failed.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, _Machines() as machines:
        bench = _Bench(pathlib.Path(folder), machines)
        undisturbed = bench.train("undisturbed")["curve"]
        found: list[Trial] = []
        for number in range(trials):
            kind = kinds[number % len(kinds)]
            try:
                trial = bench.kill(kind, f"{kind}-{number}", rng.randint(1, CONFIG.num_steps - 4), undisturbed)
            except (TrainingError, ValueError, subprocess.TimeoutExpired) as error:
                say(f"fault {number} {kind}: not recovered: {error}")
                continue
            say(f"fault {number} {trial}")
            found.append(trial)
        elastic = bench.shrink(say)
    return {
        "kill_trials": trials,
        "kill_recovered": len(found),
        "kill_max_loss_diff": max((trial.max_loss_diff for trial in found), default=None),
        "kill_max_steps_repeated": max((trial.steps_repeated for trial in found), default=None),
        "checkpoint_every": CONFIG.checkpoint_every,
        "trials": [trial._asdict() for trial in found],
        "elastic": elastic and elastic._asdict(),
    }


class _Machines:
    """The nodes of the local cluster; a killed one is replaced."""

    def __enter__(self) -> _Machines:
        prepare_environment()
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(2)]
        self.address = self._cluster.address
        ray.init(address=self.address, log_to_driver=False, logging_level="WARNING")
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()

    def workers(self) -> list[tuple[Any, Any]]:
        """(node, process) of every Ray Train worker."""
        import psutil

        found = []
        for node in self._nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in raylet.children(recursive=True):
                try:
                    if any("RayTrainWorker" in word for word in process.cmdline()):
                        found.append((node, process))
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
        return found

    def kill_node(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.remove(node)

    def replace_missing(self) -> None:
        while len(self._nodes) < 2:
            self._nodes.append(self._cluster.add_node(num_cpus=1))


class _Bench:
    """One small base and dataset, and the runs on it."""

    def __init__(self, folder: pathlib.Path, machines: _Machines) -> None:
        self._folder, self._machines = folder, machines
        make_run(folder)

    def train(self, name: str, config: FinetuneConfig = CONFIG) -> dict[str, Any]:
        return train_run(self._folder, name, config)

    def shrink(self, say: Callable[[str], object]) -> Trial | None:
        """A run of two workers that loses the node of one of them, and goes on with the other."""
        self._machines.replace_missing()
        undisturbed = self.train("undisturbed-two", ELASTIC)["curve"]
        try:
            trial = self.kill("node", "elastic", _ELASTIC_STEP, undisturbed, ELASTIC)
        except (TrainingError, ValueError) as error:
            say(f"elastic: not recovered: {error}")
            return None
        say(f"elastic {trial}")
        return trial

    def kill(
        self, kind: str, name: str, at_step: int, undisturbed: list[dict[str, Any]], config: FinetuneConfig = CONFIG
    ) -> Trial:
        """One trial.

        Args:
            config: of the run; a driver's is CONFIG.

        Raises:
            TrainingError: the run did not end, or nothing was killed.
        """
        self._machines.replace_missing()
        begin = time.monotonic()
        watch = _Watch(self._folder / "runs" / f"{name}.progress")
        if kind == "driver":
            metrics = self._kill_driver(name, at_step, watch)
        else:
            killer = threading.Thread(target=self._kill_worker, args=(kind, at_step, watch), daemon=True)
            killer.start()
            metrics = self.train(name, config)
            killer.join(10)
        watch.stop()
        if watch.step_at_kill is None:
            raise TrainingError(f"{name}: over before anything was killed")
        pairs = zip(metrics["curve"], undisturbed, strict=True)
        difference = max(abs(a[key] - b[key]) for a, b in pairs for key in ("step", "loss"))
        return Trial(kind, watch.step_at_kill, watch.steps_repeated(), difference, time.monotonic() - begin)

    def _kill_worker(self, kind: str, at_step: int, watch: _Watch) -> None:
        if not watch.wait_for(at_step, _TRIAL_TIMEOUT_S):
            return
        for node, process in self._machines.workers()[:1]:
            watch.note_kill()
            if kind == "node":
                self._machines.kill_node(node)
            else:
                process.kill()

    def _kill_driver(self, name: str, at_step: int, watch: _Watch) -> dict[str, Any]:
        command = [sys.executable, "-m", "jobs.bench.faults", "--run", name, "--folder", str(self._folder)]
        environment = {**os.environ, "RAY_ADDRESS": self._machines.address}
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if watch.wait_for(at_step, _TRIAL_TIMEOUT_S):
            watch.note_kill()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S)
        if again.returncode != 0:
            raise TrainingError(f"{name}: the second driver failed: {again.stderr[-500:]}")
        return json.loads(again.stdout.strip().splitlines()[-1])


class _Watch:
    """Follows the progress file of one run: the steps it tells, before and after a kill."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._over = path, threading.Event()
        self._steps: list[int] = []
        self.step_at_kill: int | None = None
        self._kill_index = 0
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def wait_for(self, step: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._over.is_set():
            if self._steps and self._steps[-1] >= step:
                return True
            time.sleep(_POLL_S)
        return False

    def note_kill(self) -> None:
        self._kill_index, self.step_at_kill = len(self._steps), self._steps[-1]

    def steps_repeated(self) -> int:
        """The first step told after the kill is one more than where the run went on."""
        after = self._steps[self._kill_index :]
        return max(0, (self.step_at_kill or 0) - (min(after) - 1)) if after else 0

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(_POLL_S):
            if self._path.exists():
                step = json.loads(self._path.read_text())["step"]
                if not self._steps or self._steps[-1] != step:
                    self._steps.append(step)


def make_run(folder: pathlib.Path) -> None:
    """An untrained base and rows of random tokens: what is learned does not matter, that it is the same does."""
    from training.scratch import init_model, train_tokenizer

    entry = load_catalog().get("scratch-micro")
    tokenizer = train_tokenizer(["any text will do for tokens that are drawn at random"], entry.vocab_size)
    init_model(entry, tokenizer, folder / "base", seed=1)
    rng = random.Random(2)
    rows = [
        {"input_ids": [rng.randrange(3, 250) for _ in range(_ROW_TOKENS)], "num_prompt": _NUM_PROMPT}
        for _ in range(_NUM_ROWS)
    ]
    save_dataset(rows, folder / "rows")


def train_run(folder: pathlib.Path, name: str, config: FinetuneConfig = CONFIG) -> dict[str, Any]:
    """A run of the benchmark, from its last checkpoint where it began before. Returns its last metrics."""
    return finetune(
        name,
        config,
        base_path=folder / "base",
        train_path=folder / "rows",
        validation_path=None,
        pad_token_id=0,
        storage=folder / "runs",
    )[1]


def main() -> int:
    """Run by hand; `--run` is one driver of a trial."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.faults")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is killed; default all")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        from cluster.session import connect

        connect()
        print(json.dumps(train_run(options.folder, options.run)))
        return 0
    found = measure_faults(lambda line: print(line, file=sys.stderr), options.trials, kinds=options.kinds)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
