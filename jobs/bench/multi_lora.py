"""What many adapters in one run save: adapters per hour of solo runs one after another, in parallel on Ray, and of multi-LoRA.

Eight tasks of the shared data (six domains of clinc150, restaurant8k's slots, snips' intents) on untrained bases of 2M and
20M parameters: time does not depend on what a base knows, so nothing is said about quality. Measured are whole Ray Train
runs, starts included, at two lengths; between and beyond them a straight line is drawn, which tells at how many tokens per
adapter the gain over parallel runs falls below 2. The loops alone, in this process, are compared in CPU seconds. The
adapters of the multi-LoRA run are compared with those of the solo runs, and so are two that mix adapters up on purpose.

    python -m jobs.bench.multi_lora [--quick] [--size 2M] [--part loops] [--json PATH]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cluster.errors import InputError, TrainingError
from jobs.bench.equality import measure_equality, measure_growth, train_alone, train_together
from jobs.bench.selection import load_tasks
from training.catalog import ScratchModel, load_catalog
from training.dataset import save_dataset, tokenise_tasks
from training.finetune import FinetuneConfig, finetune
from training.fleet import FleetRun, run_fleet
from training.multi_finetune import AdapterTask, ManyTrained, adapter_settings, finetune_many
from training.multi_plan import TaskLoad, plan_groups
from training.scratch import init_model, texts_of, train_tokenizer

_BASES = {
    "2M": "scratch-small",
    "20M": ScratchModel(
        kind="scratch",
        name="scratch-20M",
        layers=8,
        hidden_size=448,
        heads=7,
        intermediate_size=1216,
        vocab_size=2048,
        context_window_tokens=1024,
    ),
}
_NUM_DOMAINS = 6
_PARTS = ("loops", "runs")
_WAYS = ("two_runs", "one_run", "parallel", "sequential")
_STEPS = {"2M": (10, 420), "20M": (6,)}
"""Of each adapter; 420 are a minute of a solo loop on the machine that was measured on, while others wait for it."""
_BATCHES = {"2M": (16, 4, 64), "20M": (16,)}
_LOOP_TOKENS = {"2M": 3_000, "20M": 1_500}
"""Of each task in the loops alone: at least this many."""
_TOKENS_PER_PASS = 4096
_PARALLEL = 2
_FALLS_BELOW = 2.0


class Material(NamedTuple):
    """A base and tokenised tasks on disk."""

    base_path: pathlib.Path
    pad_token_id: int
    train_paths: dict[str, pathlib.Path]
    mean_tokens: dict[str, float]
    """Of a row."""

    def tasks(self, num_steps: int, batch_size: int = 16) -> list[AdapterTask]:
        """Tasks with ranks and rates of their own."""
        return [
            AdapterTask(name, _config(number, num_steps, batch_size), path, None)
            for number, (name, path) in enumerate(self.train_paths.items())
        ]


def measure_multi_lora(
    say: Callable[[str], object],
    sizes: Sequence[str] = tuple(_BASES),
    parts: Sequence[str] = _PARTS,
    quick: bool = False,
) -> dict[str, Any]:
    """All numbers of the bases named, on the connected Ray cluster.

    Args:
        parts: loops, which need no Ray, and runs.
        quick: two tasks and few steps: shows that it runs, and measures nothing.

    Raises:
        InputError: the shared data is not there.
        TrainingError: a run failed.
    """
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            material = prepare(_entry_of(size), pathlib.Path(folder), 2 if quick else 8)
            facts: dict[str, Any] = {}
            if "loops" in parts:
                facts["loop_only"] = _measure_loops(size, material, quick, say)
                facts |= measure_equality(run_settings(material, material.tasks(6)[:2]))
                steps = 4 if quick else max(_STEPS[size])
                facts["growth"] = measure_growth(run_settings(material, material.tasks(steps)[-2:]))
                say(f"{size}, differences after {steps} steps: {facts['growth']}")
                say(f"{size}: equal {facts['is_equal']}, wrong runs are seen {facts['negative_control_fails']}")
            if "runs" in parts:
                steps = (2, 4) if quick else _STEPS[size]
                runs = {n: _measure_runs(size, material, n, pathlib.Path(folder) / str(n), say) for n in steps}
                facts |= _draw_line(runs, material)
            found[size] = facts
    return found


def _entry_of(size: str) -> ScratchModel:
    shape = _BASES[size]
    entry = shape if isinstance(shape, ScratchModel) else load_catalog().get(shape)
    assert isinstance(entry, ScratchModel)
    return entry


def prepare(entry: ScratchModel, folder: pathlib.Path, num_tasks: int = 8) -> Material:
    """Write an untrained base of this shape, and the shared data's first tasks in its tokens.

    Raises:
        InputError: the shared data is not there.
    """
    tasks = load_tasks(num_domains=_NUM_DOMAINS)[:num_tasks]
    tokenizer = train_tokenizer(
        (text for task in tasks for text in texts_of(task.train, task.spec.static_lines)), entry.vocab_size
    )
    init_model(entry, tokenizer, folder / "base", 0)
    specs = [task.spec for task in tasks]
    train = {task.spec.task_id: task.train for task in tasks}
    nothing: dict[str, list[Any]] = {task_id: [] for task_id in train}
    data = tokenise_tasks(specs, train, nothing, tokenizer, is_scratch=True, max_prompt_tokens=512)
    paths, means = {}, {}
    for task_id, own in data.items():
        paths[task_id] = folder / "train" / task_id
        save_dataset(own.train, paths[task_id])
        means[task_id] = sum(len(row["input_ids"]) for row in own.train) / len(own.train)
    return Material(folder / "base", tokenizer.pad_token_id, paths, means)


def _config(number: int, num_steps: int, batch_size: int) -> FinetuneConfig:
    # The first two have one shape, so that their gradients can be swapped.
    rank = (8, 8, 4, 16)[number % 4]
    return FinetuneConfig(
        num_steps=num_steps,
        batch_size=batch_size,
        warmup_steps=2,
        lora_rank=rank,
        lora_alpha=2.0 * rank,
        learning_rate=(2e-3, 4e-3)[number % 2],
        checkpoint_every=num_steps,
        seed=number,
    )


def _measure_loops(size: str, material: Material, quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    """CPU seconds of the loops in this process: they count no other process of the machine."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for batch_size in (4,) if quick else _BATCHES[size]:
        mean = sum(material.mean_tokens.values()) / len(material.mean_tokens)
        num_steps = 2 if quick else max(3, round(_LOOP_TOKENS[size] / (batch_size * mean)))
        # What one step takes is taken off, and with it the building of models.
        first, last = (run_settings(material, material.tasks(n, batch_size)) for n in (1, 1 + num_steps))
        solo, together = (way(last) - way(first) for way in (_clock_alone, _clock_together))
        tokens = batch_size * num_steps * sum(material.mean_tokens.values())
        found[batch_size] = {
            "steps": num_steps,
            "solo_tokens_per_s": round(tokens / solo),
            "multi_lora_tokens_per_s": round(tokens / together),
            "ratio": round(solo / together, 3),
        }
        say(f"{size}, loops at {batch_size} examples a batch: {found[batch_size]}")
    return found


