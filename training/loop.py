"""The training loop of one Ray Train worker: micro-batches, optimiser step, held-out agreement, checkpoint, resume.

One loop for adapters and for full training. The order of batches and dropout follow from the seed and the step number
alone, so a run that resumes does what the undisturbed run would have done. The weights released are those of the
checkpoint that agreed best with the held-out answers (training/stopping.py); without held-out examples, the last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from training.averaging import MovingAverage
from training.batches import Rows
from training.diagnosis import (
    Diagnosis,
    Diverged,
    check_loss,
    is_out_of_memory,
    naming_a_full_disk,
    smaller_micro_batch,
    write_diagnosis,
)
from training.distill import Distiller, StoredDistiller
from training.engine import build_engine
from training.grading import grade_rows
from training.methods import build_model
from training.objective import answer_loss
from training.progress import write_progress
from training.speed import Speed, peak_memory_bytes, time_collectives
from training.stopping import best_point, is_patience_over
from training.watching import Nobody, Watcher, open_watcher

if TYPE_CHECKING:
    from ray.train import Checkpoint

_NUM_CURVE_POINTS = 20
_COMMIT_TIMEOUT_S = 10.0
"""After which a run goes on all the same: a controller that does not answer is not helped by workers that wait."""


class _Run(NamedTuple):
    """What one worker trains with."""

    settings: dict[str, Any]
    engine: Any
    rows: Rows
    held_out: Rows | None
    average: MovingAverage | None
    loss_of: Callable[[Any, dict[str, Any], Any], Any]
    """The share of a batch's loss that a micro-batch has."""
    released: pathlib.Path
    """Local folder for the weights of the best checkpoint so far."""
    rank: int
    world_size: int
    speed: Speed


def train_loop(settings: dict[str, Any]) -> None:
    """Run on every worker of a TorchTrainer.

    Args:
        settings: `training.finetune.finetune` makes them.

    Side effects: reports {step, loss, validation_loss, agreement, released_step, curve}, and of this worker since it
    began {tokens_per_s, communication_share, peak_memory_bytes} (training/speed.py), with a checkpoint every
    `checkpoint_every` steps and at the end; the last checkpoint's `model/` folder holds what is served (PEFT or full
    safetensors). A run that diverges or does not fit in memory leaves its diagnosis and ends; one that is asked to yield
    reports {step, yielded} with a checkpoint and ends.
    """
    path = pathlib.Path(settings["diagnosis_path"])
    size = smaller_micro_batch(path, settings["micro_batch_size"])
    try:
        with tempfile.TemporaryDirectory() as released:
            _train(_build_run({**settings, "micro_batch_size": size}, pathlib.Path(released)))
    except Diverged as error:
        # Every rank ends here together; none raises, or Ray Train would try it all again.
        write_diagnosis(path, Diagnosis(kind="diverged", message=str(error)))
    except RuntimeError as error:
        if is_out_of_memory(error):
            message = f"micro-batch of {size} examples: {str(error).splitlines()[0]}"
            write_diagnosis(path, Diagnosis(kind="out_of_memory", message=message, micro_batch_size=size))
        raise


def rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Learning-rate factor: linear warm-up, then linear decay to zero."""
    return min(1.0, (step + 1) / max(warmup_steps, 1)) * max(0.0, 1.0 - step / max(num_steps, 1))


def _build_run(settings: dict[str, Any], released: pathlib.Path) -> _Run:
    import ray.train
    import torch

    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    torch.set_num_threads(settings["num_threads"])
    torch.manual_seed(settings["seed"])
    engine = build_engine(build_model(settings), settings)
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # However many workers there are, a step is of the examples that all num_workers would share.
    rows = Rows(settings["train_path"], settings, rank, world_size, settings["batch_size"] * settings["num_workers"])
    # Held-out rows are graded one by one, so they are not packed.
    path, unpacked = settings["validation_path"], {**settings, "packing": False}
    held_out = Rows(path, unpacked, 0, 1) if path else None
    average = MovingAverage(engine.module, settings["ema_decay"]) if settings["ema_decay"] else None
    speed = Speed(world_size, blocks=engine.device.type == "cpu")
    time_collectives(speed)
    return _Run(
        settings, engine, rows, held_out, average, _loss_of(settings, engine), released, rank, world_size, speed
    )


def _loss_of(settings: dict[str, Any], engine: Any) -> Callable[[Any, dict[str, Any], Any], Any]:
    distill = {**settings["distill"], "bf16": settings["bf16"]}
    if distill["teacher"]:
        return Distiller(distill, engine).loss
    return StoredDistiller(distill).loss if distill["stored"] else answer_loss


def _train(run: _Run) -> None:
    settings = run.settings
    step, curve, losses = _resume(run)
    with contextlib.closing(open_watcher(settings, step) if run.rank == 0 else Nobody()) as watcher:
        _take_steps(run, watcher, step, curve, losses)


def _take_steps(run: _Run, watcher: Watcher, step: int, curve: list[dict[str, Any]], losses: list[float]) -> None:
    import torch

    settings, engine = run.settings, run.engine
    stride = max(1, settings["num_steps"] // _NUM_CURVE_POINTS)
    # A model comes from its folder in evaluation mode.
    engine.train()
    while step < settings["num_steps"] and not is_patience_over(curve, settings["patience"]):
        # Dropout of a resumed run is that of the undisturbed one: it follows from seed, rank and step alone.
        torch.manual_seed(_seed_of(settings["seed"], run.rank, step))
        rate = _set_learning_rate(engine, settings, step)
        with run.speed.step(run.rows.num_tokens(step)):
            loss = _mean_over_ranks(train_step(engine, run.rows.micro_batches(step), run.loss_of), run)
        check_loss(f"step {step + 1}: the loss", loss, rate, [point["loss"] for point in curve] + losses)
        losses.append(loss)
        if run.average:
            run.average.update()
        step += 1
        is_checkpoint = step % settings["checkpoint_every"] == 0 or step == settings["num_steps"]
        if step % stride == 0 or is_checkpoint:
            curve.append({"step": step, "loss": sum(losses) / len(losses)})
            losses.clear()
        if is_checkpoint:
            _checkpoint(run, step, curve, rate)
        if run.rank == 0 and curve and curve[-1]["step"] == step:
            facts = {**curve[-1], **run.speed.read()}
            write_progress(pathlib.Path(settings["progress_path"]), facts)
            watcher.write(facts)
        if step < settings["num_steps"] and _is_asked_to_yield(run):
            # Not graded: the undisturbed run has no point of its curve here.
            _report(run, {"step": step, "yielded": True}, step, curve, losses)
            return


def _is_asked_to_yield(run: _Run) -> bool:
    """Whether to stop after this step; all ranks agree, as they must before a collective checkpoint."""
    import torch

    is_asked = run.rank == 0 and pathlib.Path(run.settings["yield_path"]).exists()
    if run.world_size == 1:
        return is_asked
    flag = torch.tensor(int(is_asked), device=run.engine.device)
    torch.distributed.broadcast(flag, src=0)
    return bool(flag.item())


def train_step(
    engine: Any,
    micro_batches: list[dict[str, Any]],
    loss_of: Callable[[Any, dict[str, Any], Any], Any] = answer_loss,
) -> float:
    """One optimiser step on a batch in parts. Returns the batch's loss on this rank."""
    total = 0.0
    for number, part in enumerate(micro_batches, 1):
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        loss = loss_of(engine, part, engine.device)
        engine.backward(loss)
        engine.step()
        total += float(loss.detach())
    return total


def _mean_over_ranks(loss: float, run: _Run) -> float:
    """So that all ranks see alike whether it is a number; the gradients' mean is that of this loss."""
    import torch

    if run.world_size == 1:
        return loss
    mean = torch.tensor(loss, device=run.engine.device)
    with run.speed.communication():
        torch.distributed.all_reduce(mean)
    return float(mean) / run.world_size


def _seed_of(seed: int, rank: int, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{rank}:{step}".encode(), digest_size=7).digest(), "big")


def _set_learning_rate(engine: Any, settings: dict[str, Any], step: int) -> float:
    rate = settings["learning_rate"] * rate_factor(step, settings["num_steps"], settings["warmup_steps"])
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    return rate


def _resume(run: _Run) -> tuple[int, list[dict[str, Any]], list[float]]:
    """(steps done, curve, losses since its last point)."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, [], []
    with checkpoint.as_directory() as folder:
        _, state = run.engine.load_checkpoint(folder, tag="last")
        model = pathlib.Path(folder) / "model"
        if run.rank == 0 and model.exists():
            shutil.copytree(model, run.released, dirs_exist_ok=True)
    if run.average:
        run.average.load_state(state["average"])
    return int(state["step"]), list(state["curve"]), list(state["losses"])


def _checkpoint(run: _Run, step: int, curve: list[dict[str, Any]], rate: float) -> None:
    """Grade the weights as they would be served, keep them if they are the best so far, and report."""
    is_last = step == run.settings["num_steps"]
    with run.average.in_place() if run.average else contextlib.nullcontext():
        if run.held_out is not None:
            curve[-1] |= _grade(run, run.held_out)
            before = [point["loss"] for point in curve]
            check_loss(f"step {step}: the validation loss", curve[-1]["validation_loss"], rate, before)
            if best_point(curve) is curve[-1]:
                _save_model(run, run.released)
        elif is_last:
            _save_model(run, run.released)
    best = best_point(curve)
    metrics = {**curve[-1], "released_step": best["step"] if best else step, "curve": curve}
    _report(run, metrics, step, curve, losses=[])


def _grade(run: _Run, held_out: Rows) -> dict[str, float]:
    """Agreement and loss on held-out examples, the same on every rank: all of them act on it."""
    import torch

    run.engine.eval()
    graded = grade_rows(run.engine, held_out, run.engine.device)
    run.engine.train()
    found = [{"validation_loss": graded.loss, "agreement": graded.agreement}]
    if run.world_size > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _report(run: _Run, metrics: dict[str, Any], step: int, curve: list[dict[str, Any]], losses: list[float]) -> None:
    """Report with a checkpoint that holds all that a resumed run needs to be the undisturbed one."""
    from ray.train import Checkpoint

    metrics = {**metrics, **run.speed.read(), "peak_memory_bytes": peak_memory_bytes()}
    state = {"step": step, "curve": curve, "losses": losses, "average": run.average and run.average.state()}
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder)
        with naming_a_full_disk(local):
            run.engine.save_checkpoint(folder, tag="last", client_state=state)
            if run.rank == 0:
                if any(run.released.iterdir()):
                    shutil.copytree(run.released, local / "model")
                (local / "metrics.json").write_text(json.dumps(metrics))
        num_bytes = sum(file.stat().st_size for file in local.rglob("*") if file.is_file())
        with naming_a_full_disk(pathlib.Path(run.settings["progress_path"]).parent, num_bytes):
            report_durably(metrics, Checkpoint.from_directory(folder))


def report_durably(metrics: dict[str, Any], checkpoint: Checkpoint | None) -> None:
    """Report, and wait until a run that is killed from here on would go on from this checkpoint.

    Every worker must call it; one of them may have no checkpoint. Ray's controller takes note of a checkpoint when it asks
    next, at most RAY_TRAIN_HEALTH_CHECK_INTERVAL_S later; a kill before that would cost an interval more.
    """
    import ray.train
    from ray.train import CheckpointConsistencyMode

    ray.train.report(metrics, checkpoint=checkpoint)
    ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, timeout_s=_COMMIT_TIMEOUT_S)


def _save_model(run: _Run, folder: pathlib.Path) -> None:
    """Write what is served. Under ZeRO-3 every rank takes part in gathering the weights."""
    import deepspeed

    module, settings = run.engine.module, run.settings
    parameters = [p for p in module.parameters() if settings["method"] == "full" or p.requires_grad]
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=settings["zero_stage"] == 3):
        if run.rank == 0:
            with naming_a_full_disk(folder):
                module.save_pretrained(folder, safe_serialization=True)
