"""The text that a result is verified on, as windows of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from upcycle.architectures.stock import build_config, load_image_processor, load_tokenizer
from upcycle.architectures.stock_auto import SEEDED
from upcycle.errors import CheckpointError, UpcycleError
from upcycle.files.user_paths import user_path
from upcycle.images.files import evenly_spread, image_files
from upcycle.images.pixels import ImageReader
from upcycle.images.sources import read_images
from upcycle.inputs.read import alike, find_inputs
from upcycle.models.image_states import image_states
from upcycle.text.held_out import FLATTERING, Parts, flattered, seen_share, sketch
from upcycle.text.mixture import read_parts
from upcycle.text.reading.plain_text import DEMO_TEXTS, EVERYDAY, read_text
from upcycle.text.windows import Frame, demo_parts, encode, frame_of, windows_of

if TYPE_CHECKING:
    from upcycle.architectures.dense.base import Family
    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.planning.job import PlannedJob
    from upcycle.recipe.recipe_parts import CalibrationRecipe

_LEAST_EXAMPLES = 4  # of what is longer than the tokens that are wanted
_SEEDS, _IMAGES = 16, 64  # at most, of a model that reads images or sounds: random ones, and those of files
_BESIDE = {  # what a model reads beside its tokens
    "pairs": ", read by encoder and decoder",
    "speech": ", with random audio features",
    "images and text": ", with random images",
}
_WINDOW, _LEAST = 256, 16  # tokens: of a window, and of a held-out text that is long enough to measure on


class MeasuredText(NamedTuple):
    """Holds what two models are compared on.

    Attributes:
        ids: token ids, int64 ``[N, W]``; of a model that reads images, these, fp32 ``[N, C, H, W]``, or the seeds of random ones.
        label: says which text they are from.
        unseen: ids of a text of another kind than all that was calibrated on; None where nothing was, or this kind was, too.
        given: all arguments of the models, ``[N, ...]`` each, where they read more than ``ids``: these are what a decoder reads, or
            count the rows.
    """

    ids: torch.Tensor
    label: str
    unseen: torch.Tensor | None = None
    given: dict[str, torch.Tensor] | None = None


def token_windows(
    job: PlannedJob, checkpoint: Checkpoint, text: str | None, tokens: int, calibrated: bool | None = None
) -> MeasuredText:
    """Return the token ids to measure on.

    A calibrated model is measured on the part of its calibration texts that was held out. A model that reads images is measured on
    those held out, and where there are none on random ones.

    Args:
        job: the conversion.
        checkpoint: its source, whose tokenizer is used.
        text: UTF-8 file (or folder of images) to measure on; None: the held-out part, or the embedded validation texts.
        tokens: the number of tokens wanted.
        calibrated: whether the calibration texts were read; None: as the job says.

    Raises:
        UsageError: the text cannot be read, or is shorter than one window.
        CheckpointError: the tokenizer writes tokens that the model does not have.
    """
    family = getattr(job, "family", None)
    reads = "text" if family is None else family.reads
    if calibrated is None:
        calibrated = bool(job.recipe.calibration.texts) and (job.calibrated or job.undecided)
    if family is not None and (found := _no_text(family, job, checkpoint, text, tokens, calibrated)) is not None:
        return found
    window = min(_WINDOW, job.context, tokens)
    if job.recipe.tokenizer == "none":
        rng = torch.Generator().manual_seed(job.recipe.seed)
        ids = torch.randint(job.vocab_size, (max(1, tokens // window), window), generator=rng)
        return MeasuredText(ids, f"random token ids (no tokenizer){_BESIDE.get(reads, '')}")
    tokenizer = load_tokenizer(checkpoint.source.path)
    frame = frame_of(tokenizer) if family is not None and family.encoder and reads == "text" else Frame()
    window = max(1, window - frame.tokens)
    wanted = job.recipe.calibration
    parts = _calibration_parts(wanted) if calibrated else {}
    own = [one for name, one in parts.items() if name not in DEMO_TEXTS]
    if text:
        contents = [read_text(text)]
        label = ": ".join(
            filter(None, (text, flattered(seen_share(contents[0], sketch(p.read for p in parts.values())))))
        )
    elif own:
        contents = [one.held_out for one in parts.values()]
        label = f"what was held out of the calibration text ({'; '.join(dict.fromkeys(one.how for one in own))})"
    elif parts:
        contents = [demo_parts(name)[1] for name in DEMO_TEXTS]
        label = "the quarter of the embedded texts that was not calibrated on"
    else:
        contents, label = [read_text(name) for name in DEMO_TEXTS], "embedded validation texts"
    encoded = [encode(tokenizer, content) for content in contents]
    if own and not text:
        longest = max(map(len, encoded))
        window = min(window, longest)
        if longest < _LEAST:
            window = max(1, min(_WINDOW, job.context, tokens) - frame.tokens)
            encoded = [encode(tokenizer, read_text(name)) for name in DEMO_TEXTS]
            label = "embedded validation texts (what was held out of the calibration text is too short)"
    ids = frame.around(windows_of(encoded, tokens, window))
    if int(ids.max()) >= job.vocab_size:
        raise CheckpointError(
            f"{checkpoint.source.path}: the tokenizer writes token {int(ids.max()):,}, and the model has {job.vocab_size:,}",
            hint="take the tokenizer that belongs to these weights",
        )
    label += _BESIDE.get(reads, "")
    unseen = _unseen(tokenizer, parts, tokens, max(1, min(_WINDOW, job.context) - frame.tokens)) if parts else None
    return MeasuredText(ids, label, None if unseen is None else frame.around(unseen))


def _no_text(
    family: Family, job: PlannedJob, checkpoint: Checkpoint, text: str | None, tokens: int, calibrated: bool
) -> MeasuredText | None:
    """Return what a model is measured on that reads more or other things than a text; None: it is measured on a text."""
    if family.pauses and not _plain(job, family.reads) and (text or calibrated):
        try:
            return _examples(family, job, checkpoint, text, tokens)
        except UpcycleError:
            if text:
                raise  # else as with texts: a model from elsewhere comes without them, and a conversion reads them later
    if family.reads == "images":
        return _images(job, checkpoint, text, tokens, calibrated)
    if family.reads in SEEDED:
        return MeasuredText(torch.arange(max(1, min(tokens, _SEEDS)))[:, None], f"random {family.reads}")
    return None


def _plain(job: PlannedJob, reads: str) -> bool:
    """Return whether a model reads plain texts, alone or, with an encoder and a decoder, one text twice."""
    return reads == "text" or (reads == "pairs" and job.recipe.calibration.target is None)


def _examples(family: Family, job: PlannedJob, checkpoint: Checkpoint, text: str | None, tokens: int) -> MeasuredText:
    """Return pairs, sounds, or images with texts to measure on: those of a source that is named, or held out of the calibration.

    Pairs, and what is said in sounds, are cut to one length, so that no padding is measured.
    """
    path, wanted = checkpoint.source.path, job.recipe.calibration
    if text:
        wanted = wanted.model_copy(update={"text": text})
    found = find_inputs(family.reads, wanted, path, checkpoint.raw_config, job.context)
    main, texts = found.main.held_out, found.texts.held_out if found.texts else []
    if text:
        main, texts = [*main, *found.main.read], [*texts, *(found.texts.read if found.texts else [])]
    reader = found.reader
    count = max(_LEAST_EXAMPLES, min(_IMAGES, tokens // max(map(reader.tokens, main))))
    chosen, said = alike(reader, main, count), alike(reader, texts, count) if texts else []
    if texts:  # both towers' embeddings are compared side by side
        both = min(len(chosen), len(said))
        chosen, said = chosen[:both], said[:both]
    batch = reader.batch(chosen, said)
    given = dict(batch.arguments)
    for part, name in (("encoder", "input_ids"), ("decoder", "decoder_input_ids")):
        if part in batch.kept:
            given[name] = given[name][:, : int(batch.kept[part].sum(1).min())]
    if "decoder_input_ids" in given:
        given.pop("attention_mask", None)
    label = f"{text}: {family.reads}" if text else f"what was held out of the calibration {family.reads}"
    ids = given.get("decoder_input_ids", torch.arange(len(chosen))[:, None])
    return MeasuredText(ids, label, None, given)


def _images(job: PlannedJob, checkpoint: Checkpoint, text: str | None, tokens: int, calibrated: bool) -> MeasuredText:
    """Return images to measure on: those of a folder that is named, those held out of the calibration, or random ones."""
    count, path = max(1, min(tokens, _IMAGES)), checkpoint.source.path
    if text or calibrated:
        try:
            reader = ImageReader(load_image_processor(path), build_config(checkpoint.raw_config, str(path)), path)
            if text:
                return MeasuredText(reader(evenly_spread(image_files(user_path(text)), count)), f"{text}: images")
            wanted = job.recipe.calibration
            held = read_images(wanted, max(1, wanted.tokens // image_states(checkpoint.raw_config, str(path)))).held_out
            return MeasuredText(reader(evenly_spread(held, count)), "what was held out of the calibration images")
        except UpcycleError:
            if text:
                raise  # else as with texts: a model from elsewhere comes without them, and a conversion reads them later
    return MeasuredText(torch.arange(max(1, min(tokens, _SEEDS)))[:, None], "random images")


def _unseen(tokenizer: Any, parts: Mapping[str, Parts], tokens: int, window: int) -> torch.Tensor | None:
    """Return windows of embedded text of a kind that was not calibrated on; half as many tokens as are measured otherwise."""
    content = read_text(EVERYDAY)
    if seen_share(content, sketch(part.read for part in parts.values())) > FLATTERING:
        return None
    encoded = encode(tokenizer, content)
    window = min(window, len(encoded))
    return windows_of([encoded], min(len(encoded), max(tokens // 2, window)), window)


def _calibration_parts(wanted: CalibrationRecipe) -> dict[str, Parts]:
    """Read the calibration texts; empty where they cannot be read, as a model from elsewhere comes without them."""
    try:
        return read_parts(wanted)
    except UpcycleError:
        return {}
