"""Eight adapters on a base of 0.5B or 1.5B parameters, on one GPU: solo runs, one run of all of them, and PEFT with HF's Trainer.

For a machine with a GPU; on a CPU `--size tiny` shows that it runs. Bases are untrained Llamas in bfloat16, the tasks and
batches those of jobs/bench/multi_lora.py, and each way learns the same steps of the same data: `solo` by this project's
loop and DeepSpeed engine, one adapter after another, `multi_lora` all of them in one run, `trainer` by transformers.Trainer
over PEFT, one after another. Tokens are the examples' own, without padding; loading a base counts for adapters per hour and
not for tokens per second. Model FLOPs of a token are 4 for each weight outside the embeddings (forward, and back to the
inputs; frozen weights have no gradient) and 12 x layers x width x row for attention (Chowdhery et al. 2022, "PaLM",
arXiv 2204.02311, appendix B, without the weights' gradients); MFU is their rate over that of a large matrix product here.

    python -m jobs.bench.gpu_training [--size 0.5B 1.5B] [--steps 50] [--json PATH]
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from cluster.errors import InputError
from jobs.bench.multi_lora import Material, prepare, run_settings
from training.batches import Rows
from training.catalog import ScratchModel
from training.engine import build_engine
from training.loop import train_step
from training.methods import build_model
from training.multi_loop import ManyRun
from training.packing import collate_padded

_SHAPES = {
    "tiny": {"layers": 2, "hidden_size": 64, "heads": 4, "intermediate_size": 160, "vocab_size": 2048},
    "0.5B": {"layers": 24, "hidden_size": 1280, "heads": 20, "intermediate_size": 3456, "vocab_size": 8192},
    "1.5B": {"layers": 28, "hidden_size": 2048, "heads": 16, "intermediate_size": 5632, "vocab_size": 8192},
}
_PEAK_WIDTH = {"cuda": 8192, "cpu": 512}
_TOKENS_PER_PASS = {"cuda": 65536, "cpu": 4096}


class Loop(NamedTuple):
    """Training loops, without what came before them."""

    seconds: float
    num_tokens: int
    """Learned from; the examples' own."""