def _clock_alone(settings: dict[str, Any]) -> float:
    begin = time.process_time()
    for one in settings["adapters"]:
        train_alone(one)
    return time.process_time() - begin


def _clock_together(settings: dict[str, Any]) -> float:
    begin = time.process_time()
    train_together(settings)
    return time.process_time() - begin


def run_settings(material: Material, tasks: Sequence[AdapterTask]) -> dict[str, Any]:
    """Those of a multi-LoRA run of these tasks on a CPU; under `adapters` those of each solo run."""
    base = {"base_path": str(material.base_path), "method": "lora"}
    return {
        **base,
        "adapters": [adapter_settings(task, material.pad_token_id) | base for task in tasks],
        "zero_stage": 0,
        "bf16": False,
        "tokens_per_pass": _TOKENS_PER_PASS,
        "progress_path": str(material.base_path.parent / "progress"),
        "yield_path": str(material.base_path.parent / "yield"),
    }


def _measure_runs(
    size: str, material: Material, num_steps: int, storage: pathlib.Path, say: Callable[[str], object]
) -> dict[str, Any]:
    """Seconds of whole runs. The 20M base leaves out the solo runs one after another, which say least and take longest."""
    tasks = material.tasks(num_steps)
    seconds: dict[str, float] = {}
    run_seconds: dict[str, float] = {}
    trained: dict[str, dict[str, Any]] = {}
    for way in _WAYS if size == "2M" else _WAYS[:-1]:
        runs = _runs_of(way, material, tasks, storage)
        begin = time.monotonic()
        fleet = run_fleet(runs, 1 if way in ("one_run", "sequential") else _PARALLEL, lambda *_: None)
        if fleet.errors:
            raise TrainingError(f"{way}: {fleet.errors}")
        seconds[way] = round(time.monotonic() - begin, 1)
        trained[way] = {name: one for group in fleet.results.values() for name, one in group.done.items()}
        if way == "parallel":
            run_seconds = {name: round(taken, 1) for name, taken in fleet.report.run_s.items()}
        say(f"{size}, {num_steps} steps, {way}: {len(runs)} runs in {seconds[way]} s")
    loss, weight = _compare_folders(trained["parallel"], trained["one_run"])
    return {
        "seconds": seconds,
        "run_seconds": run_seconds,
        "run_tokens": {task.name: num_steps * material.mean_tokens[task.name] for task in tasks},
        "adapters_per_hour": {way: round(3600 * len(tasks) / taken, 1) for way, taken in seconds.items()},
        "max_loss_diff": loss,
        "max_weight_diff": weight,
    }


