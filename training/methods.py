"""How a specialist's weights are changed: the base model of a run, with what its method trains on top of it.

LoRA (arXiv 2106.09685), rsLoRA (2312.03732: scale alpha / sqrt(rank)), DoRA (2402.09353), QLoRA (2305.14314: LoRA over a
base held in 4-bit NormalFloat) and full training. What is saved is an ordinary PEFT folder, or the whole model. The
engine that serves specialists, vLLM, takes LoRA and rsLoRA adapters and refuses DoRA ("vLLM does not yet support
DoRA", vllm/lora/peft_helper.py); merging one would mean a whole base per specialist. So DoRA and full training are for
experiments and for bases, and a conversion refuses them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import pathlib
from typing import Any, Literal

from cluster.errors import ConfigError, InputError, TrainingError

Method = Literal["lora", "rslora", "dora", "qlora", "full"]
SERVABLE: tuple[Method, ...] = ("lora", "rslora", "qlora")
"""Whose adapters the serving engine loads."""
UNSHARDED: tuple[Method, ...] = ("dora", "qlora")
"""Cannot run under ZeRO-3: DoRA reads the base's weights outside their layer's forward pass, where they are sharded away;
4-bit weights are packed and have no shards."""
_M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""
_MMAP_THRESHOLD_BYTES = 2**18


def build_model(settings: dict[str, Any]) -> Any:
    """Load the base of a run and put on it what the method trains.

    Raises:
        TrainingError: the base cannot be read, or 4-bit weights are asked of a device that has none.
    """
    method: Method = settings["method"]
    model = load_base(settings, method)
    if settings.get("gradient_checkpointing"):
        _return_freed_memory()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if method == "full" else add_adapter(model, settings, method)


def _return_freed_memory() -> None:
    """Have this process's C library give freed tensors back to the kernel at once, where it is glibc.

    Its heap keeps the pieces that recomputed activations leave behind: seven times what is alive, on a CPU, which takes
    back most of what recomputing saves. A tensor with pages of its own leaves none; a step takes 1.8 times the CPU time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def add_adapter(model: Any, settings: dict[str, Any], method: Method) -> Any:
    """Put an adapter on a base: an untrained one whose weights follow from torch's seed, or where the settings have a
    `start_path` a copy of the one in that PEFT folder.

    Raises:
        TrainingError: the folder holds no adapter of the same layers, rank and scale.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=0.0,
        target_modules=settings["lora_targets"],
        use_rslora=method == "rslora",
        use_dora=method == "dora",
    )
    adapted = get_peft_model(model, lora)
    if settings.get("start_path"):
        _start_from(adapted, pathlib.Path(settings["start_path"]), lora)
    return adapted


def _start_from(model: Any, folder: pathlib.Path, lora: Any) -> None:
    """Give an adapter the weights of another one."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "adapter_model.safetensors")
        saved = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"adapter {str(folder)!r} cannot be read: {type(error).__name__}: {error}") from None
    scale = {"r": lora.r, "lora_alpha": lora.lora_alpha, "use_rslora": lora.use_rslora, "use_dora": lora.use_dora}
    own = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(model).items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != own or any(saved.get(name) != value for name, value in scale.items()):
        raise TrainingError(
            f"adapter {str(folder)!r}: other layers, rank or scale than this training's; it cannot start from it"
        )
    set_peft_model_state_dict(model, weights)


def why_no_4bit(num_gpus: int) -> str | None:
    """Why 4-bit weights cannot be had by a worker with so many GPUs, or None."""
    if num_gpus == 0:
        return "4-bit weights need a CUDA GPU and this worker has none"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "4-bit weights need the package bitsandbytes, which is not installed"
    return None


def check_method(method: Method, gpus_per_worker: int) -> None:
    """Refuse 4-bit weights that cannot be had here, before any Ray call.

    Raises:
        ConfigError: the package for them is not installed, or the run has no GPU.
    """
    if method == "qlora" and (reason := why_no_4bit(gpus_per_worker)):
        raise ConfigError(
            f"finetune.method='qlora': {reason}; allowed: lora, rslora, or finetune.gpus_per_worker=1 where bitsandbytes is "
            "installed; next: finetune.method=lora"
        )


def check_base_folder(folder: pathlib.Path) -> None:
    """Open a base's description and the headers of its weights: what is missing or cut off is told before any worker starts.

    Raises:
        InputError: names the folder, the file and what is wrong with it.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"base folder {str(folder)!r}: no config.json; allowed: a folder of save_pretrained")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"base folder {str(folder)!r}: config.json cannot be read: {error}") from None
    files = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    for index in folder.glob("*.safetensors.index.json"):
        files |= {name: folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))}
    if not files:
        raise InputError(f"base folder {str(folder)!r}: no *.safetensors; allowed: a folder of save_pretrained")
    for file in files.values():
        if not file.exists():
            raise InputError(
                f"base folder {str(folder)!r}: {file.name} is missing; next: fetch or train the base again"
            )
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"base folder {str(folder)!r}: {file.name} is corrupt ({error}); next: fetch or train the base again"
            ) from None


def load_base(settings: dict[str, Any], method: Method) -> Any:
    """The base of a run, ready to be trained on.

    Raises:
        TrainingError: it cannot be read, or 4-bit weights are asked of a device that has none.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32}
    if method == "qlora":
        options = _options_of_4bit(settings)
    try:
        model = AutoModelForCausalLM.from_pretrained(settings["base_path"], trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"base {settings['base_path']!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if method == "qlora":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.config.use_cache = False
    return model


def _options_of_4bit(settings: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` needs to hold the base in 4-bit NormalFloat with quantised constants, as QLoRA does."""
    import torch

    if reason := why_no_4bit(torch.cuda.device_count()):
        raise TrainingError(f"finetune.method='qlora': {reason}; allowed here: lora, rslora, dora, full")
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {
        "dtype": dtype,
        "quantization_config": quantised,
        "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))},
    }
