"""Measures an encoder by what its class is for: masked tokens, classes of images, or embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upcycle.architectures.clean_settings import CONFIG, clean_file
from upcycle.architectures.stock import load_image_processor, load_tokenizer
from upcycle.architectures.stock_auto import class_name, is_encoder, reads_of
from upcycle.errors import UsageError
from upcycle.evaluation.encoders.embeddings import EmbeddingResult, compared, embed_texts, pools_first, sentences
from upcycle.evaluation.encoders.image_classes import ClassResult, image_vectors, judged, labels_of, predictions
from upcycle.evaluation.encoders.pseudo_perplexity import pseudo_loss
from upcycle.files.locate import locate
from upcycle.files.user_paths import user_path
from upcycle.images.files import evenly_spread, image_files
from upcycle.images.pixels import ImageReader
from upcycle.models.load import load_model
from upcycle.progress import Progress
from upcycle.registry import find
from upcycle.text.windows import encode, frame_of, windows_of
from upcycle.trainers.routing.router_load import LayerLoad, layer_load, load_counts

_WINDOW = 128  # tokens, at most: every scored token reads a window once
_TOKENS = 512  # scored of each text, where the user gives no number
_SENTENCES, _IMAGES = 400, 2000  # at most


@dataclass
class EncoderScores:
    """Holds what was measured of an encoder.

    Attributes:
        window: tokens per window.
        losses: text -> the mean pseudo-loss of a token in nats, and the number of tokens.
        reference_losses: the same of the reference.
        embeddings: see :class:`EmbeddingResult`; None: not measured.
        classes: see :class:`ClassResult`; None: not measured.
        layers: the load of every MoE layer.
    """

    window: int
    losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    reference_losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    embeddings: EmbeddingResult | None = None
    classes: ClassResult | None = None
    layers: list[LayerLoad] = field(default_factory=list)


def encoder_folder(model: str) -> Path | None:
    """Return the folder of a model that is an encoder; None for any other."""
    path = locate(model).path
    return path if path.is_dir() and is_encoder(clean_file(path / CONFIG)) else None


def measure_encoder(
    model: str,
    reference: str | None,
    contents: Mapping[str, str],
    images: str | None,
    window: int,
    tokens: int | None,
    progress: Progress,
) -> EncoderScores:
    """Measure an encoder, if wanted beside another one.

    Args:
        model: its folder or hub id.
        reference: the dense parent; embeddings can only be compared with another model's.
        contents: name -> text; for encoders of text.
        images: a folder of images; for encoders of images.
        window: most tokens per window.
        tokens: most tokens to score of each text.
        progress: where to report.

    Raises:
        UsageError: what the model reads is missing, or it has no head and there is no reference.
    """
    path = locate(model).path
    with progress.phase("loading the model", 1):
        loaded = load_model(model, encoder=True)
        progress.advance()
    name = class_name(loaded.config)
    other = None if reference is None else load_model(reference, encoder=True)
    reads = reads_of(loaded.config)
    if other is not None and reads_of(other.config) != reads:
        raise UsageError(f"{model} and {reference} do not read the same", hint="name its dense parent as --reference")
    if reads == "images":
        return _on_images(name, loaded, other, path, model, images)(progress)
    if images:
        raise UsageError(f"{model} reads text, not images", hint="leave --images out")
    if name.endswith("ForMaskedLM"):
        return _masked(loaded, other, path, contents, window, tokens, progress)
    texts = sentences(list(contents.values()), _SENTENCES)
    tokenizer = load_tokenizer(path)
    if other is None:
        raise _no_reference(model, name)
    first, context = pools_first(path), _context(loaded.config)
    with load_counts(loaded.base_model) as counts:
        found = embed_texts(loaded, tokenizer, texts, context, first, progress)
    expected = embed_texts(other, tokenizer, texts, context, first, progress)
    what = f"lines of {', '.join(contents)}"
    return EncoderScores(window, embeddings=compared(found, expected, what), layers=_loads(counts))


def _on_images(
    name: str, loaded: Any, other: Any, path: Path, model: str, images: str | None
) -> Callable[[Progress], EncoderScores]:
    if not images:
        raise UsageError(
            f"{model} reads images, and none are named", hint="--images FOLDER, with a subfolder per class"
        )
    folder = user_path(images)
    items = evenly_spread(image_files(folder), _IMAGES)
    reader = ImageReader(load_image_processor(path), loaded.config, path)
    classifies = name.endswith("ForImageClassification")
    labels = labels_of(items, loaded.config, str(folder)) if classifies else None
    if labels is None and other is None:
        raise _no_reference(model, name)

    def run(progress: Progress) -> EncoderScores:
        of = predictions if labels is not None else image_vectors
        with load_counts(loaded if labels is not None else loaded.base_model) as counts:
            found = of(loaded, items, reader, progress)
        expected = None if other is None else of(other, items, reader, progress)
        scores = EncoderScores(1, layers=_loads(counts))
        if labels is not None:
            scores.classes = judged(found, labels, expected)
        else:
            assert expected is not None
            scores.embeddings = compared(found, expected, f"images of {images}")
        return scores

    return run


def _masked(
    loaded: Any,
    other: Any,
    path: Path,
    contents: Mapping[str, str],
    window: int,
    tokens: int | None,
    progress: Progress,
) -> EncoderScores:
    tokenizer = load_tokenizer(path)
    if tokenizer.mask_token_id is None:
        raise UsageError(f"the tokenizer in {path} has no mask token, which stands for the token to predict")
    frame, most = frame_of(tokenizer), tokens or _TOKENS
    window = min(window, _context(loaded.config), _WINDOW)
    windows = {}
    for name, content in contents.items():
        ids = encode(tokenizer, content)
        inner = max(1, min(window - frame.tokens, len(ids)))
        windows[name] = frame.around(windows_of([ids], len(ids), inner))

    def losses(model: Any, side: str) -> dict[str, tuple[float, int]]:
        return {
            name: pseudo_loss(model, ids, frame, tokenizer.mask_token_id, most, progress, f"{name}{side}")
            for name, ids in windows.items()
        }

    with load_counts(loaded) as counts:
        found = losses(loaded, "")
    compared_with = {} if other is None else losses(other, " (reference)")
    return EncoderScores(window, found, compared_with, layers=_loads(counts))


def _loads(counts: Mapping[int, torch.Tensor]) -> list[LayerLoad]:
    return [layer_load(layer, count) for layer, count in counts.items()]


def _context(config: Any) -> int:
    described = find("described", getattr(config, "base_model_type", None) or config.model_type)
    assert described is not None  # it is an encoder, and all of these are
    skipped = (getattr(config, "pad_token_id", None) or 0) + 1 if described.counts_from_padding else 0
    return int(getattr(config, "max_position_embeddings", None) or _WINDOW) - skipped


def _no_reference(model: str, name: str) -> UsageError:
    return UsageError(
        f"{model} ({name}) has no head whose answers could be right or wrong: its embeddings are compared with another model's",
        hint="name its dense parent: --reference DENSE",
    )
