"""Predicted against measured peak memory of a fine-tune's worker on CPU, over bases, methods and micro-batches.

Each case runs in a process of its own, which does what a worker does (build the model and the engine, take two steps) and
reports the highest resident memory that the kernel saw. The rows are all of one length, so nothing else varies. A GPU's
prediction differs in its overhead alone and is not checked here.

    python -m jobs.bench.memory
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from cluster.errors import TrainingError
from training.catalog import ScratchModel
from training.dataset import save_dataset
from training.finetune import FinetuneConfig
from training.memory import Load, predict_memory, shape_of_scratch
from training.scratch import init_model

_SMALL = {"layers": 4, "hidden_size": 192, "heads": 3, "intermediate_size": 448, "vocab_size": 2048}
_LARGE = {"layers": 12, "hidden_size": 384, "heads": 6, "intermediate_size": 1024, "vocab_size": 2048}
_BASES = {
    name: ScratchModel(kind="scratch", name=name, context_window_tokens=1024, **shape)
    for name, shape in {"2M": _SMALL, "22M": _LARGE}.items()
}
_ROW_TOKENS, _ANSWER_TOKENS = 256, 64
_CASES = (
    ("2M", "lora", 8, False),
    ("2M", "lora", 64, False),
    ("2M", "full", 32, False),
    ("22M", "lora", 8, False),
    ("22M", "lora", 32, False),
    ("22M", "full", 8, False),
    ("22M", "lora", 32, True),
)
"""(base, method, examples in a micro-batch, recomputed activations)."""


def measure_memory(say: Callable[[str], object], quick: bool = False) -> dict[str, Any]:
    """Run the cases one after another.

    Args:
        quick: the first two.

    Returns:
        {memory_prediction_error: largest |predicted / measured - 1|, cases: facts of each}.

    Raises:
        TrainingError: a case's process failed.
    """
    cases = []
    for base, method, examples, recomputes in _CASES[: 2 if quick else None]:
        config = FinetuneConfig(method=method, batch_size=examples, gradient_checkpointing=recomputes)
        load = Load(examples=examples, row_tokens=_ROW_TOKENS, answer_tokens=_ANSWER_TOKENS)
        predicted = predict_memory(shape_of_scratch(_BASES[base], config), config, load, stage=0)
        measured = _run_case(base, config)
        facts = {"base": base, "method": method, "examples": examples, "recomputes": recomputes}
        facts |= {"predicted_mib": predicted.total >> 20, "measured_mib": measured["peak"] >> 20}
        facts |= {"imports_mib": measured["imports"] >> 20, "error": predicted.total / measured["peak"] - 1}
        say(f"memory {facts}")
        cases.append(facts)
    return {"memory_prediction_error": max(abs(one["error"]) for one in cases), "cases": cases}


def _run_case(base: str, config: FinetuneConfig) -> dict[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "jobs.bench.memory", base, config.model_dump_json()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise TrainingError(f"memory case {base}: {run.stderr.splitlines()[-1] if run.stderr else run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


def _take_steps(base: str, config: FinetuneConfig, folder: pathlib.Path) -> dict[str, int]:
    """What a worker does, in this process; resident bytes after its imports and at the peak."""
    import datasets  # noqa: F401  every worker's imports, before anything is loaded
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import ray.train  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from training.batches import Rows
    from training.engine import build_engine
    from training.loop import train_step
    from training.methods import build_model

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    ids = [5 + k % 2000 for k in range(_ROW_TOKENS)]
    rows = [{"input_ids": ids, "num_prompt": _ROW_TOKENS - _ANSWER_TOKENS}] * config.batch_size
    save_dataset(rows, folder / "rows")
    imports = _resident_bytes("VmRSS")
    settings = config.model_dump(mode="json") | {"base_path": str(folder / "base"), "zero_stage": 0, "offload": "none"}
    settings |= {"pad_token_id": 0}
    engine = build_engine(build_model(settings), settings)
    engine.train()
    data = Rows(str(folder / "rows"), settings, 0, 1)
    for step in range(2):
        train_step(engine, data.micro_batches(step))
    return {"imports": imports, "peak": _resident_bytes("VmHWM")}


def _resident_bytes(field: str) -> int:
    """From the kernel's /proc: VmRSS is the memory held, VmHWM the most that was."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _write_base(base: str, folder: pathlib.Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from training.scratch import train_tokenizer

    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["a"], _BASES[base].vocab_size)
    init_model(_BASES[base], tokenizer, folder, seed=0)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        with tempfile.TemporaryDirectory() as place:
            # In a child: the weights that are written must not count as the worker's.
            writer = os.fork()
            if not writer:
                _write_base(sys.argv[1], pathlib.Path(place) / "base")
                os._exit(0)
            os.waitpid(writer, 0)
            settings_text = sys.argv[2]
            print(
                json.dumps(
                    _take_steps(sys.argv[1], FinetuneConfig.model_validate_json(settings_text), pathlib.Path(place))
                )
            )
    else:
        print(json.dumps(measure_memory(lambda line: print(line, file=sys.stderr)), indent=1))
