"""Recipes and overrides: precedence, and errors that name the field, the value and what is allowed."""

import importlib.util
import pathlib
import re

import pytest
from pydantic import ValidationError

from cluster.config import describe_fields, validate
from cluster.errors import ConfigError
from cluster.upstream import UpstreamConfig
from jobs.recipe import RECIPES, Recipe, load_recipe
from serving.specialist_config import LORA_RANKS
from training.finetune import FinetuneConfig


def test_an_override_wins_over_the_recipe_and_the_recipe_over_defaults():
    assert load_recipe([]).gate.epsilon == 0.05
    assert load_recipe(["recipe=demo"]).gate.epsilon == 0.03
    assert load_recipe(["gate.epsilon=0.02", "recipe=demo"]).gate.epsilon == 0.02


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gate.epsilom=0.1", "gate.epsilom: unknown key; nearest valid: gate.epsilon"),
        ("gate.epsilon=2.0", "gate.epsilon: got 2.0"),
        ("finetune.num_steps=many", "finetune.num_steps: got 'many'"),
        ("recipe=nope", "allowed: a path ending in .toml, or one of: demo"),
        ("epsilon", "not of the form key=value"),
    ],
)
def test_wrong_words_are_named(word, message):
    with pytest.raises(ConfigError, match=".*") as caught:
        load_recipe([word])
    assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    assert isinstance(load_recipe([f"recipe={path.stem}"]), Recipe)


def test_every_field_says_what_it_means():
    assert [row[0] for row in describe_fields(Recipe) if not row[3]] == []


def test_items_of_a_list_are_overridden_by_number(tmp_path):
    recipe = tmp_path / "two.toml"
    recipe.write_text('[[upstream]]\nbase_url = "http://a/v1"\nmodel = "m"\n[[upstream]]\nbase_url = "http://b/v1"\n')
    words = [f"recipe={recipe}", "upstream.1.model=n", "upstream.2.base_url=http://c/v1"]
    found = [(one.base_url, one.model) for one in load_recipe(words).upstream]
    assert found == [("http://a/v1", "m"), ("http://b/v1", "n"), ("http://c/v1", None)]
    with pytest.raises(ConfigError, match="upstream.3: given without upstream.2; allowed"):
        load_recipe([f"recipe={recipe}", "upstream.3.base_url=http://c/v1"])


def test_fields_are_described_with_type_bounds_and_default():
    rows = {key: (kind, default) for key, kind, default, _ in describe_fields(Recipe)}
    assert rows["gate.epsilon"] == ("float, > 0, < 1", "0.05")
    assert rows["upstream.N.base_url"] == (r"str, matches ^https?://[^\s/]+", "required")
    assert rows["gateway.auth"] == ("Literal['keys', 'open']", "'keys'")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("finetune.num_steps", "300", "a valid integer"),
        ("finetune.num_steps", True, "a valid integer"),
        ("finetune.batch_size", 16.0, "a valid integer"),
        ("finetune.zero_stage", True, "'auto', 0, 1, 2 or 3"),
        ("finetune.zero_stage", 4, "'auto', 0, 1, 2 or 3"),
        ("finetune.bf16", "yes", "a valid boolean"),
        ("finetune.bf16", 1, "a valid boolean"),
        ("finetune.learning_rate", "0.1", "a valid number"),
        ("finetune.learning_rate", True, "a valid number"),
        ("finetune.learning_rate", float("inf"), "a finite number"),
        ("gate.epsilon", float("nan"), "a finite number"),
        ("finetune.lora_targets", "q_proj", "a valid array"),
        ("store", 5, "a valid string"),
        ("gateway.auth", "none", "'keys' or 'open'"),
        ("specialists.device", "tpu", "a match of pattern '^(cpu|gpu)$'"),
    ],
)
def test_no_value_is_taken_for_one_of_another_type(key, value, allowed):
    section, _, field = key.rpartition(".")
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {section: {field: value}} if section else {field: value})
    assert str(caught.value) == f"{key}: got {value!r}; allowed: {allowed}"


