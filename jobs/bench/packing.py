"""Tokens per second of padded, length-bucketed and packed batches, on the shared data and a scratch base of 2M parameters.

Three layouts of the same examples: shuffled and padded, sorted by length within windows (training/batches.py without
packing), and packed (with it). Forward, backward and AdamW of LoRA on one thread, in CPU seconds, so that other programs
on the machine count little; the layouts take turns. Tokens are the examples' own, without padding. The ratio for the
default on this device is bucketed over padded, packed_over_bucketed says what packing would add; and on every batch that
is packed the loss must be that of the same examples padded.

    python -m jobs.bench.packing
"""

from __future__ import annotations

import json
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.errors import InputError
from jobs.bench.selection import SelectionTask, load_tasks
from training.catalog import load_catalog
from training.dataset import tokenise_tasks
from training.methods import build_model
from training.objective import answer_loss
from training.packing import collate_packed, collate_padded, plan_batches
from training.scratch import init_model, texts_of, train_tokenizer

_BASE = "scratch-small"
_BATCH = 16
_WINDOW = 20
_CAPACITIES = (1, 2, 4)
"""Packed rows of so many times the batch's longest example; training/batches.py takes 2."""
_ROUNDS, _STEPS = 3, 12
_QUICK_ROUNDS, _QUICK_STEPS = 1, 2
_MAX_TOKENS = 1024


def measure_packing(
    say: Callable[[str], object], tasks: Sequence[SelectionTask] | None = None, quick: bool = False
) -> dict[str, Any]:
    """Measure every task's rows, and all tasks' together.

    Args:
        tasks: None takes those of the shared data.
        quick: few steps: shows that it runs, and measures nothing.

    Returns:
        {packing_ratio: best layout over padding for all tasks together, max_loss_diff, sets: {name: facts}}.

    Raises:
        InputError: no tasks are given and the shared data is not there.
    """
    import torch

    tasks = list(load_tasks() if tasks is None else tasks)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, model, pad = _prepare(tasks, pathlib.Path(folder) / "base")
    rows["all together"] = [row for own in rows.values() for row in own]
    rounds, steps = (_QUICK_ROUNDS, _QUICK_STEPS) if quick else (_ROUNDS, _STEPS)
    sets = {}
    for name, own in rows.items():
        sets[name] = _measure_set(own, model, pad, rounds, steps)
        say(f"packing {name}: {sets[name]}")
    speeds = sets["all together"]["tokens_per_cpu_s"]
    return {
        "packing_ratio": max(speeds.values()) / speeds["padded"],
        "max_loss_diff": max(one["max_loss_diff"] for one in sets.values()),
        "sets": sets,
    }


def _prepare(tasks: Sequence[SelectionTask], folder: pathlib.Path) -> tuple[dict[str, list[dict[str, Any]]], Any, int]:
    """(rows by task, an untrained base with an adapter, pad token)."""
    entry = load_catalog().get(_BASE)
    texts = [text for task in tasks for text in texts_of(task.train, task.spec.static_lines)]
    tokenizer = train_tokenizer(texts, entry.vocab_size)
    init_model(entry, tokenizer, folder, seed=0)
    train = {task.spec.task_id: task.train for task in tasks}
    specs = [task.spec for task in tasks]
    data = tokenise_tasks(
        specs, train, {one: [] for one in train}, tokenizer, is_scratch=True, max_prompt_tokens=_MAX_TOKENS
    )
    settings = {"base_path": str(folder), "method": "lora", "lora_rank": 8, "lora_alpha": 16.0}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = build_model({**settings, "lora_targets": targets}).train()
    return {task.spec.name: data[task.spec.task_id].train for task in tasks}, model, tokenizer.pad_token_id


def _measure_set(rows: list[dict[str, Any]], model: Any, pad: int, rounds: int, steps: int) -> dict[str, Any]:
    import torch

    lengths = [len(row["input_ids"]) for row in rows]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    layouts = {"padded": _draw(lengths, 1), "bucketed": _draw(lengths, _WINDOW)}
    layouts |= {f"packed x{capacity}": _draw(lengths, 1) for capacity in _CAPACITIES}
    speeds: dict[str, list[float]] = {name: [] for name in layouts}
    filled: dict[str, list[int]] = {name: [0, 0] for name in layouts}
    worst = 0.0
    for _ in range(rounds):
        for name, batches in layouts.items():
            num_tokens, seconds = 0, 0.0
            for _ in range(steps):
                chosen = next(batches)
                began = time.process_time()
                batch = _collate([rows[k] for k in chosen], name, pad)
                loss = answer_loss(model, batch, "cpu")
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds += time.process_time() - began
                own = sum(lengths[k] for k in chosen)
                num_tokens += own
                filled[name][0] += own
                filled[name][1] += batch["input_ids"].numel()
            speeds[name].append(num_tokens / seconds)
            if name.startswith("packed"):
                worst = max(worst, _loss_difference(model, [rows[k] for k in next(batches)], name, pad))
    found = {name: round(statistics.median(values)) for name, values in speeds.items()}
    return {
        "mean_tokens": round(statistics.mean(lengths), 1),
        "tokens_per_cpu_s": found,
        "filled": {name: round(own / whole, 3) for name, (own, whole) in filled.items()},
        "bucketed_over_padded": found["bucketed"] / found["padded"],
        "packed_over_bucketed": max(found[f"packed x{c}"] for c in _CAPACITIES) / found["bucketed"],
        "max_loss_diff": worst,
    }


def _draw(lengths: Sequence[int], window: int) -> Iterator[list[int]]:
    """Whole batches of endless epochs."""
    rng = random.Random(0)
    while True:
        yield from (
            batch for batch in plan_batches(lengths, _BATCH, rng, window) if len(batch) == min(_BATCH, len(lengths))
        )


def _collate(rows: Sequence[dict[str, Any]], layout: str, pad: int) -> dict[str, Any]:
    ids, num_prompts = [row["input_ids"] for row in rows], [row["num_prompt"] for row in rows]
    if not layout.startswith("packed"):
        return collate_padded(ids, num_prompts, pad)
    return collate_packed(ids, num_prompts, pad, int(layout.split("x")[1]) * max(map(len, ids)))


def _loss_difference(model: Any, rows: Sequence[dict[str, Any]], layout: str, pad: int) -> float:
    import torch

    with torch.no_grad():
        losses = [float(answer_loss(model, _collate(rows, name, pad), "cpu")) for name in ("padded", layout)]
    return abs(losses[0] - losses[1])


if __name__ == "__main__":
    try:
        print(json.dumps(measure_packing(lambda line: print(line, file=sys.stderr)), indent=1))
    except InputError as error:
        sys.exit(f"bench packing: {error}")
