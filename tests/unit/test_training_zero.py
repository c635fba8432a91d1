"""memory.py and zero.py: the arithmetic of ZeRO's paper, the placement chosen by it, and what is said where none fits."""

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_base

from cluster.config import validate
from cluster.errors import ConfigError
from training.finetune import FinetuneConfig, plan_finetune
from training.memory import Load, ModelShape, estimate_shape, predict_memory, shape_of
from training.zero import explain, placements, plan_zero

GIB = 2**30
SEVEN_B = ModelShape(
    parameters=7_500_000_000,
    trainable=7_500_000_000,
    layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    vocab_size=32000,
)
ONE = Load(examples=1, row_tokens=1, answer_tokens=1)
BATCH = Load(examples=16, row_tokens=1024, answer_tokens=256)


def make_config(**changes: object) -> FinetuneConfig:
    gpus = {"gpus_per_worker": 1, "bf16": True, "num_workers": 64, "method": "full"}
    return validate(FinetuneConfig, {**gpus, **changes})


# Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 devices, gigabytes of 10^9 bytes.
@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_are_those_of_the_paper(stage, gigabytes):
    memory = predict_memory(SEVEN_B, make_config(), ONE, stage=stage)
    states = memory.weights + memory.gradients + memory.optimizer
    if stage == 3:  # the paper leaves out the layer that is gathered at the time
        states -= SEVEN_B.parameters // SEVEN_B.layers * 2
    assert states / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_float32_without_sharding_keeps_no_second_copy():
    memory = predict_memory(SEVEN_B, make_config(bf16=False), ONE, stage=0)
    assert (memory.weights + memory.gradients + memory.optimizer) / SEVEN_B.parameters == 16


def test_an_adapter_pays_for_its_own_states_alone():
    shape = SEVEN_B.model_copy(update={"trainable": 20_000_000})
    lora = predict_memory(shape, make_config(method="lora"), ONE, stage=0)
    assert lora.optimizer == 12 * 20_000_000 and lora.gradients == 2 * 20_000_000
    assert lora.weights == 2 * 7_520_000_000
    four_bit = predict_memory(shape, make_config(method="qlora"), ONE, stage=0)
    assert four_bit.weights < 0.27 * lora.weights


def test_recomputing_activations_keeps_a_layers_input():
    kept = predict_memory(SEVEN_B, make_config(), BATCH, stage=3)
    again = predict_memory(SEVEN_B, make_config(gradient_checkpointing=True), BATCH, stage=3)
    assert again.activations < kept.activations / 10 and again.logits == kept.logits


@pytest.mark.parametrize(
    ("device_gib", "changes", "expected"),
    [
        (200, {"num_workers": 8}, (0, "none")),
        (70, {"num_workers": 8}, (1, "none")),
        (40, {"num_workers": 8}, (2, "none")),
        (24, {"num_workers": 8}, (3, "none")),
        (200, {"num_workers": 1}, (0, "none")),
        (60, {"num_workers": 1}, (2, "optimizer")),
        (8, {"num_workers": 1}, (3, "parameters")),
        (24, {"num_workers": 1, "method": "lora"}, (0, "none")),
        (40, {"num_workers": 8, "zero_stage": 3}, (3, "none")),
        (40, {"num_workers": 8, "offload": "optimizer"}, (2, "optimizer")),
    ],
)
def test_the_cheapest_placement_that_fits_is_taken(device_gib, changes, expected):
    config = make_config(**changes)
    shape = SEVEN_B if config.method == "full" else SEVEN_B.model_copy(update={"trainable": 20_000_000})
    load = Load(examples=16, row_tokens=256, answer_tokens=64)
    plan = plan_zero(shape, config, load, device_gib * GIB)
    assert (plan.stage, plan.offload) == expected
    assert plan.memory.total <= 0.9 * device_gib * GIB
    assert bool(plan.memory.host) == (plan.offload != "none")


def test_a_run_that_goes_on_with_fewer_workers_shards_nothing_and_says_why():
    config = make_config(num_workers=4, min_workers=2)
    assert placements(config) == [(0, "none")]
    with pytest.raises(ConfigError, match="min_workers=5: above num_workers=4; allowed: at most that"):
        make_config(num_workers=4, min_workers=5)
    for changes in ({"zero_stage": 2}, {"offload": "optimizer"}):
        with pytest.raises(ConfigError, match="is cut for its number of workers and cannot be read by another"):
            make_config(num_workers=4, min_workers=2, **changes)


