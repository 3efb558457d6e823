"""The recipe of Branch-Train-Merge's rounds: a seed, domains of text, and which domains are trained in each round."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import dump_yaml
from upcycle.plugins import StrictSettings
from upcycle.recipe.conversion_recipe import set_key
from upcycle.recipe.shipped_recipes import read_laid_over
from upcycle.recipe.validated import validated
from upcycle.registry import suggestion
from upcycle.trainers.recipe.data_recipe import DomainRecipe, written_out
from upcycle.trainers.recipe.laid_keys import lay
from upcycle.trainers.recipe.training_recipe import lay_training

MERGING = "branch_train_merge"
_FOLDER = re.compile(r"[\w-]+")
_TAKEN = ("merge", "last", "tuned", "seed")
# Keys that the rounds fill in, by the part of the recipe that may not have them.
_FILLED = {
    "training": ("model", "output", "adapter", "dense_states"),
    "tuning": ("model", "output", "dense_states"),
    "merge": ("source", "sources", "revision"),
    "last": ("source", "sources", "revision"),
}


class RoundsRecipe(StrictSettings):
    """A forest of models, one per domain, that is branched, trained and merged again and again."""

    source: str = Field(description="the seed: the dense model that the first branches are copies of")
    output: str = Field(description="folder of the forest: a folder for every branch, merge and result")
    domains: list[DomainRecipe] = Field(
        min_length=1, description="kinds of text, as in a training recipe: a mapping of names to texts"
    )
    rounds: list[list[str]] = Field(
        min_length=1, description="the domains that are trained in each round, or a number of rounds with all domains"
    )
    branch: Literal["merge", "posteriors"] = Field(
        "merge",
        description="what a branch begins as: the merge of the round before, or (the paper's) a mean of the forest, weighted by the "
        "posteriors of its models on text of the branch's domain; in the first round the seed",
    )
    sample: int = Field(8192, ge=64, description="of posteriors: tokens of the domain that decide them")
    most: int | None = Field(None, ge=1, description="of posteriors: keep only so many models, those with the largest")
    training: dict[str, Any] = Field(
        description="how each branch is trained: keys of a training recipe but model and output; its data has no domains"
    )
    merge: dict[str, Any] = Field(
        default_factory=lambda: {"method": MERGING},
        description="how the forest is merged after each round: keys of a conversion recipe whose result is dense",
    )
    last: dict[str, Any] | None = Field(
        None,
        description="what is made of the last round's forest beside its merge: keys of a conversion recipe, e.g. method: "
        "branch_train_mix (left out: nothing)",
    )
    tuning: dict[str, Any] | None = Field(
        None, description="how the result of last is trained on all domains: keys of a training recipe, as in training"
    )

    @model_validator(mode="before")
    @classmethod
    def _rounds_by_number(cls, content: Any) -> Any:
        """Let ``rounds: 3`` stand for three rounds with all domains."""
        if not isinstance(content, dict):
            return content
        number, domains = content.get("rounds"), content.get("domains")
        if (
            isinstance(number, int)
            and not isinstance(number, bool)
            and number > 0
            and isinstance(domains, Mapping | list)
        ):
            named = [each.get("name") if isinstance(each, Mapping) else each for each in domains]
            return {**content, "rounds": [list(map(str, named))] * number}
        return content

    @field_validator("domains", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return [
            {"name": name, **(part if isinstance(part, Mapping) else {"text": part})} for name, part in value.items()
        ]

    @model_validator(mode="after")
    def _consistent(self) -> RoundsRecipe:
        for fault in (self._of_domains(), self._of_rounds(), self._of_parts()):
            if fault:
                raise ValueError(fault)
        return self

    def _of_domains(self) -> str | None:
        """What is wrong with the domains themselves."""
        names = [domain.name for domain in self.domains]
        for domain in self.domains:
            if not _FOLDER.fullmatch(domain.name) or domain.name in _TAKEN:
                return f"domains: '{domain.name}' names folders here; use letters, digits, _ and -, and not merge"
            if self.branch == "posteriors" and (domain.response or domain.chosen):
                return f"domains: '{domain.name}' has pairs, and posteriors are decided by text; use branch: merge"
        twice = [name for name in names if names.count(name) > 1]
        return f"domains: two are called '{twice[0]}'; give each its own name" if twice else None

    def _of_rounds(self) -> str | None:
        """What is wrong with the rounds."""
        names = [domain.name for domain in self.domains]
        for number, round_ in enumerate(self.rounds, 1):
            if not round_:
                return f"rounds: round {number} trains no domain; name some, or leave it out"
            if unknown := [name for name in round_ if name not in names]:
                return f"rounds: round {number} names the domain '{unknown[0]}'; {suggestion(unknown[0], names)}"
            if len(set(round_)) < len(round_):
                return f"rounds: round {number} names a domain twice; a domain has one branch in a round"
        never = [name for name in names if not any(name in round_ for round_ in self.rounds)]
        return f"domains: '{never[0]}' is trained in no round; name it in rounds, or leave it out" if never else None

    def _of_parts(self) -> str | None:
        """What is wrong with the recipes of the steps, as far as it shows before they are read."""
        for part, keys in _FILLED.items():
            if taken := [key for key in keys if key in (getattr(self, part) or {})]:
                return (
                    f"{part}: '{taken[0]}' cannot be set here: the rounds say what is trained and where; leave it out"
                )
        for part in ("training", "tuning"):
            data = (getattr(self, part) or {}).get("data", {})
            if not isinstance(data, Mapping) or "domains" in data:
                return f"{part}: data has no domains here; they stand in the recipe's own key domains"
        if self.tuning is not None and self.last is None:
            return "tuning trains what last makes, and there is no last; add last: {method: branch_train_mix}"
        if self.branch == "merge" and (
            self.most is not None or self.sample != type(self).model_fields["sample"].default
        ):
            return "sample and most are for branch: posteriors; leave them out"
        return None

    def dump(self) -> str:
        """The recipe as YAML, with every key written out."""
        return dump_yaml(self.model_dump(mode="json"))


def read_rounds_recipe(path: Path, overlaid: Mapping[str, Any] | None = None) -> RoundsRecipe:
    """Read a YAML recipe.

    Args:
        path: its file, or the name of a recipe that comes with upcycle.
        overlaid: values by dotted path, laid over its keys.

    Raises:
        UsageError: the file is missing, not YAML, or no recipe of rounds.
    """
    return read_laid_over(RoundsRecipe, path, "grow", overlaid, _lay)


def parse_rounds_recipe(content: Any, where: str) -> RoundsRecipe:
    """Make a recipe of a mapping; ``where`` it stands is for errors.

    Raises:
        UsageError: a key or value is wrong; names the key's path, the value and ``where``.
    """
    return validated(RoundsRecipe, content, where)


def _lay(content: dict[str, Any], path: str, value: Any) -> None:
    """Set the key at a dotted path: below a part that is a recipe of its own, as that kind of recipe has its keys set.

    Raises:
        UsageError: something on the way is not there.
    """
    part, _, below = path.partition(".")
    if not below or part not in _LAID:
        content.update(written_out(content))  # domains, so that keys of theirs can be set
        lay(content, path, value, ())
        return
    inner = content.get(part)
    content[part] = inner = inner if isinstance(inner, dict) else {}
    try:
        _LAID[part](inner, below, value)
    except UsageError as error:
        raise UsageError(f"{part}.{error.message}", hint=error.hint) from None


# Of each part that is a recipe of its own: how its keys are set.
_LAID = {"training": lay_training, "tuning": lay_training, "merge": set_key, "last": set_key}
