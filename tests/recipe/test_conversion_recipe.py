"""Recipes: what is accepted, and how what is not is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from upcycle.errors import UsageError
from upcycle.recipe.conversion_recipe import Recipe, layer_selection, parse_recipe, parse_size, read_recipe, set_key


def test_the_dump_is_a_recipe_that_means_the_same() -> None:
    recipe = parse_recipe({"source": "demo", "experts": 4, "router": "zero", "layers": "0,2", "scale": 3}, "here")
    again = parse_recipe(yaml.safe_load(recipe.dump()), "again")
    assert again == recipe
    assert recipe.router.name == "zero"
    assert recipe.layers == [0, 2]
    assert set(yaml.safe_load(recipe.dump())) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ({"exprts": 3}, "unknown key 'exprts'", "did you mean 'experts'"),
        ({"router": {"nme": "zero"}}, "unknown key 'router.nme'", "did you mean 'name'"),
        ({"experts": "many"}, "key 'experts': .* got 'many'", "routed experts"),
        ({"experts": 0}, "key 'experts': .* got 0", "routed experts"),
        ({"layout": "round"}, "key 'layout': .* got 'round'", "per-expert"),
        ({"verification": {"tokens": 3}}, "key 'verification.tokens'", None),
        ({"scale": "big"}, "key 'scale': .* got 'big'", "exact, sum, paper"),
        ({"layers": 3.5}, "key 'layers': .* got 3.5", "every-other"),
        ({"max_shard_size": "big"}, "'big' is not a size", None),
        ({"experts": 4, "top_k": 5}, "top_k is 5, but there are only 4 experts", None),
        ({"source": None}, "key 'source'", None),
    ],
)
def test_faults_name_the_key_and_the_value(content: dict, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_recipe({"source": "demo", **content}, "my.yaml")
    assert caught.value.message.startswith("my.yaml: ")
    assert hint is None or hint in (caught.value.hint or "")


def test_a_missing_source_says_which_key_to_add() -> None:
    with pytest.raises(UsageError, match="key 'source' is missing"):
        parse_recipe({}, "my.yaml")


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("experts: [1,")
    with pytest.raises(UsageError, match="is not YAML"):
        read_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="mapping of keys, got list"):
        read_recipe(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("even", (0, 2, 4)),
        ("odd", (1, 3)),
        ("every-other", (1, 3)),
        ("last-half", (3, 4)),
        ("except-first:2", (2, 3, 4)),
        ("except-last:2", (0, 1, 2)),
        ([4, 0, 0], (0, 4)),
    ],
)
def test_layer_selection(layers: str | list[int], expected: tuple[int, ...]) -> None:
    assert layer_selection(layers, 5) == expected


@pytest.mark.parametrize("layers", ["some", "except-first:x", "except-first:5", [5], [], "except-first:-1"])
def test_layers_the_model_does_not_have(layers: str | list[int]) -> None:
    with pytest.raises(UsageError, match="layers: "):
        layer_selection(layers, 5)


def test_words_that_leave_no_layer_of_a_small_model() -> None:
    assert layer_selection("even", 1) == (0,)
    for word in ("odd", "every-other", "last-half", "except-last:1"):
        with pytest.raises(UsageError, match="leaves none of the 1 layers"):
            layer_selection(word, 1)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("700", 700)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 parsecs"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_set_key_opens_one_of_the_sources() -> None:
    content: dict = {"sources": "./math, ./law"}
    set_key(content, "sources.1.text", "law.txt")
    set_key(content, "sources.0.weight", 2.0)
    assert content == {"sources": [{"name": "./math", "weight": 2.0}, {"name": "./law", "text": "law.txt"}]}
    with pytest.raises(UsageError, match=r"sources\.2: there are 2 sources") as caught:
        set_key(content, "sources.2.text", "code.txt")
    assert "the first one is sources.0" in (caught.value.hint or "")
    with pytest.raises(UsageError, match=r"sources\.0: there are no sources"):
        set_key({}, "sources.0.text", "code.txt")


def test_set_key_opens_a_router_given_by_name() -> None:
    content: dict = {"router": "random"}
    set_key(content, "router.parameters.std", 0.5)
    assert content == {"router": {"name": "random", "parameters": {"std": 0.5}}}