def test_a_smaller_micro_batch_comes_before_a_dearer_placement():
    shape = SEVEN_B.model_copy(update={"trainable": 20_000_000})
    plan = plan_zero(shape, make_config(method="lora", num_workers=2), BATCH, 40 * GIB)
    assert plan.stage == 0 and 1 <= plan.micro_batch_size < 16
    lines = "\n".join(explain(plan, make_config(method="lora", num_workers=2)))
    assert f"micro-batch {plan.micro_batch_size}: gradients of" in lines and "nothing is compiled" in lines
    assert f"{plan.memory.total / GIB:8.3f} GiB  of   40.000 GiB on each GPU" in lines


def test_offload_says_what_it_compiles():
    config = make_config(num_workers=1)
    plan = plan_zero(SEVEN_B, config, ONE, 60 * GIB)
    lines = "\n".join(explain(plan, config))
    assert (
        "ZeRO stage 2, offload optimizer" in lines and "C++ build takes minutes" in lines and "torch AdamW" not in lines
    )


def test_what_cannot_fit_is_refused_with_the_numbers_and_what_would_fit():
    config = make_config(num_workers=2, zero_stage=3, offload="none")
    with pytest.raises(ConfigError) as caught:
        plan_zero(SEVEN_B, config, BATCH, 16 * GIB)
    text = str(caught.value)
    assert "7,500,000,000 parameters by full need" in text and "a device has 16.000 GiB" in text
    assert "finetune.gradient_checkpointing=true" in text and "finetune.method=lora" in text
    workers = int(text.split("finetune.num_workers=")[1].split()[0])
    again = plan_zero(SEVEN_B, make_config(num_workers=workers, zero_stage=3), BATCH, 16 * GIB)
    assert again.stage == 3, "what it names must fit"


def test_a_cpu_worker_is_refused_without_gpu_remedies():
    config = validate(FinetuneConfig, {"method": "full"})
    with pytest.raises(ConfigError, match="a device of .* GiB, or finetune.gradient_checkpointing=true") as caught:
        plan_zero(SEVEN_B, config, BATCH, 16 * GIB)
    assert "num_workers" not in str(caught.value)


@given(
    st.integers(1, 16),
    st.sampled_from(["auto", 0, 1, 2, 3]),
    st.sampled_from(["auto", "none", "optimizer", "parameters"]),
    st.sampled_from(["lora", "dora", "qlora", "full"]),
)
@settings(max_examples=120, deadline=None)
def test_every_allowed_recipe_has_a_placement_and_keeps_to_it(num_workers, stage, offload, method):
    try:
        config = make_config(num_workers=num_workers, zero_stage=stage, offload=offload, method=method)
    except ConfigError:
        return
    found = placements(config)
    assert found
    for its_stage, its_offload in found:
        assert stage in ("auto", its_stage) and offload in ("auto", its_offload)
        assert its_stage < 3 or method not in ("dora", "qlora")
        assert its_stage >= {"none": 0, "optimizer": 2, "parameters": 3}[its_offload]


def test_a_shape_is_counted_on_a_model_without_storage(tmp_path: pathlib.Path):
    base = save_tiny_base(tmp_path / "base")
    config = validate(FinetuneConfig, {"lora_targets": ["q_proj", "down_proj"], "lora_rank": 4})
    shape = shape_of(base, config)
    assert (shape.layers, shape.hidden_size, shape.context_window_tokens) == (2, 32, 128)
    assert shape.trainable == 2 * 4 * ((32 + 32) + (48 + 32))
    assert shape.parameters == 2 * 61 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32


def test_a_known_size_alone_gives_a_typical_shape():
    shape = estimate_shape(7_000_000_000, validate(FinetuneConfig, {}))
    assert shape.is_estimated and 3800 <= shape.hidden_size <= 4400 and 28 <= shape.layers <= 36
    assert 15e6 < shape.trainable < 25e6, "rank 8 on all seven layers of a 7B Llama is 20M"


def test_rows_longer_than_the_bases_window_are_refused_by_their_number(tmp_path: pathlib.Path):
    from training.dataset import save_dataset

    rows = [{"input_ids": [2] * length, "num_prompt": 1} for length in (5, 128, 129, 140)]
    save_dataset(rows, tmp_path / "rows")
    config = validate(FinetuneConfig, {"device_gib": 4.0})
    with pytest.raises(
        ValueError, match="2 of 4 examples are longer than the base's window of 128 tokens .longest 140"
    ):
        plan_finetune(config, save_tiny_base(tmp_path / "base"), tmp_path / "rows")
    save_dataset(rows[:2], tmp_path / "short")
    plan = plan_finetune(config, tmp_path / "base", tmp_path / "short")
    assert (plan.stage, plan.micro_batch_size, plan.load.row_tokens) == (0, 16, 128)
