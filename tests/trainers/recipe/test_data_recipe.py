"""The data section of a recipe: short forms, and faults that name their key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from upcycle.errors import UsageError
from upcycle.recipe.validated import validated
from upcycle.trainers.recipe.data_recipe import DataRecipe


def parse(content: Any) -> DataRecipe:
    return validated(DataRecipe, content, "train.yaml, data")


def test_short_forms() -> None:
    long = parse({"domains": [{"name": "text", "text": ["a.txt", "b.txt"]}]})
    assert parse("a.txt, b.txt") == parse(["a.txt", "b.txt"]) == long
    two = parse({"domains": {"x": "a.txt", "y": {"text": ["b.txt"], "column": "body"}}})
    assert [domain.name for domain in two.domains] == ["x", "y"]
    assert two.weights == {"x": 0.5, "y": 0.5}
    assert parse(two.model_dump()) == two


def test_the_recipe_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs/guides/training_data.md").read_text()
    content = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["data"]
    data = parse(content)
    assert set(content) == set(type(data).model_fields) - {"end_of_text", "masking"}
    assert data.packing == DataRecipe.model_fields["packing"].default
    assert data.shuffle == DataRecipe.model_fields["shuffle"].default
    assert data.validation == DataRecipe.model_fields["validation"].default


def test_the_recipe_for_conversations_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs/guides/training_data.md").read_text()
    data = parse(yaml.safe_load(page.split("```yaml\n")[2].split("```")[0])["data"])
    chat, tasks, completions, prose = data.domains
    assert (chat.loss_on, chat.too_long) == (prose.loss_on, prose.too_long) == (None, None)
    assert (tasks.prompt, tasks.response) == (["instruction", "input"], "output")
    assert (completions.prompt, completions.joined, data.chat_template) == (["prompt"], "plain", "turns")


BOTH = {"x": {"text": "a", "weight": 0.5}, "y": {"text": "b", "weight": 0.5}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"domains": BOTH, "shufle": "1MB"}, "unknown key 'shufle'"),
        ({"domains": {"x": {"text": "a", "colum": "b"}}}, r"unknown key 'domains\.0\.colum'"),
        ({"domains": {"x": {"weight": 1}}}, r"key 'domains\.0\.text' is missing"),
        ({"domains": []}, "at least 1 item"),
        ({"domains": {"x": {"text": "a", "prompt": "p"}}}, "prompt names a column of pairs, and response none; give both"),
        ({"domains": {"x": {"text": "a", "prompt": "p", "response": "r", "column": "c"}}}, "give one or the other"),
        ({"domains": {"x": {"text": "a", "joined": "plain"}}}, "joined is for pairs"),
        ({"domains": {"x": {"text": "a", "too_long": "cut"}}}, "too_long"),
        ({"domains": {**BOTH, "y": {"text": "b", "weight": 0.3}}}, r"not to 1; the same ratios would be x 0\.625, y 0\.375"),
        ({"domains": {**BOTH, "y": {"text": "b", "weight": -0.5}}}, "greater than 0, got -0.5"),
        ({"domains": {**BOTH, "y": {"text": "b", "weight": float("nan")}}}, "finite|greater than 0"),
        ({"domains": {**BOTH, "y": {"text": "b"}}}, "'y' has no weight, but others have"),
        ({"domains": [{"name": "x", "text": "a"}, {"name": "x", "text": "b"}]}, "two are called 'x'"),
        ({"domains": {"x": "a"}, "dynamic": {}}, "at least two domains"),
        ({"domains": BOTH, "dynamic": {}, "validation": {"fraction": 0}}, "'x' has none, because validation.fraction is 0"),
        ({"domains": BOTH, "dynamic": {"reference": {"x": 1.0, "z": 2.0}}}, "differs in y, z"),
        ({"domains": BOTH, "shuffle": "lots"}, "'lots' is not a size"),
        ({"domains": BOTH, "validation": {"fraction": 1.0}}, "less than 1"),
        ({"domains": BOTH, "packing": "worst_fit"}, "'best_fit', 'concatenate' or 'alone'"),
    ],
)  # fmt: skip
def test_faults_name_their_key(content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(content)
    assert caught.value.message.startswith("train.yaml, data")
