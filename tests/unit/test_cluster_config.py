"""Recipes and overrides: precedence, and errors that name the field, the value and what is allowed."""

import pytest

from cluster.config import describe_fields
from cluster.errors import ConfigError
from jobs.recipe import RECIPES, Recipe, load_recipe


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
