"""One adapter of a multi-LoRA run: its weights, optimiser, schedule, curve and stop, apart from all others'.

All its weights lie in one vector, and so do their gradients: one optimiser step, one norm and one message between
workers per adapter. The matrices that the layers use are views of it. Everything here is what training/loop.py and
DeepSpeed's ZeRO-0 engine do for a solo run: initial weights by PEFT from the adapter's own seed, AdamW, a gradient norm
clipped over this adapter's weights alone, linear warm-up and decay.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from training.batches import Rows
from training.engine import adam
from training.loop import rate_factor
from training.methods import add_adapter
from training.multi_lora import Factors
from training.speed import Speed
from training.stopping import best_point, is_patience_over

_MAX_NORM = 1.0
"""That of training.engine.build_engine."""
_NUM_CURVE_POINTS = 20
_STATE, _FACTS = "adapters.safetensors", "adapters.json"


class Member:
    """One adapter in training."""

    def __init__(
        self, settings: dict[str, Any], base: Any, device: Any, rank: int, world_size: int, speed: Speed
    ) -> None:
        """Draw the initial weights. The base is left as it was.

        Args:
            settings: of this adapter, see `training.multi_finetune`.
            speed: told how long the exchange of gradients takes.
        """
        import torch

        self.settings, self.name = settings, settings["name"]
        self._world_size, self._speed = world_size, speed
        torch.manual_seed(settings["seed"])
        with_adapter = add_adapter(base, settings, settings["method"])
        self._lora_config = with_adapter.peft_config["default"]
        drawn = _factors_of(with_adapter)
        with_adapter.unload()
        pieces = [matrix.flatten() for one in drawn.values() for matrix in (one.down, one.up)]
        self._weights = torch.cat(pieces).to(device, torch.float32).requires_grad_()
        # One element more: the loss travels between workers with the gradients.
        self.gradients = torch.zeros(len(self._weights) + 1, device=device)
        self._weights.grad = self.gradients[:-1]
        self._optimizer = adam([self._weights], settings["learning_rate"])
        self.factors = self._views(drawn)
        self.rows = Rows(settings["train_path"], settings, rank, world_size)
        path = settings["validation_path"]
        self.held_out = Rows(path, settings, 0, 1) if path else None
        self._released: Any = None
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self.reason: str | None = None
        """Why it gave up."""

    @property
    def is_training(self) -> bool:
        done = self.step == self.settings["num_steps"] or is_patience_over(self.curve, self.settings["patience"])
        return not done and self.reason is None

    @property
    def num_tokens(self) -> int:
        """That all workers together learn from in this adapter's next step."""
        return self.rows.num_tokens(self.step)

    @property
    def is_checkpoint(self) -> bool:
        """Whether a solo run would write a checkpoint after this step."""
        return self.step % self.settings["checkpoint_every"] == 0 or self.step == self.settings["num_steps"]

    def update(self, loss: Any) -> None:
        """Take a step, once the gradients of this worker's batch are there; every worker takes the same.

        A loss or gradient that is no finite number ends this adapter's training, and leaves its weights as they are.
        """
        import torch

        self.gradients[-1] = loss
        if self._world_size > 1:
            with self._speed.communication():
                torch.distributed.all_reduce(self.gradients)
            self.gradients /= self._world_size
        norm = self._weights.grad.norm()
        of_all, norm_of_all = torch.stack([self.gradients[-1], norm]).tolist()
        rate = self.settings["learning_rate"] * rate_factor(
            self.step, self.settings["num_steps"], self.settings["warmup_steps"]
        )
        if not (math.isfinite(of_all) and math.isfinite(norm_of_all)):
            self.reason = self._diagnose(of_all, norm_of_all, rate)
            self.gradients.zero_()
            return
        self._weights.grad.mul_(min(1.0, _MAX_NORM / (norm_of_all + 1e-6)))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.gradients.zero_()
        self._losses.append(of_all)
        self.step += 1
        stride = max(1, self.settings["num_steps"] // _NUM_CURVE_POINTS)
        if self.step % stride == 0 or self.is_checkpoint:
            self.curve.append({"step": self.step, "loss": sum(self._losses) / len(self._losses)})
            self._losses.clear()

    def take_grades(self, validation_loss: float, agreement: float) -> None:
        """Add what the held-out examples say to the newest point of the curve."""
        self.curve[-1] |= {"validation_loss": validation_loss, "agreement": agreement}
        if best_point(self.curve) is self.curve[-1]:
            self._released = self._weights.detach().clone()

    def metrics(self) -> dict[str, Any]:
        best = best_point(self.curve)
        released = best["step"] if best else self.step
        last = self.curve[-1] if self.curve else {}
        return {**last, "released_step": released, "curve": self.curve, "reason": self.reason}

    def save_peft(self, folder: pathlib.Path) -> None:
        """Write an ordinary PEFT folder, as PeftModel.save_pretrained writes it, without its model card."""
        from safetensors.torch import save_file

        weights = self._weights.detach() if self._released is None else self._released
        tensors = {}
        for name, (down, up) in self._split(weights).items():
            for letter, matrix in (("A", down), ("B", up)):
                tensors[f"base_model.model.{name}.lora_{letter}.weight"] = matrix.cpu().contiguous()
        folder.mkdir(parents=True)
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        self._lora_config.inference_mode = True
        self._lora_config.save_pretrained(str(folder))

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(tensors, plain facts) of a checkpoint; all workers have the same."""
        tensors = {"weights": self._weights.detach()}
        moments = self._optimizer.state[self._weights]
        tensors |= {key: moments[key] for key in ("exp_avg", "exp_avg_sq") if moments}
        if self._released is not None:
            tensors["released"] = self._released
        return tensors, {"step": self.step, "curve": self.curve, "losses": self._losses, "reason": self.reason}

    def load_state(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        import torch

        self.step, self.curve = facts["step"], facts["curve"]
        self._losses, self.reason = facts["losses"], facts["reason"]
        self._released = tensors.get("released")
        with torch.no_grad():
            self._weights.copy_(tensors["weights"])
        if self.step:
            moments = {key: tensors[key] for key in ("exp_avg", "exp_avg_sq")}
            state = {0: {"step": torch.tensor(float(self.step)), **moments}}
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _views(self, drawn: dict[str, Factors]) -> dict[str, Factors]:
        """Leaves for autograd over the one vector, whose gradients land in the other."""
        import torch

        self._shapes = {name: (one.down.shape, one.up.shape) for name, one in drawn.items()}
        values, grads = self._split(self._weights.detach()), self._split(self._weights.grad)
        views = {}
        for name, one in drawn.items():
            pair = [torch.nn.Parameter(value) for value in values[name]]
            for leaf, grad in zip(pair, grads[name], strict=True):
                leaf.grad = grad
            views[name] = Factors(*pair, one.scale)
        return views

    def _split(self, vector: Any) -> dict[str, tuple[Any, Any]]:
        parts, begin = {}, 0
        for name, shapes in self._shapes.items():
            pair = []
            for shape in shapes:
                pair.append(vector[begin : begin + shape.numel()].view(shape))
                begin += shape.numel()
            parts[name] = (pair[0], pair[1])
        return parts

    def _diagnose(self, loss: float, norm: float, rate: float) -> str:
        last = f"{self._losses[-1]:.4g}" if self._losses else f"{self.curve[-1]['loss']:.4g}" if self.curve else "none"
        return (
            f"step {self.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g} at learning rate {rate:.3g}; loss before: "
            f"{last}; next: a lower finetune.learning_rate (such as {rate / 10:.1g}), or more finetune.warmup_steps"
        )


def save_members(members: list[Member], folder: pathlib.Path) -> None:
    """Write the state of all adapters for `load_members`."""
    from safetensors.torch import save_file

    tensors, facts = {}, {}
    for number, member in enumerate(members):
        own, facts[member.name] = member.state()
        tensors |= {f"{number}.{key}": tensor.cpu() for key, tensor in own.items()}
    save_file(tensors, str(folder / _STATE))
    (folder / _FACTS).write_text(json.dumps(facts))


def load_members(members: list[Member], folder: pathlib.Path, device: Any) -> None:
    """Go on where a checkpoint left off."""
    from safetensors.torch import load_file

    tensors = load_file(folder / _STATE, device=str(device))
    facts = json.loads((folder / _FACTS).read_text())
    for number, member in enumerate(members):
        own = {key.partition(".")[2]: one for key, one in tensors.items() if key.startswith(f"{number}.")}
        member.load_state(own, facts[member.name])


def _factors_of(with_adapter: Any) -> dict[str, Factors]:
    """Linear layer of the base -> the matrices that PEFT drew for it.

    Raises:
        AssertionError: an adapter that is more than two matrices at linear layers.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in with_adapter.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            assert isinstance(layer.base_layer, torch.nn.Linear) and not layer.lora_variant, name
            down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            found[name] = Factors(down, up, layer.scaling["default"])
    trained = sum(p.numel() for p in with_adapter.parameters() if p.requires_grad)
    assert trained == sum(one.down.numel() + one.up.numel() for one in found.values()), "more than LoRA is trained"
    return found