def _runs_of(
    way: str, material: Material, tasks: Sequence[AdapterTask], storage: pathlib.Path
) -> dict[str, FleetRun[ManyTrained]]:
    shared = {"base_path": material.base_path, "pad_token_id": material.pad_token_id, "storage": storage}
    tokens = {task.name: task.config.num_steps * material.mean_tokens[task.name] for task in tasks}

    def solo(task: AdapterTask) -> ManyTrained:
        paths = {"train_path": task.train_path, "validation_path": None}
        trained = finetune(f"{way}-{task.name}", task.config, **paths, **shared)
        return ManyTrained({task.name: trained}, {})

    if way in ("sequential", "parallel"):
        return {task.name: FleetRun(tokens[task.name], lambda task=task: solo(task)) for task in tasks}
    by_name = {task.name: task for task in tasks}
    loads = {name: TaskLoad("base", count) for name, count in tokens.items()}
    return {
        names[0]: FleetRun(
            sum(tokens[name] for name in names),
            lambda names=names: finetune_many(f"{way}-{names[0]}", [by_name[name] for name in names], **shared),
        )
        for names in plan_groups(loads, 1 if way == "one_run" else _PARALLEL)
    }


def _compare_folders(alone: dict[str, Any], together: dict[str, Any]) -> tuple[float, float]:
    from safetensors.torch import load_file

    losses, weights = [], []
    for name, (folder, metrics) in alone.items():
        other_folder, other = together[name]
        losses += [abs(a["loss"] - b["loss"]) for a, b in zip(metrics["curve"], other["curve"], strict=True)]
        saved, wanted = (load_file(one / "adapter_model.safetensors") for one in (folder, other_folder))
        weights += [float((saved[key] - wanted[key]).abs().max()) for key in wanted]
    return max(losses), max(weights)


def _draw_line(runs: dict[int, dict[str, Any]], material: Material) -> dict[str, Any]:
    """From two lengths: seconds = start + steps x slope, and where two multi-LoRA runs stop being twice as fast."""
    ratios = {
        steps: {way: round(one["seconds"]["parallel"] / one["seconds"][way], 2) for way in ("one_run", "two_runs")}
        for steps, one in runs.items()
    }
    facts = {"runs": runs, "ratio_to_parallel": ratios}
    if len(runs) < 2:
        return facts
    (few, short), (many, long) = sorted(runs.items())
    lines = {}
    for way in long["seconds"]:
        slope = (long["seconds"][way] - short["seconds"][way]) / (many - few)
        lines[way] = (short["seconds"][way] - few * slope, slope)
    (start, slope), (start_many, slope_many) = lines["parallel"], lines["two_runs"]
    excess = _FALLS_BELOW * slope_many - slope
    steps = (start - _FALLS_BELOW * start_many) / excess if excess > 0 else math.inf
    tokens = sum(material.mean_tokens.values()) / len(material.mean_tokens) * 16
    return {
        **facts,
        "seconds_start_and_per_step": {way: [round(a, 1), round(b, 3)] for way, (a, b) in lines.items()},
        "falls_below_2_at_steps": round(steps) if math.isfinite(steps) else None,
        "falls_below_2_at_tokens_per_adapter": round(steps * tokens) if math.isfinite(steps) else None,
    }


def main() -> int:
    """Run by hand; prints a line for each part and the numbers as JSON."""
    from cluster.session import connect

    parser = argparse.ArgumentParser(prog="python -m jobs.bench.multi_lora", description="what multi-LoRA runs save")
    parser.add_argument("--quick", action="store_true", help="show that it runs; measures nothing")
    parser.add_argument("--size", choices=tuple(_BASES), nargs="+", default=tuple(_BASES), help="of the base")
    parser.add_argument("--part", choices=_PARTS, nargs="+", default=_PARTS, help="loops need no Ray")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    options = parser.parse_args()
    if "runs" in options.part:
        connect()
    try:
        say = functools.partial(print, file=sys.stderr, flush=True)
        found = measure_multi_lora(say, options.size, options.part, options.quick)
    except (InputError, TrainingError) as error:
        print(f"multi_lora: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
