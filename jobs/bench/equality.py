"""Whether adapters of one run come out as their solo runs: side by side in one process, and with two that mix them up on purpose.

Losses of every step and weights at the end are compared; a wrong run must be seen by both, or the comparison shows nothing.
"""

from __future__ import annotations

import math
from typing import Any

from training.batches import Rows
from training.engine import adam
from training.loop import rate_factor
from training.methods import build_model
from training.multi_loop import ManyRun
from training.objective import answer_loss

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
"""Absolute, in fp32; losses are between 0 and 10, weights of the order of 0.1."""


class SwappedGradients(ManyRun):
    """A wrong run: the first two adapters, of one shape, get each other's gradients."""

    def _update(self, members: list[Any], losses: list[Any]) -> None:
        first, second = (member.gradients for member in members[:2])
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        super()._update(members, losses)


class SharedClip(ManyRun):
    """A wrong run: gradients are clipped by one norm over all adapters."""

    def _update(self, members: list[Any], losses: list[Any]) -> None:
        norm = math.sqrt(sum(float(member.gradients.norm()) ** 2 for member in members))
        for member in members:
            member.gradients.mul_(min(1.0, 1.0 / norm))
        super()._update(members, losses)


def train_alone(settings: dict[str, Any], num_parts: int = 1) -> tuple[list[float], Any]:
    """A solo run's arithmetic without Ray and DeepSpeed: losses of all steps, and the PEFT model.

    Args:
        num_parts: a batch's gradients are summed from so many parts; exactly the same but for rounding.
    """
    import torch

    torch.manual_seed(settings["seed"])
    model = build_model(settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adam(parameters, settings["learning_rate"])
    parts = {"micro_batch_size": -(-settings["batch_size"] // num_parts)} if num_parts > 1 else {}
    rows, losses = Rows(settings["train_path"], settings | parts, 0, 1), []
    for step in range(settings["num_steps"]):
        rate = settings["learning_rate"] * rate_factor(step, settings["num_steps"], settings["warmup_steps"])
        optimizer.param_groups[0]["lr"] = rate
        total = 0.0
        for part in rows.micro_batches(step):
            loss = answer_loss(model, part, "cpu")
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model


def train_together(settings: dict[str, Any], kind: type[ManyRun] = ManyRun) -> ManyRun:
    """A multi-LoRA run in this process, to its end."""
    import torch

    run = kind(settings, torch.device("cpu"), 0, 1)
    run.train(lambda metrics, folder: None)
    return run


def measure_equality(settings: dict[str, Any]) -> dict[str, Any]:
    """Two adapters of one shape, in this process: rightly together, and mixed up in two ways.

    Args:
        settings: of a multi-LoRA run of the two.

    Returns:
        {negative_control: {run: differences}, is_equal, negative_control_fails}.
    """
    alone = [train_alone(one) for one in settings["adapters"]]
    found = {}
    for kind in (ManyRun, SwappedGradients, SharedClip):
        run = train_together(settings, kind)
        losses, weights = [], []
        for member, (solo_losses, model) in zip(run.members, alone, strict=True):
            losses += [abs(p["loss"] - loss) for p, loss in zip(member.curve, solo_losses, strict=True)]
            solo = {name: p for name, p in model.named_parameters() if p.requires_grad}
            for name, factors in member.factors.items():
                for letter, own in (("A", factors.down), ("B", factors.up)):
                    other = solo[f"base_model.model.{name}.lora_{letter}.default.weight"]
                    weights.append(float((own - other).detach().abs().max()))
        found[kind.__name__] = {"max_loss_diff": max(losses), "max_weight_diff": max(weights)}
    fails = {
        name: one["max_loss_diff"] > LOSS_TOLERANCE and one["max_weight_diff"] > WEIGHT_TOLERANCE
        for name, one in found.items()
    }
    return {
        "negative_control": found,
        "is_equal": not fails.pop(ManyRun.__name__),
        "negative_control_fails": all(fails.values()),
    }


def measure_growth(settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far losses of a long run come from those of its solo runs, beside what rounding alone does.

    Training at a high rate doubles a difference of the last digit again and again, so after hundreds of steps no tolerance
    tells a wrong run from a right one. The measure is the same solo run with its batches summed from two parts.

    Args:
        settings: of a multi-LoRA run.

    Returns:
        {adapter: {learning_rate, multi_lora, solo_in_two_parts}}: the largest difference between means of
        a twentieth of the steps.
    """
    together = train_together(settings)
    found = {}
    for member, one in zip(together.members, settings["adapters"], strict=True):
        stride = max(1, one["num_steps"] // 20)
        alone, in_parts = (_means(train_alone(one, parts)[0], stride) for parts in (1, 2))
        # Its last point may be the mean of fewer steps, and has no counterpart.
        many = [point["loss"] for point in member.curve]
        found[member.name] = {
            "learning_rate": one["learning_rate"],
            "multi_lora": max(abs(a - b) for a, b in zip(many, alone, strict=False)),
            "solo_in_two_parts": max(abs(a - b) for a, b in zip(in_parts, alone, strict=True)),
        }
    return found


def _means(losses: list[float], stride: int) -> list[float]:
    return [sum(losses[k : k + stride]) / stride for k in range(0, len(losses) - stride + 1, stride)]
