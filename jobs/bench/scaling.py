"""What a second worker brings, and what each ZeRO stage leaves on a worker: our own fine-tunes on the connected Ray cluster.

Workers have one thread each and speak gloo over loopback. One and two of them train the same examples a step (half as many
each), an adapter and all weights of a scratch base; tokens a second are those of the steps alone (training/speed.py).
Memory is the most that the first of two workers held, beside the arithmetic of training/memory.py for the same run.

    python -m jobs.bench.scaling
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from training.catalog import ScratchModel
from training.dataset import save_dataset
from training.finetune import FinetuneConfig, finetune
from training.memory import Load, predict_memory, shape_of
from training.scratch import init_model, train_tokenizer

_SHAPE = {"layers": 4, "hidden_size": 192, "heads": 3, "intermediate_size": 448, "vocab_size": 2048}
_LARGE = {"layers": 12, "hidden_size": 384, "heads": 6, "intermediate_size": 1024, "vocab_size": 2048}
_EXAMPLES = 32
"""A step, over all workers."""
_ROW_TOKENS, _ANSWER_TOKENS = 128, 32
_STEPS = 16
_STAGES, _QUICK_STAGES = (0, 1, 2, 3), (3,)
_METHODS = {"scaling": "lora", "scaling_full": "full"}


def measure_scaling(say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Train with one and two workers, and at every ZeRO stage with two.

    Args:
        quick: few steps, adapters alone and the last stage alone: shows that it runs, and measures nothing.

    Returns:
        {scaling: {workers: {tokens_per_s, efficiency, communication_share}}, of an adapter; scaling_full: the same of full
        training, whose gradients are of the size of the base; zero_memory: {stage: {measured_mib, formula_mib}}}.

    Raises:
        TrainingError: a run failed.
    """
    num_steps = 4 if quick else _STEPS
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        for name, shape in (("2M", _SHAPE), ("22M", _LARGE)):
            entry = ScratchModel(kind="scratch", name=name, context_window_tokens=1024, **shape)
            init_model(entry, train_tokenizer(["a"], entry.vocab_size), folder / name, 0)
        _write_rows(folder / "rows", num_steps)
        found = {
            key: _scale(method, num_steps, folder, say)
            for key, method in _METHODS.items()
            if not quick or method == "lora"
        }
        stages = _QUICK_STAGES if quick else _STAGES
        memory = {str(stage): _measure_stage(stage, folder, say) for stage in stages}
    return {**found, "zero_memory": memory}


def _write_rows(folder: pathlib.Path, num_steps: int) -> None:
    """Rows of one length, so that both workers have as much to do."""
    ids = [5 + k % 2000 for k in range(_ROW_TOKENS)]
    rows = [{"input_ids": ids, "num_prompt": _ROW_TOKENS - _ANSWER_TOKENS}] * (_EXAMPLES * num_steps)
    save_dataset(rows, folder)


def _config(workers: int, **changes: Any) -> FinetuneConfig:
    steps = changes["num_steps"]
    fixed = {"warmup_steps": 1, "checkpoint_every": steps, "zero_stage": 0, "max_failures": 0}
    return FinetuneConfig(num_workers=workers, **{**fixed, **changes})


def _run(name: str, base: str, config: FinetuneConfig, folder: pathlib.Path) -> dict[str, Any]:
    paths = {"base_path": folder / base, "train_path": folder / "rows", "validation_path": None}
    return finetune(name, config, **paths, pad_token_id=0, storage=folder / "runs")[1]


def _scale(
    method: str, num_steps: int, folder: pathlib.Path, say: Callable[[str], object]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for workers in (1, 2):
        config = _config(workers, method=method, num_steps=num_steps, batch_size=_EXAMPLES // workers)
        metrics = _run(f"{method}-{workers}", "2M", config, folder)
        speed = metrics["tokens_per_s"]
        found[str(workers)] = {
            "tokens_per_s": speed,
            "efficiency": speed / (workers * found["1"]["tokens_per_s"]) if found else 1.0,
            "communication_share": metrics.get("communication_share", 0.0),
            "loss": metrics["loss"],
        }
        say(f"scaling, {method}, {workers} workers: {found[str(workers)]}")
    return found


def _measure_stage(stage: int, folder: pathlib.Path, say: Callable[[str], object]) -> dict[str, int]:
    """All weights of the larger base are trained, so that what a stage shards is most of what there is."""
    config = _config(2, method="full", num_steps=2, batch_size=2, zero_stage=stage)
    measured = _run(f"zero-{stage}", "22M", config, folder)["peak_memory_bytes"]
    load = Load(examples=2, row_tokens=_ROW_TOKENS, answer_tokens=_ANSWER_TOKENS)
    formula = predict_memory(shape_of(folder / "22M", config), config, load, stage=stage)
    facts = {"measured_mib": measured >> 20, "formula_mib": formula.total >> 20, "overhead_mib": formula.overhead >> 20}
    say(f"memory of a worker of two under ZeRO {stage}: {facts}")
    return facts


if __name__ == "__main__":
    from cluster.session import connect

    connect()
    print(json.dumps(measure_scaling(lambda line: print(line, file=sys.stderr, flush=True)), indent=1))
