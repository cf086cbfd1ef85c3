"""A recipe says what runs; every mistake in it is named at once, in the user's words."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rankleap.config import (
    AdapterSection,
    AlgorithmSection,
    LeapSection,
    ModelSection,
    RecordSection,
    TaskSection,
    TrainSection,
    load_recipe,
    make_recipe,
)
from rankleap.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
SECTIONS = [ModelSection, TaskSection, AdapterSection, AlgorithmSection, TrainSection, RecordSection, LeapSection]
VALUES: dict[str, Any] = {
    "name": "run",
    "model": {"base": "bundled:sums"},
    "task": {"name": "sums"},
    "train": {"steps": 10, "learning_rate": 1e-4},
}
TOML = """
name = "run"
[model]
base = "bundled:sums"
[task]
name = "sums"
[train]
steps = 10
learning_rate = 1e-4
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**VALUES, **{name: {**VALUES.get(name, {}), **values} for name, values in sections.items()}}


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name


def test_all_mistakes_are_reported_at_once_in_the_users_words() -> None:
    values = {
        "name": "run",
        "task": {"name": "sums"},
        "train": {"lerning_rate": 1e-4, "steps": 0},
        "adapter": {"rank": "many"},
        "leap": {"confidance": 0.9},
        "trian": {},
    }
    with pytest.raises(RecipeError) as caught:
        make_recipe(values, "bad.toml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "bad.toml is not a valid recipe:"
    assert set(lines[1:]) == {
        "  model: missing",
        "  train.learning_rate: missing",
        "  train.lerning_rate: unknown key, did you mean 'learning_rate'?",
        "  train.steps: should be at least 1, got 0",
        "  adapter.rank: should be a valid integer, unable to parse string as an integer, got 'many'",
        "  leap.confidance: unknown key, did you mean 'confidence'?",
        "  trian: unknown key, did you mean 'train'?",
    }


def test_an_unknown_key_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"train\.zzz: unknown key$"):
        make_recipe(changed(train={"zzz": 1}), "bad.toml")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "learning_rate", float("inf")),
        ("train", "completions_per_prompt", 1),
        ("adapter", "dropout", 1.0),
        ("leap", "coefficients", [1.0, float("nan")]),
        ("leap", "max_norm_ratio", 1.0),
        ("leap", "confidence", 0.4),  # would let the gate accept a loss
    ],
)
def test_a_value_out_of_bounds_is_named(section: str, key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=rf"{section}\.{key}"):
        make_recipe(changed(**{section: {key: value}}), "bad.toml")


def test_an_override_is_read_as_toml_and_else_as_text(recipe_file: Path) -> None:
    sets = ["train.steps=25", "train.learning_rate=3e-4", "leap.coefficients=[0.5, 2]", "task.name=backward"]
    recipe = load_recipe(recipe_file, [*sets, "train.gradient_checkpointing=true", 'name="a = b"'])
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.train.gradient_checkpointing) == (25, 3e-4, True)
    assert recipe.leap is not None
    assert recipe.leap.coefficients == (0.5, 2.0)
    assert (recipe.task.name, recipe.name) == ("backward", "a = b")


@pytest.mark.parametrize("override", ["train.steps", "=3", " =3", ""])
def test_an_override_without_key_or_value_is_refused(recipe_file: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="--set needs KEY=VALUE"):
        load_recipe(recipe_file, [override])


def test_an_override_below_a_value_is_refused(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="'steps' is a value, not a section"):
        load_recipe(recipe_file, ["train.steps.more=3"])


def test_an_override_of_an_unknown_key_is_refused(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.step: unknown key, did you mean 'steps'\?"):
        load_recipe(recipe_file, ["train.step=3"])


@pytest.mark.parametrize("text", ["name = ", "\x00", "[train]\n[train]"])
def test_bad_toml_names_the_file(recipe_file: Path, text: str) -> None:
    recipe_file.write_text(text)
    with pytest.raises(RecipeError, match=r"run\.toml is not valid TOML"):
        load_recipe(recipe_file)


def test_a_missing_recipe_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.toml: No such file"):
        load_recipe(tmp_path / "none.toml")


def test_a_resolved_recipe_round_trips_through_json() -> None:
    recipe = make_recipe(changed(leap={"windows": [2, 4]}, adapter={"target_modules": ["q_proj"]}), "a.toml")
    again = make_recipe(json.loads(json.dumps(recipe.model_dump(mode="json"))), "config.json")
    assert again == recipe


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_of_a_section_has_its_help(section: type[BaseModel]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []
