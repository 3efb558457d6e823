"""What the rounds do, step by step: every step's recipe, what it reads and what it makes. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.branching.rounds_recipe import MERGING, RoundsRecipe
from upcycle.errors import UsageError
from upcycle.files.user_paths import user_path
from upcycle.methods.growing.base import DenseGrowth
from upcycle.methods.mixing.base import MixingMethod
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe
from upcycle.registry import load
from upcycle.trainers.recipe.data_recipe import DataRecipe
from upcycle.trainers.recipe.training_recipe import TrainRecipe, parse_train_recipe

SEED_STEP = "seed"


@dataclass(frozen=True)
class RoundStep:
    """One training run or conversion of the rounds.

    Attributes:
        name: its own, e.g. ``round-2/law``, which is also its folder in the output.
        folder: where it writes.
        model: the folder of the model that it makes.
        recipe: of a run or of a conversion.
        reads: names of the steps whose models it reads, or ``seed``.
        domains: what the model is measured on: the branch's own domain, or all.
    """

    name: str
    folder: Path
    model: Path
    recipe: TrainRecipe | Recipe
    reads: tuple[str, ...]
    domains: tuple[str, ...]

    @property
    def trains(self) -> bool:
        """Whether it is a training run."""
        return isinstance(self.recipe, TrainRecipe)


def plan_rounds(recipe: RoundsRecipe) -> list[RoundStep]:
    """All steps, in the order in which they are done. The recipe of each is validated.

    A branch of the first round begins as the seed; later ones as the merge of the round before, or as a mean of the forest that
    a step of its own decides (``branch: posteriors``). The forest has the newest model of every domain that has one. A forest of
    one model is its own merge.

    Raises:
        UsageError: a part of the recipe is wrong; names the part and the key.
    """
    _check_methods(recipe)
    return _Planner(recipe).steps()


def held_out_data(recipe: RoundsRecipe, part: str = "training") -> DataRecipe:
    """The data of all domains, as the part ``training`` or ``tuning`` packs them and holds them out."""
    return _data(recipe, part, [domain.name for domain in recipe.domains])


class _Planner:
    def __init__(self, recipe: RoundsRecipe) -> None:
        self.recipe, self.out = recipe, user_path(recipe.output).absolute()
        self.every = tuple(domain.name for domain in recipe.domains)
        self.done: list[RoundStep] = []
        self.models: dict[str, Path] = {}  # made so far, by step
        self.forest: dict[str, str] = {}  # the newest step of every domain
        self.current = SEED_STEP

    def steps(self) -> list[RoundStep]:
        for number, domains in enumerate(self.recipe.rounds, 1):
            begins = {domain: self._begin(number, domain) for domain in domains}
            for domain in domains:
                name = f"round-{number}/{domain}"
                self._train(name, "training", begins[domain], (domain,))
            self.forest |= {domain: f"round-{number}/{domain}" for domain in domains}
            self.current = self._merge(f"round-{number}/merge")
        if self.recipe.last is not None:
            self._convert("last", "last", self.recipe.last, self.forest, self.every)
        if self.recipe.tuning is not None:
            self._train("tuned", "tuning", "last", self.every)
        return self.done

    def _begin(self, number: int, domain: str) -> str:
        """The step whose model a branch begins as."""
        if self.recipe.branch == "merge" or len(self.forest) < 2:
            return self.current
        text = next(each for each in self.recipe.domains if each.name == domain)
        name = f"round-{number}/{domain}-begins"
        calibration: dict[str, Any] = {"text": text.text, "tokens": self.recipe.sample, "column": text.column or "text"}
        content = {
            "method": MERGING,
            "calibration": {**calibration, "window": min(512, self.recipe.sample)},
            **({"parameters": {"most": self.recipe.most}} if self.recipe.most else {}),
        }
        self._convert(name, f"branch of {domain}", content, self.forest, (domain,))
        return name

    def _merge(self, name: str) -> str:
        if len(self.forest) < 2:
            return next(iter(self.forest.values()))
        self._convert(name, "merge", {"method": MERGING, **self.recipe.merge}, self.forest, self.every)
        return name

    def _convert(
        self, name: str, where: str, content: Mapping[str, Any], forest: Mapping[str, str], domains: tuple[str, ...]
    ) -> None:
        router = content.get("router")
        samples = (router.get("name") if isinstance(router, Mapping) else router) == "domain_ridge"
        texts = {domain.name: domain.text for domain in self.recipe.domains}
        sources = [
            {"name": str(self.models[step]), **({"text": texts[domain]} if samples else {})}
            for domain, step in forest.items()
        ]
        whole = {**content, "source": self.recipe.source, "sources": sources}
        folder = self.out / name
        parsed = parse_recipe(whole, where)
        self._add(RoundStep(name, folder, folder, parsed, (SEED_STEP, *forest.values()), domains))

    def _train(self, name: str, part: str, begin: str, domains: tuple[str, ...]) -> None:
        model = self.recipe.source if begin == SEED_STEP else str(self.models[begin])
        folder = self.out / name
        content = {
            **(getattr(self.recipe, part) or {}),
            "model": model,
            "output": str(folder),
            "data": _data(self.recipe, part, list(domains)).model_dump(mode="json"),
        }
        parsed = parse_train_recipe(content, part)
        if not parsed.saving.export:
            raise UsageError(f"{part}: saving.export is false, but the next step reads the model", hint="leave it out")
        if any(stage.data is not None for stage in parsed.stages):
            raise UsageError(
                f"{part}: a stage has data of its own, but each branch trains on its domain", hint="leave it out"
            )
        self._add(
            RoundStep(name, folder, folder / ("adapter" if parsed.adapter else "model"), parsed, (begin,), domains)
        )

    def _add(self, step: RoundStep) -> None:
        self.done.append(step)
        self.models[step.name] = step.model


def _data(recipe: RoundsRecipe, part: str, names: list[str]) -> DataRecipe:
    """The ``data`` of one part, with some of the domains; their weights are divided by their sum."""
    chosen = [domain for domain in recipe.domains if domain.name in names]
    given = [domain.weight for domain in chosen]
    total = sum(weight or 0.0 for weight in given)
    domains = [
        domain.model_copy(update={"weight": domain.weight / total if domain.weight else None}).model_dump(mode="json")
        for domain in chosen
    ]
    content = {**(getattr(recipe, part) or {}).get("data", {}), "domains": domains}
    holder = {"model": "?", "output": "?", "stages": [{"steps": 1, "learning_rate": 1.0}], "data": content}
    return parse_train_recipe(holder, part).data


def _check_methods(recipe: RoundsRecipe) -> None:
    """Refuse a merge whose result is no dense model, of which no branch can begin, and a last that takes one source.

    Raises:
        UsageError: names the method.
    """
    merge = str(recipe.merge.get("method", MERGING))
    if not issubclass(load("method", merge), DenseGrowth) or not issubclass(load("method", merge), MixingMethod):
        raise UsageError(
            f"merge: method '{merge}' does not merge several models into a dense one, as which the next branches could begin",
            hint=f"merge: {{method: {MERGING}}}; a MoE of the last round's branches goes into last",
        )
    if recipe.last is not None and not issubclass(load("method", str(recipe.last.get("method", ""))), MixingMethod):
        raise UsageError(
            f"last: method '{recipe.last.get('method', '')}' takes one source, and the forest has several",
            hint="last: {method: branch_train_mix}",
        )
