"""The training loop of one Ray Train worker for many adapters over one frozen base (training/multi_lora.py).

Each round every adapter that still trains takes one step on its own next batch. DeepSpeed carries the base under ZeRO-3
(sharded over the workers, gathered layer by layer); under ZeRO-0 every worker has it whole and there is nothing for
DeepSpeed to do. The adapters are no part of its engine: they are small, every worker holds them whole, and their
gradients are averaged, clipped and applied adapter by adapter, which an engine that flattens all gradients cannot do. A
checkpoint holds adapters alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from training.engine import avoid_builds, zero_options
from training.loop import report_durably
from training.methods import load_base
from training.multi_lora import Graded, MultiLora, join_batches
from training.multi_member import Member, load_members, save_members
from training.multi_plan import plan_passes
from training.progress import write_progress
from training.speed import Speed, peak_memory_bytes, time_collectives
from training.watching import Nobody, Watcher, open_watcher

_NOBODY = Nobody()


def multi_loop(settings: dict[str, Any]) -> None:
    """Run on every worker of a TorchTrainer.

    Args:
        settings: see `training.multi_finetune`.

    Side effects: reports {step, yielded, adapters: {name: metrics}}, and of this worker since it began {tokens_per_s,
    communication_share, peak_memory_bytes} (training/speed.py), with a checkpoint whenever an adapter's own solo run
    would write one, and where it is asked to yield; the last one's `models/NAME/` are PEFT folders.
    """
    import ray.train
    import ray.train.torch
    import torch
    from ray.train import Checkpoint

    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    torch.set_num_threads(settings["num_threads"])
    device = ray.train.torch.get_device()
    run = ManyRun(settings, device, context.get_world_rank(), context.get_world_size())

    def report(metrics: dict[str, Any], folder: pathlib.Path) -> None:
        # Every worker has the same state; Ray merges what they report, and one of them is enough.
        is_first = context.get_world_rank() == 0
        report_durably(metrics, Checkpoint.from_directory(folder) if is_first else None)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            run.resume(pathlib.Path(folder))
    watcher = open_watcher(settings, run.step) if context.get_world_rank() == 0 else Nobody()
    with contextlib.closing(watcher):
        run.train(report, watcher)


class ManyRun:
    """The adapters of a run on one worker."""

    def __init__(self, settings: dict[str, Any], device: Any, rank: int, world_size: int) -> None:
        self._settings, self._device, self._rank, self._world_size = settings, device, rank, world_size
        base = load_base(settings, "lora").requires_grad_(False).eval()
        self._speed = Speed(world_size, blocks=device.type == "cpu")
        self.members = [Member(one, base, device, rank, world_size, self._speed) for one in settings["adapters"]]
        base = _place_base(base, settings, device)
        if settings["zero_stage"]:
            time_collectives(self._speed)
        self._model = MultiLora(base, [member.factors for member in self.members])
        self.step = 0
        """Rounds done."""

    def resume(self, folder: pathlib.Path) -> None:
        load_members(self.members, folder, self._device)
        self.step = max(member.step for member in self.members)

    def train(self, report: Callable[[dict[str, Any], pathlib.Path], None], watcher: Watcher = _NOBODY) -> None:
        """Until every adapter is done; `report` is called on every worker with metrics and a checkpoint's folder."""
        self._watcher = watcher
        if not any(member.is_training for member in self.members):
            self._report(report)
        while active := [number for number, member in enumerate(self.members) if member.is_training]:
            with self._speed.step(sum(self.members[number].num_tokens for number in active)):
                self._train_round(active)
            self.step += 1
            due = [number for number in active if self.members[number].is_checkpoint and self.members[number].step]
            self._grade([number for number in due if not self.members[number].reason])
            is_over = not any(member.is_training for member in self.members)
            is_yielding = not is_over and self._is_asked_to_yield()
            if due or is_over or is_yielding or any(self.members[number].reason for number in active):
                self._report(report, is_yielding)
            if is_yielding:
                return

    def _is_asked_to_yield(self) -> bool:
        """Whether to stop after this round; all workers agree, as they must before they report."""
        import torch

        flag = torch.tensor(int(self._rank == 0 and pathlib.Path(self._settings["yield_path"]).exists()))
        if self._world_size > 1:
            flag = flag.to(self._device)
            torch.distributed.broadcast(flag, src=0)
        return bool(flag.item())

    def _train_round(self, active: list[int]) -> None:
        import torch

        for numbers in self._passes(active):
            members = [self.members[number] for number in numbers]
            batches = {number: self.members[number].rows.batch(self.members[number].step) for number in numbers}
            losses = self._model.losses(join_batches(batches, self._device))
            torch.stack(losses).sum().backward()
            self._update(members, [loss.detach() for loss in losses])

    def _update(self, members: list[Member], losses: list[Any]) -> None:
        for member, loss in zip(members, losses, strict=True):
            member.update(loss)

    def _passes(self, numbers: list[int]) -> list[list[int]]:
        max_tokens = [self.members[number].settings["max_tokens"] for number in numbers]
        planned = plan_passes(max_tokens, self._settings["tokens_per_pass"])
        return [[numbers[place] for place in places] for places in planned]

    def _grade(self, due: list[int]) -> None:
        """Held-out loss (mean over examples) and agreement, as a solo run has them; every worker grades all examples."""
        waiting = {number: rows for number in due if (rows := self.members[number].held_out) is not None}
        found: dict[int, list[tuple[Graded, int]]] = {number: [] for number in waiting}
        place = 0
        while left := [number for number, rows in waiting.items() if place < rows.num_batches()]:
            for numbers in self._passes(left):
                batch = join_batches({number: waiting[number].batch(place) for number in numbers}, self._device)
                for number, graded, (num_rows, _) in zip(
                    numbers, self._model.grade(batch), batch.segments.shapes, strict=True
                ):
                    found[number].append((graded, num_rows))
            place += 1
        grades = []
        for parts in found.values():
            sums = zip(*((float(g.loss) * n, g.num_right, n) for g, n in parts), strict=True)
            loss, num_right, num_rows = (sum(column) for column in sums)
            grades.append((loss / num_rows, num_right / num_rows))
        for number, (loss, agreement) in zip(found, self._agree_on(grades), strict=True):
            self.members[number].take_grades(loss, agreement)

    def _agree_on(self, grades: list[tuple[float, float]]) -> list[list[float]]:
        """Those of the first worker: what stops an adapter must stop it on all of them."""
        import torch

        values = torch.tensor(grades, dtype=torch.float64, device=self._device).reshape(-1, 2)
        if self._world_size > 1:
            torch.distributed.broadcast(values, src=0)
        return values.tolist()

    def _report(self, report: Callable[[dict[str, Any], pathlib.Path], None], is_yielding: bool = False) -> None:
        adapters = {member.name: member.metrics() for member in self.members}
        metrics = {"step": self.step, "yielded": is_yielding, "adapters": adapters}
        metrics |= self._speed.read() | {"peak_memory_bytes": peak_memory_bytes()}
        with tempfile.TemporaryDirectory() as local:
            folder = pathlib.Path(local)
            if self._rank == 0:
                self._write(folder, metrics)
            report(metrics, folder)

    def _write(self, folder: pathlib.Path, metrics: dict[str, Any]) -> None:
        save_members(self.members, folder)
        (folder / "metrics.json").write_text(json.dumps(metrics))
        for member in self.members:
            if not member.is_training and member.reason is None:
                member.save_peft(folder / "models" / member.name)
        losses = [member.curve[-1]["loss"] for member in self.members if member.curve]
        if losses:
            facts = {"step": self.step, "loss": sum(losses) / len(losses), **self._speed.read()}
            write_progress(pathlib.Path(self._settings["progress_path"]), facts)
            self._watcher.write(facts | self._facts_of_members())

    def _facts_of_members(self) -> dict[str, float]:
        """The last point of the curve of every adapter that trained in this round, each number under the adapter's name."""
        return {
            f"{member.name}/{key}": value
            for member in self.members
            if member.curve and member.step == self.step
            for key, value in member.curve[-1].items()
            if key != "step"
        }


def _place_base(base: Any, settings: dict[str, Any], device: Any) -> Any:
    """The base on this worker's device, whole (ZeRO-0) or sharded (ZeRO-3)."""
    import torch

    if settings["zero_stage"] == 0:
        return base.to(device, torch.bfloat16 if settings["bf16"] else torch.float32)
    import deepspeed

    avoid_builds()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero_options(settings["zero_stage"]),
        "bf16": {"enabled": settings["bf16"]},
    }
    engine, *_ = deepspeed.initialize(model=base, config=config, dist_init_required=False)
    return engine.module
