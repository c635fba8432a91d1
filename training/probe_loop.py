"""One probe, as Ray runs it: a Tune trial that trains by Ray Train, scores itself after a quarter, a half and all of the
steps, and is stopped there where halving says so (S4).

With one worker Train runs the loop in the trial's own process, which the next trial reuses: starting processes would
cost most of a short probe. With more it starts them, DeepSpeed shards as in a fine-tune, and every report travels to the
trial. A score is the share of validation examples that greedy decoding would answer exactly as the reference, read off
one forward pass (training/grading.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from training.batches import Rows
from training.engine import build_engine
from training.grading import Graded, grade_rows
from training.loop import rate_factor
from training.methods import build_model
from training.objective import answer_loss
from training.paired import answers_by_row


def probe_trial(config: dict[str, Any]) -> None:
    """Run as a Ray Tune trial.

    Args:
        config: {"trial": settings}, see `training.probe`.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = config["trial"]
    num_workers, callbacks = 0, []
    if settings["num_workers"] > 1:
        from ray.tune.integration.ray_train import TuneReportCallback

        num_workers, callbacks = settings["num_workers"], [TuneReportCallback()]
    use_gpu = settings["gpus_per_worker"] > 0
    resources = {"CPU": settings["cpus_per_worker"], **({"GPU": settings["gpus_per_worker"]} if use_gpu else {})}
    TorchTrainer(
        probe_loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(name=settings["name"], storage_path=settings["storage"], callbacks=callbacks),
    ).fit()


def probe_loop(settings: dict[str, Any]) -> None:
    """Run on every worker of the trial's trainer; reports {step, halving_score, rungs, few_shot, answers} after each rung."""
    rank, num_workers, report = _join_workers(settings)
    run_probe(settings, report, rank, num_workers)


def run_probe(
    settings: dict[str, Any],
    report: Callable[[dict[str, Any]], None],
    rank: int = 0,
    num_workers: int = 1,
    on_graded: Callable[[int, Mapping[str, Graded]], object] = lambda step, graded: None,
) -> None:
    """Train and score in this process; see `probe_loop`.

    Args:
        settings: `training.probe.trial_settings` makes them.
        on_graded: called with every rung's steps and task_id -> grades, in the order of `training.paired.keys_in_order`.
    """
    import torch

    torch.set_num_threads(settings["num_threads"])
    torch.manual_seed(settings["seed"])
    learner = _build_learner(settings, num_workers)
    rows = Rows(settings["train_path"], settings, rank, num_workers)
    began = time.monotonic()
    few_shot = _score_tasks(learner, settings["few_shot_paths"], settings)
    rungs: list[dict[str, Any]] = []
    num_tokens = 0
    for step in range(settings["num_steps"] + 1):
        if step in settings["rungs"]:
            rung = {"num_steps": step, "num_tokens": num_tokens, "seconds": round(time.monotonic() - began, 2)}
            graded = _score_tasks(learner, settings["validation_paths"], settings)
            on_graded(step, graded)
            rungs.append(_score_rung(graded, settings) | rung)
            halving_score = score_for_halving(rungs[-1]["score"], settings["size_penalty"], settings["target"])
            few = _shares(few_shot, settings["num_scored"]) if settings["few_shot_paths"] else None
            found = {"step": step, "halving_score": halving_score, "rungs": list(rungs), "few_shot": few}
            if settings["with_answers"]:
                found["answers"] = answers_by_row(graded, settings["validation_paths"], settings)
            report(found)
        if step < settings["num_steps"]:
            batch = rows.batch(step)
            num_tokens += batch["input_ids"].numel() * num_workers
            _train_step(learner, batch, settings, step)


def score_for_halving(score: float, size_penalty: float, target: float | None = None) -> float:
    """What halving ranks by: of two candidates within the tolerance, or both at the target, it keeps the smaller one.

    Size does not count among candidates that have not answered anything yet: ties go on.
    """
    return max(0.0, min(score, 1.0 if target is None else target) - size_penalty)


def coverage_at(graded: Graded, epsilon: float) -> float:
    """Largest share of the examples, most confident first, of which at most `epsilon` are wrong; no bound is tested."""
    order = sorted(range(len(graded.is_right)), key=lambda k: -graded.confidences[k])
    best = num_wrong = 0
    for count, k in enumerate(order, 1):
        num_wrong += not graded.is_right[k]
        best = count if num_wrong <= epsilon * count else best
    return best / len(order) if order else 0.0


class _Learner(NamedTuple):
    model: Any
    """Called for logits; a DeepSpeed engine where several workers train it."""
    device: Any
    groups: Sequence[dict[str, Any]]
    """The optimiser's parameter groups."""
    update: Callable[[Any], None]
    """Takes the loss."""


def _join_workers(settings: dict[str, Any]) -> tuple[int, int, Callable[[dict[str, Any]], None]]:
    """Rank, number of workers, and how to report. In the trial's own process Tune forbids what Train has for its workers."""
    if settings["num_workers"] == 1:
        from ray import tune

        return 0, 1, tune.report
    import ray.train

    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    return context.get_world_rank(), context.get_world_size(), ray.train.report


def _build_learner(settings: dict[str, Any], num_workers: int) -> _Learner:
    import torch

    model = build_model(settings)
    if num_workers > 1:
        engine = build_engine(model, settings)

        def step_engine(loss: Any) -> None:
            engine.backward(loss)
            engine.step()

        return _Learner(engine, engine.device, engine.optimizer.param_groups, step_engine)
    device = torch.device("cuda" if settings["gpus_per_worker"] else "cpu")
    model = model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"])

    def step_model(loss: Any) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _Learner(model, device, optimizer.param_groups, step_model)


def _train_step(learner: _Learner, batch: Any, settings: dict[str, Any], step: int) -> None:
    rate = settings["learning_rate"] * rate_factor(step, settings["num_steps"], settings["num_steps"] // 10)
    for group in learner.groups:
        group["lr"] = rate
    learner.model.train()
    with _precision(learner, settings):
        loss = answer_loss(learner.model, batch, learner.device)
    learner.update(loss)


def _score_tasks(learner: _Learner, paths: Mapping[str, str], settings: dict[str, Any]) -> dict[str, Graded]:
    """task_id -> grades; every worker scores every example, as a sharded model needs all of them in step."""
    learner.model.eval()
    unpacked = {**settings, "packing": False}
    with _precision(learner, settings):
        return {
            task_id: grade_rows(learner.model, Rows(path, unpacked, 0, 1), learner.device)
            for task_id, path in paths.items()
        }


def _precision(learner: _Learner, settings: dict[str, Any]) -> Any:
    import torch

    return torch.autocast(learner.device.type, torch.bfloat16, enabled=settings["bf16"])


def _shares(graded: Mapping[str, Graded], num_scored: Mapping[str, int]) -> dict[str, float]:
    """task_id -> share of right answers; examples whose prompt did not fit count as wrong."""
    return {
        task_id: sum(graded[task_id].is_right) / n if task_id in graded else 0.0 for task_id, n in num_scored.items()
    }


def _score_rung(graded: Mapping[str, Graded], settings: dict[str, Any]) -> dict[str, Any]:
    shares = _shares(graded, settings["num_scored"])
    coverage = {}
    for task_id, num_scored in settings["num_scored"].items():
        one = graded.get(task_id, Graded([], []))
        coverage[task_id] = coverage_at(one, settings["epsilon"]) * len(one.is_right) / num_scored
    return {"score": sum(shares.values()) / len(shares), "task_scores": shares, "task_coverage": coverage}
