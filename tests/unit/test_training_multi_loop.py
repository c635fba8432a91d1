"""Multi-LoRA training in one process: each adapter ends as its solo run, and a wrong mixing of adapters is seen.

The solo run here is training/loop.py's arithmetic without Ray and DeepSpeed; tests/integration/test_multi_lora.py
compares with the real one.
"""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.bench.equality import LOSS_TOLERANCE, WEIGHT_TOLERANCE, SharedClip, SwappedGradients
from training.batches import Rows
from training.dataset import save_dataset
from training.grading import grade_rows
from training.loop import rate_factor
from training.methods import build_model
from training.multi_loop import ManyRun
from training.objective import answer_loss
from training.stopping import best_point

VOCAB = 96
COMMON = {"pad_token_id": 0, "method": "lora", "patience": 0, "checkpoint_every": 4, "max_tokens": 200}
MIXED = [
    {"lora_rank": 2, "lora_alpha": 8.0, "lora_targets": ["q_proj", "v_proj"], "learning_rate": 2e-2, "seed": 1},
    {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": ["q_proj", "down_proj"], "learning_rate": 5e-3, "seed": 2},
    {"lora_rank": 5, "lora_alpha": 4.0, "lora_targets": ["up_proj", "o_proj"], "learning_rate": 1e-2, "seed": 3},
]
SIZES = [{"batch_size": 4, "num_steps": 12}, {"batch_size": 3, "num_steps": 7}, {"batch_size": 6, "num_steps": 10}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A base, three datasets of different sizes and lengths, and held-out rows."""
    folder = tmp_path_factory.mktemp("multi")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape)).save_pretrained(folder / "base")
    for number, num_rows in enumerate((19, 7, 50)):
        save_dataset(make_rows(num_rows, number), folder / f"train{number}")
    save_dataset(make_rows(9, 9), folder / "held_out")
    return folder


def make_rows(num_rows: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        ids = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(6, 12 + 6 * seed))]
        rows.append({"input_ids": ids + ids[-2:], "num_prompt": len(ids)})
    return rows


def mixed_settings(folder: pathlib.Path, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            **COMMON,
            **own,
            **size,
            "name": f"task{number}",
            "warmup_steps": number,
            "base_path": str(folder / "base"),
            "train_path": str(folder / f"train{number}"),
            "validation_path": str(folder / "held_out") if number < 2 else None,
            **changes,
        }
        for number, (own, size) in enumerate(zip(MIXED, SIZES, strict=True))
    ]


def run_settings(folder: pathlib.Path, adapters: list[dict[str, Any]], tokens_per_pass: int = 10_000) -> dict[str, Any]:
    return {
        "adapters": adapters,
        "base_path": str(folder / "base"),
        "zero_stage": 0,
        "bf16": False,
        "tokens_per_pass": tokens_per_pass,
        "progress_path": str(folder / "progress"),
        "yield_path": str(folder / "yield"),
    }


class Reports:
    """What a run reported: metrics, and the checkpoints in a folder of the test's own."""

    def __init__(self, folder: pathlib.Path, stop_after: int | None = None) -> None:
        self.folder, self.metrics, self._stop_after = folder, [], stop_after

    def __call__(self, metrics: dict[str, Any], folder: pathlib.Path) -> None:
        self.metrics.append(json.loads(json.dumps(metrics)))
        folder.rename(self.folder / str(len(self.metrics)))
        folder.mkdir()
        if len(self.metrics) == self._stop_after:
            raise InterruptedError

    @property
    def last(self) -> pathlib.Path:
        return self.folder / str(len(self.metrics))

    def adapter(self, name: str) -> dict[str, Any]:
        return self.metrics[-1]["adapters"][name]


def train_many(settings: dict[str, Any], tmp_path: pathlib.Path, kind: type[ManyRun] = ManyRun) -> Reports:
    reports = Reports(tmp_path)
    kind(settings, torch.device("cpu"), 0, 1).train(reports)
    return reports


def train_solo(settings: dict[str, Any], folder: pathlib.Path, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Train alone, all steps or the first of them, save as PEFT does, and return the curve."""
    torch.manual_seed(settings["seed"])
    model = build_model(settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    rows = Rows(settings["train_path"], settings, 0, 1)
    held_out = Rows(settings["validation_path"], settings, 0, 1) if settings["validation_path"] else None
    curve, every = [], settings["checkpoint_every"]
    for step in range(settings["num_steps"])[:stop_after]:
        rate = rate_factor(step, settings["num_steps"], settings["warmup_steps"]) * settings["learning_rate"]
        optimizer.param_groups[0]["lr"] = rate
        loss = answer_loss(model, rows.batch(step), "cpu")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append({"step": step + 1, "loss": loss.item()})
        if held_out and ((step + 1) % every == 0 or step + 1 == settings["num_steps"]):
            graded = grade_rows(model, held_out, "cpu")
            curve[-1] |= {"validation_loss": graded.loss, "agreement": graded.agreement}
            if best_point(curve) is curve[-1]:
                model.save_pretrained(folder)
    if not held_out:
        model.save_pretrained(folder)
    return curve


def differences(folder: pathlib.Path, adapters: list[dict[str, Any]], reports: Reports) -> tuple[float, float]:
    """Largest difference of a loss and of a weight between the run's adapters and their solo runs."""
    losses, weights = [], []
    for one in adapters:
        solo_folder = reports.folder / "solo" / one["name"]
        solo = train_solo(one, solo_folder)
        many = reports.adapter(one["name"])["curve"]
        assert [point["step"] for point in many] == [point["step"] for point in solo]
        for own, other in zip(many, solo, strict=True):
            assert ("validation_loss" in own) == ("validation_loss" in other)
            losses += [abs(own[key] - other[key]) for key in other if key != "step"]
        saved, expected = (
            load_file(f / "adapter_model.safetensors") for f in (reports.last / "models" / one["name"], solo_folder)
        )
        assert saved.keys() == expected.keys()
        weights += [float((saved[key] - expected[key]).abs().max()) for key in saved]
    return max(losses), max(weights)


@pytest.mark.parametrize("tokens_per_pass", [10_000, 1])
def test_each_adapter_has_the_losses_and_weights_of_its_solo_run(
    folder: pathlib.Path, tmp_path: pathlib.Path, tokens_per_pass: int
) -> None:
    adapters = mixed_settings(folder)
    reports = train_many(run_settings(folder, adapters, tokens_per_pass), tmp_path)
    loss, weight = differences(folder, adapters, reports)
    assert loss < LOSS_TOLERANCE and weight < WEIGHT_TOLERANCE


@pytest.mark.parametrize("kind", [SwappedGradients, SharedClip])
def test_the_comparison_sees_adapters_that_were_mixed_up(
    folder: pathlib.Path, tmp_path: pathlib.Path, kind: type[ManyRun]
) -> None:
    adapters = [{**one, **MIXED[0], "num_steps": 8} for one in mixed_settings(folder)[:2]]
    right = train_many(run_settings(folder, adapters), tmp_path)
    assert max(differences(folder, adapters, right)) < WEIGHT_TOLERANCE
    (tmp_path / "wrong").mkdir()
    wrong = train_many(run_settings(folder, adapters), tmp_path / "wrong", kind)
    loss, weight = differences(folder, adapters, wrong)
    assert loss > 10 * LOSS_TOLERANCE and weight > 10 * WEIGHT_TOLERANCE


def test_a_folder_is_what_peft_writes_and_loads(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapters = mixed_settings(folder, num_steps=2)
    reports = train_many(run_settings(folder, adapters), tmp_path)
    for one in adapters:
        saved, solo = reports.last / "models" / one["name"], tmp_path / "solo" / one["name"]
        train_solo(one, solo)
        configs = [json.loads((place / "adapter_config.json").read_text()) for place in (saved, solo)]
        for config in configs:
            config["target_modules"].sort()
        assert configs[0] == configs[1]
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        loaded = PeftModel.from_pretrained(base, saved)
        rows = Rows(one["train_path"], one, 0, 1)
        of_solo = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), solo)
        ids = rows.batch(0)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, of_solo(ids).logits, atol=1e-4, rtol=0)


def test_a_run_that_was_cut_off_ends_as_the_undisturbed_one(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = run_settings(folder, mixed_settings(folder))
    (tmp_path / "whole").mkdir()
    whole = train_many(settings, tmp_path / "whole")
    cut = Reports(tmp_path, stop_after=3)
    with pytest.raises(InterruptedError):
        ManyRun(settings, torch.device("cpu"), 0, 1).train(cut)
    steps = [one["curve"][-1]["step"] for one in cut.metrics[-1]["adapters"].values()]
    assert steps == [8, 7, 8], "one adapter was done before the cut and one was between two points of its curve"
    again = ManyRun(settings, torch.device("cpu"), 0, 1)
    again.resume(cut.last)
    again.train(cut)
    assert cut.metrics[-1]["adapters"] == whole.metrics[-1]["adapters"]
    assert cut.metrics[-1]["step"] == whole.metrics[-1]["step"]
    for number in range(3):
        own, other = (load_file(one.last / f"models/task{number}/adapter_model.safetensors") for one in (cut, whole))
        assert all(torch.equal(own[key], other[key]) for key in own)


def test_an_adapter_that_leaves_the_numbers_stops_with_a_diagnosis_and_the_others_go_on(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    adapters = mixed_settings(folder)
    adapters[1]["learning_rate"] = 1e30
    reports = train_many(run_settings(folder, adapters), tmp_path)
    broken = reports.adapter("task1")
    assert "loss nan" in broken["reason"] and "a lower finetune.learning_rate" in broken["reason"]
    assert not (reports.last / "models/task1").exists()
    loss, weight = differences(folder, [adapters[0], adapters[2]], reports)
    assert loss < LOSS_TOLERANCE and weight < WEIGHT_TOLERANCE


def test_an_adapter_stops_early_by_itself_with_its_best_weights(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    adapters = mixed_settings(folder)
    # So high a rate makes held-out answers worse before long.
    adapters[0] |= {"patience": 1, "checkpoint_every": 1, "num_steps": 60, "learning_rate": 0.5, "warmup_steps": 0}
    reports = train_many(run_settings(folder, adapters), tmp_path)
    curve = reports.adapter("task0")["curve"]
    assert len(curve) < 60
    keys = [(point["agreement"], -point["validation_loss"]) for point in curve]
    assert keys[-1] <= max(keys[:-1]) and all(own > before for before, own in zip(keys[:-2], keys[1:-1], strict=True))
    assert reports.adapter("task2")["curve"][-1]["step"] == adapters[2]["num_steps"]
    train_solo(adapters[0], tmp_path / "solo_best", stop_after=len(curve) - 1)
    saved, expected = (
        load_file(place / "adapter_model.safetensors")
        for place in (reports.last / "models/task0", tmp_path / "solo_best")
    )
    assert max(float((saved[key] - expected[key]).abs().max()) for key in saved) < 10 * WEIGHT_TOLERANCE


def test_bfloat16_learns(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    adapters = mixed_settings(folder, num_steps=20, checkpoint_every=20)
    reports = train_many(run_settings(folder, adapters) | {"bf16": True}, tmp_path)
    for one in adapters:
        curve = reports.adapter(one["name"])["curve"]
        assert curve[-1]["loss"] < curve[0]["loss"]