def measure_gpu(
    say: Callable[[str], object], sizes: Sequence[str] = ("0.5B", "1.5B"), num_steps: int = 50, num_tasks: int = 8
) -> dict[str, Any]:
    """Measure the three ways on each base, on this machine's GPU where there is one.

    Returns:
        {device, peak_tflops, sizes: {size: {parameters, ways: {way: {tokens_per_s, mfu, adapters_per_hour,
        peak_memory_gib}}, multi_lora_over_solo, multi_lora_over_trainer}}}.

    Raises:
        InputError: the shared data is not there.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = _matmul_flops(device)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        _join_alone(device, pathlib.Path(place))
        for size in sizes:
            entry = ScratchModel(kind="scratch", name=size, context_window_tokens=1024, **_SHAPES[size])
            material = prepare(entry, pathlib.Path(place) / size, num_tasks)
            found[size] = _measure_size(entry, material, num_steps, device, peak, say)
        torch.distributed.destroy_process_group()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    return {"device": name, "peak_tflops": peak / 1e12, "steps": num_steps, "sizes": found}


def _measure_size(
    entry: ScratchModel, material: Material, num_steps: int, device: Any, peak: float, say: Callable[[str], object]
) -> dict[str, Any]:
    tasks = material.tasks(num_steps)
    settings = run_settings(material, tasks) | {"bf16": device.type == "cuda"}
    settings["tokens_per_pass"] = _TOKENS_PER_PASS[device.type]
    adapters = [one | {"bf16": settings["bf16"], "zero_stage": 0, "offload": "none"} for one in settings["adapters"]]
    row = sum(material.mean_tokens.values()) / len(material.mean_tokens)
    per_token = _flops_per_token(entry, row)
    ways = {
        "solo": lambda: _add_up(_train_solo(one) for one in adapters),
        "multi_lora": lambda: _train_many(settings, device),
        "trainer": lambda: _add_up(_train_by_trainer(one, device) for one in adapters),
    }
    found: dict[str, Any] = {}
    for name, way in ways.items():
        _forget_memory(device)
        begin = time.monotonic()
        loop = way()
        rate = loop.num_tokens / loop.seconds
        found[name] = {
            "tokens_per_s": rate,
            "mfu": rate * per_token / peak,
            "adapters_per_hour": 3600 * len(adapters) / (time.monotonic() - begin),
            "peak_memory_gib": _peak_memory(device) / 2**30,
        }
        say(f"{entry.name}, {name}: {found[name]}")
    hourly = {name: one["adapters_per_hour"] for name, one in found.items()}
    return {
        "parameters": entry.parameters,
        "ways": found,
        "multi_lora_over_solo": hourly["multi_lora"] / hourly["solo"],
        "multi_lora_over_trainer": hourly["multi_lora"] / hourly["trainer"],
    }


def _train_solo(settings: dict[str, Any]) -> Loop:
    """One adapter, by the loop and engine of a fine-tune."""
    import torch

    torch.manual_seed(settings["seed"])
    engine = build_engine(build_model(settings), settings)
    engine.train()
    rows = Rows(settings["train_path"], settings, 0, 1)
    with _Clock(engine.device) as clock:
        for step in range(settings["num_steps"]):
            train_step(engine, rows.micro_batches(step))
    engine.destroy()
    return Loop(clock.seconds, sum(map(rows.num_tokens, range(settings["num_steps"]))))


def _train_many(settings: dict[str, Any], device: Any) -> Loop:
    run = ManyRun(settings, device, 0, 1)
    with _Clock(device) as clock:
        run.train(lambda metrics, folder: None)
    members = run.members
    return Loop(clock.seconds, sum(one.rows.num_tokens(step) for one in members for step in range(one.step)))


def _train_by_trainer(settings: dict[str, Any], device: Any) -> Loop:
    """One adapter, by the library that most would take: the same batch size, steps and rate, and its own order of rows."""
    import datasets
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    base = AutoModelForCausalLM.from_pretrained(settings["base_path"], dtype=dtype, trust_remote_code=False)
    base.config.use_cache = False
    lora = {
        "r": settings["lora_rank"],
        "lora_alpha": settings["lora_alpha"],
        "target_modules": settings["lora_targets"],
    }
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
    rows = datasets.load_from_disk(settings["train_path"])
    lengths: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings["batch_size"],
            max_steps=settings["num_steps"],
            learning_rate=settings["learning_rate"],
            warmup_steps=settings["warmup_steps"],
            bf16=settings["bf16"],
            use_cpu=device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=settings["seed"],
        )
        collate = functools.partial(_collate, pad=settings["pad_token_id"], lengths=lengths)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
        # Standard output is for the numbers.
        trainer.remove_callback(PrinterCallback)
        with _Clock(device) as clock:
            trainer.train()
    return Loop(clock.seconds, sum(lengths))


def _collate(rows: Sequence[dict[str, Any]], pad: int, lengths: list[int]) -> dict[str, Any]:
    """One batch; the lengths of its rows are noted."""
    lengths += [len(row["input_ids"]) for row in rows]
    batch = collate_padded([row["input_ids"] for row in rows], [row["num_prompt"] for row in rows], pad)
    return {name: batch[name] for name in ("input_ids", "labels")}


class _Clock:
    """Seconds of a block, with what the GPU had still to do."""

    def __init__(self, device: Any) -> None:
        self._device, self.seconds = device, 0.0

    def __enter__(self) -> _Clock:
        _wait_for(self._device)
        self._begin = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        _wait_for(self._device)
        self.seconds = time.monotonic() - self._begin


def _add_up(runs: Iterable[Loop]) -> Loop:
    """All of them together; each one's memory is freed before the next begins."""
    seconds, num_tokens = 0.0, 0
    for run in runs:
        seconds, num_tokens = seconds + run.seconds, num_tokens + run.num_tokens
        gc.collect()
    return Loop(seconds, num_tokens)


def _wait_for(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_memory(device: Any) -> None:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: Any) -> int:
    """Bytes that the GPU held for tensors at most; 0 on a CPU, where one process measures nothing apart."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _matmul_flops(device: Any) -> float:
    """Floating-point operations a second of a large matrix product: the best of ten."""
    import torch

    width = _PEAK_WIDTH[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        with _Clock(device) as clock:
            left @ right
        best = min(best, clock.seconds)
    return 2 * width**3 / best


def _flops_per_token(entry: ScratchModel, row_tokens: float) -> float:
    weights = entry.parameters - entry.vocab_size * entry.hidden_size
    return 4 * weights + 12 * entry.layers * entry.hidden_size * row_tokens


def _join_alone(device: Any, folder: pathlib.Path) -> None:
    """A process group of this process, which DeepSpeed wants."""
    import torch

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)


def main() -> int:
    """Run by hand; prints a line for each way and the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.gpu_training", description="adapters an hour on a GPU")
    parser.add_argument("--size", choices=tuple(_SHAPES), nargs="+", default=("0.5B", "1.5B"), help="of the base")
    parser.add_argument("--tasks", type=int, default=8, help="adapters")
    parser.add_argument("--steps", type=int, default=50, help="of each adapter")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    options = parser.parse_args()
    try:
        say = functools.partial(print, file=sys.stderr, flush=True)
        text = json.dumps(measure_gpu(say, options.size, options.steps, options.tasks), indent=1)
    except InputError as error:
        print(f"gpu_training: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
