"""training/methods.py: what each method trains and saves, what the engine would refuse, and bases that cannot be used."""

import json
import pathlib
import platform
import subprocess
import sys

import pytest
from tiny_models import make_rows, save_tiny_base, tiny_settings

from cluster.config import validate
from cluster.errors import ConfigError, InputError, TrainingError
from jobs.recipe import load_recipe
from training.finetune import FinetuneConfig
from training.methods import build_model, check_base_folder, check_method, why_no_4bit
from training.objective import answer_loss
from training.packing import collate_padded

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def loss_of(model, seed: int = 2):
    rows = make_rows(5, seed)
    batch = collate_padded([row["input_ids"] for row in rows], [row["num_prompt"] for row in rows], 0)
    return answer_loss(model, batch, "cpu")


@pytest.mark.parametrize(("method", "scale"), [("lora", 2.0), ("rslora", 4.0), ("dora", 2.0)])
def test_an_adapter_learns_is_saved_by_peft_and_says_the_same_when_loaded(base, tmp_path, method, scale):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = build_model(tiny_settings(base_path=str(base), method=method))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in names) and len(names) == 2 * 3 * (3 if method == "dora" else 2)
    assert {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")} == {scale}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = loss_of(model).item()
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = loss_of(model.eval()).item()
    assert trained < first
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["use_rslora"], saved["use_dora"]) == (method == "rslora", method == "dora")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert loss_of(again.eval()).item() == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(base, method):
    import torch

    found = []
    for is_on in (False, True):
        torch.manual_seed(0)
        settings = tiny_settings(base_path=str(base), method=method, gradient_checkpointing=is_on)
        model = build_model(settings).train()
        loss_of(model).backward()
        assert model.is_gradient_checkpointing == is_on
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_4bit_weights_are_refused_where_there_are_none(base, monkeypatch):
    with pytest.raises(ConfigError, match="qlora.*need a GPU; allowed: gpus_per_worker=1"):
        validate(FinetuneConfig, {"method": "qlora"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="method='qlora': 4-bit weights need the package bitsandbytes"):
        check_method("qlora", 1)
    assert "no CUDA GPU" not in why_no_4bit(1)
    with pytest.raises(
        TrainingError, match="4-bit weights need a CUDA GPU and this worker has none; allowed here: lora"
    ):
        build_model(tiny_settings(base_path=str(base), method="qlora"))


@pytest.mark.parametrize("method", ["dora", "full"])
def test_a_conversion_refuses_what_the_engine_cannot_serve_as_an_adapter(method):
    with pytest.raises(ConfigError, match=f"finetune.method='{method}'.*allowed: lora, rslora, qlora"):
        load_recipe(["recipe=demo", f"finetune.method={method}"])
    load_recipe(["recipe=demo", "finetune.method=rslora"])


def test_the_engine_says_of_dora_and_rslora_what_this_says():
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
    facts = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    assert helper(**facts, use_rslora=True)._validate_features() == []
    assert helper(**facts, use_dora=True)._validate_features() == ["vLLM does not yet support DoRA."]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 17}, "micro_batch_size=17: above batch_size=16"),
        ({"method": "dora", "zero_stage": 3}, "zero_stage=3: method='dora'.*allowed: auto, 0, 1, 2"),
        ({"ema_decay": 0.9, "zero_stage": 3}, "zero_stage=3: ema_decay=0.9"),
        ({"offload": "optimizer"}, "offload='optimizer': a CPU worker has no other memory; allowed: auto, none"),
        ({"offload": "parameters", "zero_stage": 2, "gpus_per_worker": 1}, "zero_stage=2; allowed: auto or at least 3"),
    ],
)
def test_settings_that_cannot_go_together_are_refused_with_both_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(FinetuneConfig, changes)


def break_config(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text("{oh")


def cut_weights(folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_weights(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").unlink()


def drop_config(folder: pathlib.Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_config, "config.json cannot be read"),
        (drop_config, "no config.json; allowed: a folder of save_pretrained"),
        (cut_weights, "model.safetensors is corrupt .*; next: fetch or train the base again"),
        (drop_weights, r"no \*.safetensors; allowed: a folder of save_pretrained"),
    ],
)
def test_a_missing_or_corrupt_base_is_named_before_any_worker_starts(tmp_path, harm, message):
    folder = save_tiny_base(tmp_path / "base")
    check_base_folder(folder)
    harm(folder)
    with pytest.raises(InputError, match=message):
        check_base_folder(folder)
    with pytest.raises((TrainingError, InputError)):
        build_model(tiny_settings(base_path=str(folder), method="full"))


def test_a_missing_shard_is_named(tmp_path):
    folder = save_tiny_base(tmp_path / "base")
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="model-2.safetensors is missing"):
        check_base_folder(folder)


HEAP = """
import ctypes, pathlib, sys
from training.methods import _return_freed_memory
if sys.argv[1] == "returning":
    _return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(2):  # of the first round glibc learns what sizes come and go, and keeps them from then on
    large = []
    for _ in range(200):
        large.append(libc.malloc(2**20))
        ctypes.memset(large[-1], 1, 2**20)
        libc.malloc(40_000)  # stays, as an adapter's narrow products do
    for one in large:
        libc.free(one)
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives memory back in its own way")
def test_recomputing_gives_freed_memory_back_to_the_kernel():
    def held_kib(how):
        run = subprocess.run([sys.executable, "-c", HEAP, how], cwd=ROOT, capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert held_kib("keeping") - held_kib("returning") > 100 * 1024


def test_an_adapter_goes_on_from_another_one_of_its_shape_and_from_no_other(base, tmp_path):
    import torch
    from peft import get_peft_model_state_dict

    first = build_model(tiny_settings(base_path=str(base)))
    for parameter in (p for p in first.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    first.save_pretrained(tmp_path / "first")
    settings = {"base_path": str(base), "start_path": str(tmp_path / "first")}
    second = build_model(tiny_settings(**settings))
    weights, others = get_peft_model_state_dict(first), get_peft_model_state_dict(second)
    assert all(torch.equal(weights[name], others[name]) for name in weights) and weights.keys() == others.keys()
    assert {name for name, p in second.named_parameters() if p.requires_grad} == {
        name for name, p in first.named_parameters() if p.requires_grad
    }
    for change in ({"lora_rank": 2}, {"lora_alpha": 4.0}, {"lora_targets": ["q_proj"]}, {"method": "rslora"}):
        with pytest.raises(TrainingError, match="other layers, rank or scale"):
            build_model(tiny_settings(**settings, **change))
    with pytest.raises(TrainingError, match="cannot be read"):
        build_model(tiny_settings(base_path=str(base), start_path=str(tmp_path / "nowhere")))
