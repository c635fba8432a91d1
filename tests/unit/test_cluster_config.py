"""Recipes and overrides: precedence, and errors that name the field, the value and what is allowed."""

import pytest
from pydantic import ValidationError

from cluster.config import describe_fields, validate
from cluster.errors import ConfigError
from cluster.upstream import UpstreamConfig
from jobs.recipe import RECIPES, Recipe, load_recipe
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
        ("finetune.zero_stage", True, "a valid integer"),
        ("finetune.zero_stage", 4, "less than or equal to 3"),
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