def test_words_of_the_command_line_are_not_coerced_either(tmp_path):
    with pytest.raises(ConfigError, match="finetune.num_steps: got .300.; allowed: a valid integer"):
        load_recipe(['finetune.num_steps="300"'])
    recipe = tmp_path / "a.toml"
    recipe.write_text('[finetune]\nbf16 = "yes"\n')
    with pytest.raises(ConfigError, match="finetune.bf16: got 'yes'; allowed: a valid boolean"):
        load_recipe([f"recipe={recipe}"])


def test_a_config_refuses_other_types_where_it_is_built_directly():
    with pytest.raises(ValidationError, match="num_steps"):
        FinetuneConfig(num_steps="300")


def test_lists_serve_as_tuples_integers_as_floats_and_configs_as_their_values():
    finetune = FinetuneConfig(num_steps=40)
    upstream = (UpstreamConfig(base_url="http://a/v1"), {"base_url": "http://b/v1"})
    recipe = validate(
        Recipe, {"finetune": finetune, "upstream": upstream, "select": {"candidates": ["a/b"], "memory_gib": 4}}
    )
    assert recipe.finetune == finetune
    assert [one.base_url for one in recipe.upstream] == ["http://a/v1", "http://b/v1"]
    assert recipe.select.candidates == ("a/b",) and recipe.select.memory_gib == 4.0
    assert validate(Recipe, recipe.model_dump()) == validate(Recipe, recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["finetune.lora_rank=32"],
            "finetune.lora_rank=32: above specialists.max_lora_rank=16; allowed: at most that; "
            "next: finetune.lora_rank=16, or specialists.max_lora_rank=32",
        ),
        (
            ["specialists.max_lora_rank=24"],
            "specialists.max_lora_rank: got 24; allowed: 1, 8, 16, 32, 64, 128, 256, 320, 512",
        ),
        (
            ["finetune.warmup_steps=300"],
            "finetune.warmup_steps=300: not below finetune.num_steps=300; allowed: fewer steps of warm-up than steps; "
            "next: finetune.warmup_steps=30",
        ),
        (
            ["fleet.mode=multi_lora", "finetune.zero_stage=2"],
            "finetune.zero_stage=2: with fleet.mode=multi_lora stages 1 and 2 would cut one vector of all adapters' "
            "gradients into the workers' parts, so that no adapter could be clipped or stopped by itself; allowed: 0, "
            "or 3 (the base sharded); next: finetune.zero_stage=0, or fleet.mode=solo",
        ),
        (
            ["pretrain.num_steps=5"],
            "pretrain.warmup_steps=20: not below pretrain.num_steps=5; allowed: fewer steps of warm-up than steps; "
            "next: pretrain.warmup_steps=0",
        ),
        (
            ["select.base=scratch-tiny", "specialists.max_model_tokens=2048"],
            "specialists.max_model_tokens=2048: select.base='scratch-tiny' has a window of 1024 tokens; "
            "allowed: at most that; next: specialists.max_model_tokens=1024, or another select.base",
        ),
        (
            ["select.base=HuggingFaceTB/SmolLM2-135M-Instruct", "specialists.max_model_tokens=8193"],
            "specialists.max_model_tokens=8193: select.base='HuggingFaceTB/SmolLM2-135M-Instruct' has a window of 8192 "
            "tokens; allowed: at most that; next: specialists.max_model_tokens=8192, or another select.base",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_named_with_both_values(words, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(words)
    assert str(caught.value) == message


def test_all_contradictions_are_told_at_once_and_bases_that_are_not_used_are_not_looked_at():
    with pytest.raises(ConfigError) as caught:
        load_recipe(["finetune.lora_rank=32", "finetune.num_steps=20"])
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "finetune.warmup_steps",
        "finetune.lora_rank",
    ]
    tokens = "specialists.max_model_tokens=4096"
    load_recipe([tokens])
    load_recipe([tokens, "select.base=/no/such/folder"])
    load_recipe([tokens, "select.base=scratch-tiny", 'select.candidates=["a/b"]'])


def test_the_ranks_are_those_that_vllm_takes():
    # Read as text: importing vLLM takes many seconds.
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no vLLM here")
    text = (pathlib.Path(found.submodule_search_locations[0]) / "config" / "lora.py").read_text()
    ranks = re.search(r"^MaxLoRARanks = Literal\[(.*)\]$", text, re.MULTILINE)
    assert ranks and tuple(map(int, ranks[1].split(","))) == LORA_RANKS
