"""A trained adapter -> its model card: the README.md that stands beside its weights and goes wherever they go.

Front matter as on the Hugging Face hub (https://huggingface.co/docs/hub/model-cards). It tells what the weights were
made from and for, and holds no message, no duration and no date: equal runs have equal cards. What the run cost and
which code made it stands in the manifest, what the gate promises in the report.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from cluster.records import TaskSpec
from training.finetune import FinetuneConfig

CARD_FILE = "README.md"
_METRICS = ("step", "loss", "validation_loss")


def write_card(
    folder: pathlib.Path,
    task: TaskSpec,
    base: str,
    license_name: str | None,
    config: FinetuneConfig,
    metrics: dict[str, Any],
    snapshot: str,
) -> None:
    """Write the card into the adapter's folder, replacing the one that PEFT leaves there.

    Args:
        base: store path of the base model.
        license_name: the base's, which its adapters are bound by; None where the catalog does not know it.
    """
    front = {"base_model": base, "library_name": "peft", "license": license_name or "unknown", "tags": ["understudy"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {_plain(task.name)}", ""]
    lines += [
        f"A LoRA adapter for one recurrent kind of LLM call (`{task.task_id}`, answers of kind {task.kind}), trained on the",
        "redacted answers of the LLM that it stands in for. It is meant to answer calls that the router sends to this",
        "task, behind the gate of its release, and nothing else: outside it, what it says is not known to be right.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(task, config, metrics, snapshot).items()),
        "",
    ]
    (folder / CARD_FILE).write_text("\n".join(lines), encoding="utf-8")


def _facts(task: TaskSpec, config: FinetuneConfig, metrics: dict[str, Any], snapshot: str) -> dict[str, str]:
    counts = ", ".join(f"{split} {num}" for split, num in task.num_examples.items())
    clients = "one client" if task.num_clients <= 1 else f"{task.num_clients} clients"
    facts = {
        "examples": counts,
        "from": f"{clients}, {task.num_sessions} sessions, snapshot `{snapshot}`",
        "reference": "answers of the LLM" if task.reference == "llm" else "human answers",
        "rank, alpha": f"{config.lora_rank}, {config.lora_alpha:g}",
        "batch, rate, seed": f"{config.batch_size} x {config.num_workers}, {config.learning_rate:g}, {config.seed}",
    }
    return facts | {name: f"{metrics[name]:.4g}" for name in _METRICS if metrics.get(name) is not None}


def _plain(name: str) -> str:
    """Task names come from traffic: nothing in one may be read as Markdown or HTML."""
    return "".join(char if char.isalnum() or char in " -_." else " " for char in name).strip() or "task"
