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
