"""Gathers what a model card is made from: the records in the folder, and the few things that only the user knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from upcycle.architectures.stock_auto import is_encoder, is_encoder_decoder, reads_of
from upcycle.checkpoints.licenses import License, common_license
from upcycle.errors import UsageError
from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.settings import base_type
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.registry import OWN_TARGETS, find
from upcycle.text.mixture import text_names
from upcycle.text.reading.plain_text import DEMO_TEXTS

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_DATASET = re.compile(r"([\w.-]+/[\w-][\w.-]*)(:[\w.-]*){0,2}")


class Loading(NamedTuple):
    """Names the classes of transformers that load a model and what prepares its input, and the hub's name of its task."""

    model: str
    reader: str
    task: str


_LOADINGS = {
    "text": Loading("AutoModelForCausalLM", "AutoTokenizer", "text-generation"),
    "image": Loading("AutoModelForImageTextToText", "AutoProcessor", "image-text-to-text"),
    "sound": Loading("AutoModelForMultimodalLM", "AutoProcessor", "audio-text-to-text"),
}
_WRITING = {  # by what an encoder and a decoder read
    "pairs": Loading("AutoModelForSeq2SeqLM", "AutoTokenizer", "text2text-generation"),
    "speech": Loading("AutoModelForSpeechSeq2Seq", "AutoProcessor", "automatic-speech-recognition"),
}
_READERS = {  # by what an encoder reads: what prepares it, and the task of one without a head
    "images": ("AutoImageProcessor", "image-feature-extraction"),
    "sounds": ("AutoFeatureExtractor", "feature-extraction"),
    "speech": ("AutoFeatureExtractor", "feature-extraction"),
    "images and text": ("AutoProcessor", "zero-shot-image-classification"),
}
_HEADS = {  # of encoders: end of the class's name -> the hub's task
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForAudioClassification": "audio-classification",
}


@dataclass(frozen=True)
class Facts:
    """Holds everything that a card says.

    ``recipe`` is the text of ``recipe.yaml``, ``keys`` its content, and ``config`` the content of ``config.json``. ``serving`` holds
    what ``verify --with`` found for each engine. ``mark`` says why the model should not be relied on, if it was published anyway.
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
    def reads(self) -> Literal["text", "image", "sound"]:
        """What the model reads, beside text."""
        wrapper = find("wrapper", base_type(self.config))
        return "text" if wrapper is None else wrapper.kind

    @property
    def own_class(self) -> bool:
        """Whether the model is of upcycle's own architecture, which transformers knows after ``import upcycle.models``."""
        return str(self.config.get("model_type")) in OWN_TARGETS

    @property
    def loading(self) -> Loading:
        """How the model is loaded, and what it is for."""
        reads = reads_of(self.config)
        if is_encoder_decoder(self.config):
            return _WRITING[reads]
        if not is_encoder(self.config):
            return _LOADINGS[self.reads]
        reader, task = _READERS.get(reads, ("AutoTokenizer", "feature-extraction"))
        name = str((self.config.get("architectures") or [""])[0])
        for head, own in _HEADS.items():
            if name.endswith(head):
                return Loading(f"AutoModel{head}", reader, own)
        return Loading("AutoModelForTextEncoding" if name.endswith("EncoderModel") else "AutoModel", reader, task)

    @property
    def mixed(self) -> bool:
        """Whether the model was made from several models."""
        return len({source["name"] for source in sources_of(self.record)}) > 1

    @property
    def grown(self) -> bool:
        """Whether the model was made of whole tensors of its source, more or fewer, and not converted."""
        return self.record["plan"]["kind"] in ("growth", "addition", "compression", "narrowing", "beside")

    @property
    def compressed(self) -> bool:
        """Whether experts of a MoE were left out or merged, or became dense FFNs."""
        return bool(self.record["plan"]["kind"] == "compression")

    @property
    def narrowed(self) -> bool:
        """Whether modules of a dense model were made smaller."""
        return bool(self.record["plan"]["kind"] == "narrowing")

    @property
    def pruned(self) -> bool:
        """Whether the model is a dense one with smaller FFNs."""
        return bool(self.record["plan"]["kind"] == "pruning")

    @property
    def moe(self) -> bool:
        """Whether the model has experts; a grown model may be dense."""
        return not self.pruned and (not self.grown or any("experts" in key for key in self.config))


def gather(
    folder: Path, name: str, license: License | None, base_model: str | None, kept: Mapping[str, Any], mark: str | None
) -> Facts:
    """Read the facts for a card from a folder.

    Args:
        folder: the converted model.
        name: the model's name on the card.
        license: the licence that the user named, if any.
        base_model: the hub id of the dense model that the user named, if any.
        kept: the metadata of the card before, which is used where no record and no argument decides.
        mark: why the model should not be relied on.

    Raises:
        CheckpointError: upcycle did not write the folder.
        UsageError: the sources' licences differ and no licence was named, or ``base_model`` is not a hub id.
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
    """Return the records of all models that the weights come from: the source, and those that were mixed."""
    return [record["source"], *(record.get("sources") or [])]


def public_name(name: str) -> str:
    """Return a name without the folders around it; a hub id stays as it is."""
    return Path(name).name if name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name else name


def _license(record: Mapping[str, Any], chosen: License | None, kept: Mapping[str, Any]) -> License | None:
    """Return the licence that the user names now or named on the card before, or else the one that all sources have."""
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
    """Return the hub datasets that the model was calibrated or trained on."""
    texts = list(text_names((record.get("calibration") or {}).get("text") or []))
    recipe = (record.get("training") or {}).get("recipe") or {}
    for stage in (recipe, *(recipe.get("stages") or [])):
        for domain in (stage.get("data") or {}).get("domains") or []:
            texts += domain["text"]
    matches = [_HUB_DATASET.fullmatch(text) for text in texts if text not in DEMO_TEXTS]
    # A name with a suffix, such as data/news.txt, is that of a file, as it is when texts are read.
    return list(dict.fromkeys(match[1] for match in matches if match and not Path(match[1]).suffix))
