"""``forest.json``: which steps of the rounds are done, from what, and how good their models are. It is written after every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from upcycle.branching.plan_rounds import SEED_STEP, RoundStep
from upcycle.errors import UpcycleError, UsageError
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.output.ownership import MADE_BY, contents
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe
from upcycle.trainers.recipe.training_recipe import TrainRecipe, parse_train_recipe

FOREST = "forest.json"
DomainContents: TypeAlias = dict[str, dict[str, str]]
# The keys of a training recipe that decide what its model is; all others say where and how fast.
_TRAINED_BY = ("data", "stages", "length", "global_batch", "seed", "dtype", "clip", "optimizer", "adapter")


class ForestRecord:
    """The steps that are done.

    Args:
        folder: the output.
        seed: the folder of the seed.
        texts: gives name -> fingerprint of every file that a domain reads, by domain; called only to compare or record them.

    Raises:
        UsageError: the folder holds something that is no forest of upcycle.
        CheckpointError: ``forest.json`` cannot be read.
    """

    def __init__(self, folder: Path, seed: Path, texts: Callable[[], DomainContents]) -> None:
        self.folder, self.seed, self._texts = folder, seed, texts
        path = folder / FOREST
        if folder.is_dir() and contents(folder) and not path.is_file():
            raise UsageError(
                f"{folder} is not empty, and upcycle grow did not write what is in it", hint="choose another output"
            )
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; the rounds need a folder", hint="choose another output")
        new: dict[str, Any] = {**MADE_BY, "steps": {}, "again": []}
        self._content: dict[str, Any] = read_json(path) if path.is_file() else new
        if self._content.get("made_by") != MADE_BY["made_by"] or not isinstance(self._content.get("steps"), dict):
            raise UsageError(f"{path} is not upcycle's", hint="choose another output")
        self._content.setdefault("again", [])

    def begin_again(self, steps: list[RoundStep]) -> None:
        """Forget all steps, and remember that what they left must not be continued."""
        self._content |= {"steps": {}, "again": [step.name for step in steps]}
        self.write()

    def restarts(self, step: RoundStep) -> bool:
        """Whether a step must not continue what an earlier call left of it."""
        return step.name in self._content["again"]

    def losses(self, step: RoundStep) -> dict[str, float] | None:
        """Nats per token of every domain that a step's model was measured on; ``None``: it is not done."""
        found = self._content["steps"].get(step.name)
        return None if found is None else found["losses"]

    def seed_losses(self, by: Mapping[str, Any]) -> dict[str, float] | None:
        """The seed's losses; ``None``: it was not measured, or another model was, or ``by`` other data, or on other text."""
        found = self._content["steps"].get(SEED_STEP, {})
        same = found.get("by") == by and found.get("read") == _samples([self.seed])
        same = same and found.get("texts") == self._texts()
        return found["losses"] if same else None

    def done(self, step: RoundStep) -> bool:
        """Whether a step is done, and its model is still there, and so is all that it was made of.

        What was deleted is made again, step by step; whatever was made of it stays as long as the same comes out.

        Raises:
            UsageError: it was done by another recipe, or from another model, or its domains had other text.
        """
        found = self._content["steps"].get(step.name)
        read = self._read_by(step)
        if found is None or not all(map(_is_there, (step.model, *read))):
            return False
        changed = first_difference(_decisive(_reread(found["recipe"], step)), _decisive(step.recipe))
        if changed is None and found["read"] != _samples(read):
            changed = "the weights that it reads"
        if changed is None:
            changed = self._changed_text(found.get("texts", {}))
        if changed is not None:
            raise UsageError(
                f"{step.folder} is done, but by another recipe, model or text than '{step.name}' has now: {changed} differs",
                hint="undo the change, choose another output, or begin all rounds again with --restart",
            )
        return True

    def keep(self, step: RoundStep, losses: dict[str, float], seconds: float) -> None:
        """Record that a step is done."""
        self._content["again"] = [each for each in self._content["again"] if each != step.name]
        self._content["steps"][step.name] = {
            "losses": losses,
            "seconds": round(seconds, 3),
            "recipe": step.recipe.model_dump(mode="json"),
            "read": _samples(self._read_by(step)),
            "texts": {domain: self._texts()[domain] for domain in step.domains},
        }
        self.write()

    def keep_seed(self, losses: dict[str, float], seconds: float, by: Mapping[str, Any]) -> None:
        """Record that the seed was measured, ``by`` which data."""
        self._content["steps"][SEED_STEP] = {
            "losses": losses,
            "seconds": round(seconds, 3),
            "by": dict(by),
            "read": _samples([self.seed]),
            "texts": self._texts(),
        }
        self.write()

    def write(self) -> None:
        """Write the file as a whole."""
        write_text_whole(self.folder / FOREST, json.dumps(self._content, indent=2) + "\n")

    def _changed_text(self, recorded: DomainContents) -> str | None:
        """What differs in the domains' files since they were ``recorded``; records of older versions have none."""
        if not recorded:
            return None
        now = {name: files for name, files in self._texts().items() if name in recorded}
        domain = next((name for name, files in recorded.items() if now.get(name) != files), None)
        if domain is None:
            return None
        file = next((file for file, was in recorded[domain].items() if now.get(domain, {}).get(file) != was), None)
        return f"the text of domain '{domain}'" + (f" ({file})" if file else "")

    def _read_by(self, step: RoundStep) -> list[Path]:
        """The folders of the models that a step reads."""
        return [self.seed if name == SEED_STEP else _weights(self.folder / name) for name in step.reads]


def _is_there(model: Path) -> bool:
    return any((model / name).is_file() for name in ("config.json", "adapter_config.json")) or model.is_file()


def _samples(models: Sequence[Path]) -> list[str]:
    """Hashes of samples of all weights of some models, wherever they lie."""
    return [SafetensorsFolder(model).sample() for model in models]


def _weights(folder: Path) -> Path:
    """The model of a step's folder: of a run, what it exported."""
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def _reread(content: Any, step: RoundStep) -> Any:
    """A recorded recipe, with the defaults of keys that are newer than it; as it is where it cannot be read any more."""
    with suppress(UpcycleError):
        return parse_train_recipe(content, FOREST) if step.trains else parse_recipe(content, FOREST)
    return content


def _decisive(recipe: Any) -> Any:
    """What of a recipe decides the model that it makes, as plain data, without names of folders."""
    if isinstance(recipe, TrainRecipe):
        content: dict[str, Any] = recipe.model_dump(mode="json", include=set(_TRAINED_BY))
        content["data"] = {**content["data"], "cache": None}
        return content
    if isinstance(recipe, Recipe):
        content = recipe.model_dump(mode="json", exclude={"source", "verification"})
        return {**content, "sources": [{**source, "name": ""} for source in content["sources"]]}
    return recipe


def first_difference(was: Any, now: Any, path: str = "") -> str | None:
    """The dotted path of the first value that differs in two structures of plain data; ``None``: none does."""
    if isinstance(was, dict) and isinstance(now, dict):
        pairs = [(str(key), was.get(key), now.get(key)) for key in {**was, **now}]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = [(str(place), *both) for place, both in enumerate(zip(was, now, strict=True))]
    else:
        return None if was == now else path or "recipe"
    parts = (first_difference(one, other, f"{path}.{key}" if path else key) for key, one, other in pairs)
    return next((part for part in parts if part is not None), None)
