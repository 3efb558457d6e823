"""What a model card is made from: the records in the folder, and the few things that only the user can say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.checkpoints.licenses import License, common_license
from upcycle.errors import UsageError
from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.text.mixture import text_names
from upcycle.text.reading.plain_text import DEMO_TEXTS

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_DATASET = re.compile(r"([\w.-]+/[\w-][\w.-]*)(:[\w.-]*){0,2}")


@dataclass(frozen=True)
class Facts:
    """Everything a card says.

    ``recipe`` is the text of ``recipe.yaml`` and ``keys`` its content, ``config`` that of ``config.json``; ``serving`` holds what
    ``verify --with`` found of each engine; ``mark`` says why the model was published although it should not have been.
    """

    name: str
    record: dict[str, Any]
    recipe: str
    keys: dict[str, Any]
    config: dict[str, Any]
    verification: dict[str, Any] | None
    tasks: dict[str, Any] | None
    serving: dict[str, Any]
    license: License | None
    base_models: list[str]
    datasets: list[str]
    mark: str | None = None

    @property
    def mixed(self) -> bool:
        """Whether several models went into it."""
        return len({source["name"] for source in sources_of(self.record)}) > 1

    @property
    def grown(self) -> bool:
        """Whether it is a model grown by whole tensors, and no conversion."""
        return bool(self.record["plan"]["kind"] == "growth")

    @property
    def moe(self) -> bool:
        """Whether it has experts: a grown model may be dense."""
        return not self.grown or any("experts" in key for key in self.config)


def gather(
    folder: Path, name: str, license: License | None, base_model: str | None, kept: Mapping[str, Any], mark: str | None
) -> Facts:
    """Read the folder. ``kept`` is the metadata of the card that was there: it decides what no record does.

    Raises:
        CheckpointError: the folder was not made by this tool.
        UsageError: the sources' licences differ and nobody has decided, or ``base_model`` is no hub id.
    """
    record = records.read_record(folder)
    evaluation = records.read_evaluation(folder) or {}
    return Facts(
        name=name,
        record=record,
        recipe=(folder / records.RECIPE_FILE).read_text(encoding="utf-8"),
        keys=read_recipe(folder / records.RECIPE_FILE),
        config=read_json(folder / "config.json"),
        verification=records.read_verification(folder),
        tasks=evaluation.get("tasks"),
        serving=evaluation.get("serving", {}),
        license=_license(record, license, kept),
        base_models=_base_models(record, base_model, kept),
        datasets=_datasets(record),
        mark=mark,
    )


def sources_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything the weights are from: the source, and what is mixed."""
    return [record["source"], *(record.get("sources") or [])]


def public_name(name: str) -> str:
    """What a file or folder is called in public: without the folders it is in. A hub id stays what it is."""
    return Path(name).name if name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name else name


def _license(record: Mapping[str, Any], chosen: License | None, kept: Mapping[str, Any]) -> License | None:
    """What somebody decides now, or decided before; else what the sources have in common."""
    if decided := chosen or License.of_card(kept):
        return decided
    return common_license({source["name"]: License.of(source.get("license")) for source in sources_of(record)})


def _base_models(record: Mapping[str, Any], chosen: str | None, kept: Mapping[str, Any]) -> list[str]:
    if chosen and not _HUB_ID.fullmatch(chosen):
        raise UsageError(f"--base-model takes a hub id, got '{chosen}'", hint="--base-model org/name")
    named = [chosen] if chosen else [source["name"] for source in sources_of(record) if source.get("revision")]
    if not named and kept.get("base_model"):
        named = [kept["base_model"]] if isinstance(kept["base_model"], str) else list(kept["base_model"])
    return list(dict.fromkeys(named))


def _datasets(record: Mapping[str, Any]) -> list[str]:
    """Hub datasets that it was calibrated or trained on."""
    texts = list(text_names((record.get("calibration") or {}).get("text") or []))
    recipe = (record.get("training") or {}).get("recipe") or {}
    for stage in (recipe, *(recipe.get("stages") or [])):
        for domain in (stage.get("data") or {}).get("domains") or []:
            texts += domain["text"]
    matches = [_HUB_DATASET.fullmatch(text) for text in texts if text not in DEMO_TEXTS]
    # A name with a suffix (data/news.txt) is taken for a file when it is read, too.
    return list(dict.fromkeys(match[1] for match in matches if match and not Path(match[1]).suffix))
