"""Options override a recipe's keys, whatever their value."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from upcycle.cli.shared.options import build_recipe, recipe_options
from upcycle.errors import UsageError
from upcycle.recipe.conversion_recipe import Recipe


def _built(tmp_path: Path, *options: str) -> Recipe:
    """The recipe of a command line whose recipe file has a seed, a shared expert and padding."""
    file = tmp_path / "recipe.yaml"
    file.write_text("source: demo\nmethod: random_split\nexperts: 6\ntop_k: 2\nshared: 1\nseed: 3\npad: true\n")
    found: list[Recipe] = []

    @click.command()
    @recipe_options
    def command(**flags: object) -> None:
        found.append(build_recipe(str(file), flags))

    CliRunner().invoke(command, options, catch_exceptions=False, standalone_mode=False)
    return found[0]


def test_zero_overrides_a_recipe(tmp_path: Path) -> None:
    """``--seed 0`` is the seed 0, and not the recipe's."""
    recipe = _built(tmp_path, "--seed", "0", "--shared", "0")
    assert (recipe.seed, recipe.shared) == (0, 0)


def test_an_option_that_is_not_given_overrides_nothing(tmp_path: Path) -> None:
    """A flag that is absent is no ``false``."""
    recipe = _built(tmp_path)
    assert (recipe.seed, recipe.shared, recipe.pad) == (3, 1, True)


@pytest.mark.parametrize("option", ["--experts", "--top-k", "--calibration-tokens", "--refit-passes", "--pieces"])
def test_zero_of_what_there_must_be_some_is_refused(tmp_path: Path, option: str) -> None:
    """Zero experts are none, and not the default."""
    with pytest.raises(UsageError, match="greater than or equal"):
        _built(tmp_path, option, "0")


def test_an_active_fraction_takes_the_place_of_a_recipes_counts(tmp_path: Path) -> None:
    """``--active`` with a recipe that counts its experts counts them anew."""
    assert not {"experts", "top_k", "shared"} & _built(tmp_path, "--active", "0.5").model_fields_set
