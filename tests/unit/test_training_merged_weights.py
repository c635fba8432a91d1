"""Merged weights say what base and adapter say, in the base's own type, and are made once."""

from __future__ import annotations

import pathlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY, save_tiny_base
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cluster.errors import TrainingError
from cluster.store import Store
from training.merged_weights import publish_merged


def _save_tokenizer(folder: pathlib.Path) -> None:
    words = WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="1").save_pretrained(folder)


def _save_adapter(base: pathlib.Path, folder: pathlib.Path, seed: int, **changes: object) -> pathlib.Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            # As initialised an adapter changes nothing.
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    base = save_tiny_base(tmp_path / "base")
    _save_tokenizer(base)
    store = Store(str(tmp_path / "store"))
    store.publish("bases/tiny", base, {"base": "tiny"})
    for number, changes in enumerate(({}, {"use_dora": True})):
        adapter = _save_adapter(base, tmp_path / f"adapter{number}", number, **changes)
        store.publish(f"adapters/t/{number}", adapter, {"task_id": "t"})
    return store


@pytest.mark.parametrize("adapter", ["adapters/t/0", "adapters/t/1"], ids=["lora", "dora"])
def test_merged_weights_say_what_base_and_adapter_say(store: Store, adapter: str) -> None:
    path = publish_merged(store, "t", "bases/tiny", adapter)
    base = AutoModelForCausalLM.from_pretrained(store.fetch("bases/tiny")).eval()
    merged = AutoModelForCausalLM.from_pretrained(store.fetch(path)).eval()
    ids = torch.randint(2, VOCABULARY, (3, 20))
    with torch.no_grad():
        alone = base(ids).logits
        both = PeftModel.from_pretrained(base, store.fetch(adapter)).eval()(ids).logits
        assert torch.allclose(merged(ids).logits, both, atol=1e-3)
        assert not torch.allclose(alone, both, atol=1e-1), "the adapter must change something"


def test_it_is_made_once_and_named_by_both_and_keeps_the_base_s_type_and_tokenizer(store: Store, tmp_path) -> None:
    short = AutoModelForCausalLM.from_pretrained(store.fetch("bases/tiny")).to(torch.bfloat16)
    short.save_pretrained(tmp_path / "short")
    _save_tokenizer(tmp_path / "short")
    store.publish("bases/short", tmp_path / "short", {"base": "short"})
    paths = [publish_merged(store, "t", base, "adapters/t/0") for base in ("bases/tiny", "bases/short", "bases/tiny")]
    assert paths[0] == paths[2] != paths[1] and paths[0].startswith("merged/t/")
    assert AutoModelForCausalLM.from_pretrained(store.fetch(paths[1]), dtype="auto").dtype == torch.bfloat16
    assert (store.fetch(paths[1]) / "tokenizer.json").exists()
    assert store.manifest(paths[1])["adapter"] == "adapters/t/0"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_another_base_and_one_that_holds_no_numbers_are_refused(store: Store, tmp_path) -> None:
    other = save_tiny_base(tmp_path / "other", hidden_size=64)
    store.publish("adapters/t/other", _save_adapter(other, tmp_path / "wide", 3), {"task_id": "t"})
    with pytest.raises(TrainingError, match="merge"):
        publish_merged(store, "t", "bases/tiny", "adapters/t/other")
    from safetensors.torch import load_file, save_file

    broken = _save_adapter(store.fetch("bases/tiny"), tmp_path / "broken", 4)
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({name: one * float("nan") for name, one in tensors.items()}, broken / "adapter_model.safetensors")
    store.publish("adapters/t/broken", broken, {"task_id": "t"})
    with pytest.raises(TrainingError, match="merge"):
        publish_merged(store, "t", "bases/tiny", "adapters/t/broken")
    assert not store.list("merged")
