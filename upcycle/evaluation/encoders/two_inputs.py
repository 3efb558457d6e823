"""Measures models that read more than a text: the loss of a decoder, finding captions by images, embeddings of sounds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.nn.functional import cross_entropy, normalize

from upcycle.architectures.clean_settings import CONFIG, clean_file
from upcycle.architectures.stock import load_stock_model
from upcycle.architectures.stock_auto import is_encoder, reads_of
from upcycle.errors import UsageError
from upcycle.evaluation.encoders.embeddings import EmbeddingResult, compared
from upcycle.files.locate import locate
from upcycle.inputs.examples import InputExample, find_examples
from upcycle.inputs.reader import InputReader
from upcycle.models.experts import use_experts
from upcycle.models.model_inputs import states_model
from upcycle.progress import Progress
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.text.held_out import HELD_OUT_DOCUMENTS
from upcycle.trainers.routing.router_load import LayerLoad, layer_load, load_counts

_BATCH = 8
_TOKENS, _EXAMPLES = 65_536, 400  # at most, where the user gives no number
_NO_TARGET = -100
RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalResult:
    """Says how often an image's own caption is among the nearest of all captions, and the other way.

    Attributes:
        pairs: images with a caption each.
        nearest: how many of the nearest are looked at.
        image_to_text: for each of ``nearest``, the share of images whose caption is among them.
        text_to_image: the same of captions.
        reference_image_to_text: the same of the reference; None: there is none.
        reference_text_to_image: the same.
    """

    pairs: int
    nearest: list[int]
    image_to_text: list[float]
    text_to_image: list[float]
    reference_image_to_text: list[float] | None = None
    reference_text_to_image: list[float] | None = None


@dataclass(frozen=True)
class TwoInputScores:
    """Holds what was measured.

    Attributes:
        losses: source -> mean nats per token of the decoder, tokens, a remark.
        reference_losses: source -> the reference's.
        layers: the load of every MoE layer.
        embeddings: beside the reference's.
        retrieval: see :class:`RetrievalResult`.
        window: most tokens of a text.
    """

    losses: dict[str, tuple[float, int, str]]
    reference_losses: dict[str, float]
    layers: list[LayerLoad]
    embeddings: EmbeddingResult | None = None
    retrieval: RetrievalResult | None = None
    window: int = 0


def reads_more(model: str) -> str | None:
    """Return what a model reads, if that is more than a text, or images alone, or a text by an encoder alone; else None."""
    path = locate(model).path
    if not path.is_dir():
        return None
    raw = clean_file(path / CONFIG)
    reads = reads_of(raw)
    return None if reads in ("text", "images") or (reads == "pairs" and is_encoder(raw)) else reads


def measure_two_inputs(
    model: str,
    reference: str | None,
    wanted: CalibrationRecipe,
    tokens: int | None,
    calibrated_on: Sequence[str],
    progress: Progress,
) -> TwoInputScores:
    """Measure a model of an encoder and a decoder, of two towers, or of sounds, if wanted beside another one.

    Args:
        model: its folder or hub id.
        reference: the dense parent.
        wanted: its ``texts`` are the sources, as a calibration names them.
        tokens: most tokens of decoders' texts; ``sys.maxsize``: everything is read, whatever the model reads.
        calibrated_on: names of sources that the model was calibrated on, of which only what was held out is read.
        progress: where to report.

    Raises:
        UsageError: a source holds nothing of the kind, or nothing at all.
    """
    path, reads = locate(model).path, reads_more(model)
    assert reads is not None
    with progress.phase("loading the model", 1):
        loaded = _loaded(path)
        progress.advance()
    if reference is not None and reads_more(reference) != reads:
        raise UsageError(f"{model} and {reference} do not read the same", hint="name its dense parent as --reference")
    other = None if reference is None else _loaded(locate(reference).path)
    reader = InputReader(reads, loaded.config, path, min(wanted.window, _context(loaded.config)))
    found, remarks = {}, {}
    most = sys.maxsize if tokens == sys.maxsize else _EXAMPLES
    for name in wanted.texts:
        # A pair has at least one token.
        least = max(most, tokens or _TOKENS) if reads == "pairs" else most
        some = find_examples(reads, wanted.model_copy(update={"text": name}), least)
        if not some:
            raise UsageError(f"{name}: there is nothing in it to measure on", hint="name a source that is not empty")
        if reads != "pairs" and len(some) == most:
            progress.tell(f"{name}: at most {most} are read; --full reads all")
        found[name], remarks[name] = _unseen(some) if PurePath(name).name in calibrated_on else (some, "")
    if reads in ("pairs", "speech"):
        scores = _losses(loaded, other, reader, found, remarks, tokens or _TOKENS, progress)
    else:
        examples = [one for some in found.values() for one in some][:most]
        if reads == "sounds":
            scores = _sounds(loaded, other, reader, examples, model, progress)
        else:
            scores = _towers(loaded, other, reader, examples, progress)
    return replace(scores, window=reader.window)


def _unseen(examples: list[InputExample]) -> tuple[list[InputExample], str]:
    """Return what was held out of a calibration on examples, and a remark that says so, or that there is none."""
    held = [one for one in examples if one.number % HELD_OUT_DOCUMENTS == 0]
    return (held, "what was held out of the calibration") if held else (examples, "the model was calibrated on it")


def _loaded(path: Path) -> Any:
    model = load_stock_model(path, torch.float32).eval()
    use_experts(model, "eager")
    return model


def _context(config: Any) -> int:
    text = getattr(config, "text_config", None) or config
    limits = (getattr(text, key, None) for key in ("max_target_positions", "max_position_embeddings", "n_positions"))
    return next((int(one) for one in limits if one), 512)


def _losses(
    loaded: Any,
    other: Any,
    reader: InputReader,
    found: Mapping[str, Sequence[InputExample]],
    remarks: Mapping[str, str],
    tokens: int,
    progress: Progress,
) -> TwoInputScores:
    with load_counts(loaded) as counts:
        own = {name: decoder_loss(loaded, reader, some, tokens, progress, name) for name, some in found.items()}
    beside = {}
    if other is not None:
        beside = {
            name: decoder_loss(other, reader, some, tokens, progress, f"{name} (reference)")[0]
            for name, some in found.items()
        }
    losses = {name: (*one, remarks[name]) for name, one in own.items()}
    return TwoInputScores(losses, beside, [layer_load(layer, count) for layer, count in counts.items()])


def decoder_loss(
    model: Any, reader: InputReader, examples: Sequence[InputExample], tokens: int, progress: Progress, title: str
) -> tuple[float, int]:
    """Return the mean of ``-log p`` of every token that a decoder writes, in nats, and their number.

    Args:
        model: a stock model of an encoder and a decoder.
        reader: reads its inputs.
        examples: what its encoder reads, with the text that its decoder writes.
        tokens: about how many tokens are wanted at most.
        progress: where to report.
        title: what is read.
    """
    total, count = 0.0, 0
    with progress.phase(f"reading {title}", len(examples)), torch.no_grad():
        for first in range(0, len(examples), _BATCH):
            some = examples[first : first + _BATCH]
            batch = reader.batch(some)
            targets = torch.full_like(batch.arguments["decoder_input_ids"], _NO_TARGET)
            for row, one in zip(targets, some, strict=True):
                ids = reader.targets(one.text or "")
                row[: len(ids)] = ids
            logits = model(**batch.arguments, use_cache=False).logits
            losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=_NO_TARGET)
            total += losses.double().item()
            count += int((targets != _NO_TARGET).sum())
            progress.advance(len(some))
            if count >= tokens:
                break
    return total / max(1, count), count


def _sounds(
    loaded: Any, other: Any, reader: InputReader, examples: Sequence[InputExample], model: str, progress: Progress
) -> TwoInputScores:
    if other is None:
        raise UsageError(
            f"{model} has no answers that could be right or wrong: its embeddings are compared with another model's",
            hint="name its dense parent: --reference DENSE",
        )
    if len(examples) < 3:
        raise UsageError(
            f"{len(examples)} sounds are too few: neighbours are sought among them", hint="name more sounds"
        )

    def vectors(model: Any) -> torch.Tensor:
        made = []
        with progress.phase("embedding sounds", len(examples)), torch.no_grad():
            for one in examples:
                made.append(states_model(model)(**reader.batch([one]).arguments).last_hidden_state.mean(1))
                progress.advance()
        return normalize(torch.cat(made).double(), dim=-1)

    with load_counts(loaded) as counts:
        found = vectors(loaded)
    layers = [layer_load(layer, count) for layer, count in counts.items()]
    return TwoInputScores({}, {}, layers, compared(found, vectors(other), "sounds"))


def _towers(
    loaded: Any, other: Any, reader: InputReader, examples: Sequence[InputExample], progress: Progress
) -> TwoInputScores:
    pairs = [one for one in examples if not isinstance(one.item, str) and one.text]
    if len(pairs) < 3:
        raise UsageError(
            f"{len(pairs)} images with a caption are too few: each caption is sought among all",
            hint="name a folder with a .txt beside each image: --images FOLDER",
        )

    def vectors(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, texts = [], []
        with progress.phase("embedding images and captions", len(pairs)), torch.no_grad():
            for first in range(0, len(pairs), _BATCH):
                some = pairs[first : first + _BATCH]
                made = model(**reader.batch(some, [InputExample(one.text or "") for one in some]).arguments)
                images.append(made.image_embeds)
                texts.append(made.text_embeds)
                progress.advance(len(some))
        return normalize(torch.cat(images).double(), dim=-1), normalize(torch.cat(texts).double(), dim=-1)

    with load_counts(loaded) as counts:
        images, texts = vectors(loaded)
    layers = [layer_load(layer, count) for layer, count in counts.items()]
    captions = [one.text or "" for one in pairs]
    found = retrieval(images, texts, captions)
    if other is None:
        return TwoInputScores({}, {}, layers, None, RetrievalResult(len(pairs), *found))
    theirs = vectors(other)
    both = compared(torch.cat([images, texts]), torch.cat(theirs), "images and captions")
    return TwoInputScores({}, {}, layers, both, RetrievalResult(len(pairs), *found, *retrieval(*theirs, captions)[1:]))


def retrieval(
    images: torch.Tensor, texts: torch.Tensor, captions: Sequence[str]
) -> tuple[list[int], list[float], list[float]]:
    """Return how many nearest are looked at, and for each the shares of images and of captions that find their other half.

    An image whose caption is the same as another one's may find either. What is as near as one's own counts as nearer.

    Args:
        images: unit vectors ``[N, d]``.
        texts: those of their captions.
        captions: the captions.
    """
    scores = images @ texts.T
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    kinds = torch.tensor([numbers[caption] for caption in captions])
    same = kinds[:, None] == kinds
    nearest = [k for k in RECALLS if k < len(captions)]
    shares: list[list[float]] = []
    for each in (scores, scores.T):
        own = each.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        before = ((each >= own) & ~same).sum(1)
        shares.append([(before < k).double().mean().item() for k in nearest])
    return nearest, shares[0], shares[1]
