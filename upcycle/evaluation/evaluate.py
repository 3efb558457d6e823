"""Measures any model, if wanted beside another one: perplexity and expert load, scores on tasks, speed and memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.evaluation.encoders.embeddings import EmbeddingResult
from upcycle.evaluation.encoders.image_classes import ClassResult
from upcycle.evaluation.encoders.measure import encoder_folder, measure_encoder
from upcycle.evaluation.encoders.two_inputs import RetrievalResult, measure_two_inputs, reads_more
from upcycle.evaluation.routing_habits import RoutingHabits, routing_habits
from upcycle.evaluation.speed import Speed, measure_speed
from upcycle.evaluation.task_scores import TaskScores, score_tasks
from upcycle.evaluation.timed_dtype import AUTO
from upcycle.evaluation.window_losses import WindowRunner
from upcycle.files import records
from upcycle.files.locate import locate
from upcycle.files.user_paths import user_path
from upcycle.notebook import IN_NOTEBOOKS, HtmlShown
from upcycle.progress import Progress
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.text.held_out import unseen
from upcycle.text.reading.plain_text import DEMO_TEXTS, EVERYDAY
from upcycle.text.windows import encode
from upcycle.trainers.routing.router_load import LayerLoad, layer_load, load_counts
from upcycle.verification.verdict import json_numbers, perplexity_of

SAMPLE = 8192  # tokens of each text: a whole text can take an hour


@dataclass(frozen=True)
class TextResult:
    """Holds the result of one model on one text; ``nats_per_token`` is the mean negative log likelihood of ``predicted`` tokens.

    ``remark`` says which part of the text was used, or how much of it the model was calibrated on; it is usually empty.
    """

    text: str
    tokens: int
    predicted: int
    nats_per_token: float
    perplexity: float
    remark: str = ""
    reference_nats_per_token: float | None = None
    reference_perplexity: float | None = None


@dataclass(frozen=True)
class Evaluation(HtmlShown):
    """Holds the results for one model; what was not measured is empty or None. ``as_dict`` has the documented JSON keys.

    Of masked language models, ``texts`` has pseudo-perplexities. ``embeddings`` and ``classes`` are those of other encoders.
    """

    model: str
    reference: str | None
    window: int
    stride: int
    texts: list[TextResult]
    layers: list[LayerLoad]
    tasks: TaskScores | None = None
    speed: Speed | None = None
    embeddings: EmbeddingResult | None = None
    classes: ClassResult | None = None
    retrieval: RetrievalResult | None = None
    routing: RoutingHabits | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        content: dict[str, Any] = json_numbers(asdict(self))
        return content


def evaluate(
    model: str | Path,
    *,
    text: str | Sequence[str] | None = None,
    reference: str | Path | None = None,
    window: int = 512,
    stride: int | None = None,
    tokens: int | None = None,
    full: bool = False,
    tasks: str | Sequence[str] | None = None,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    speed: bool = False,
    dtype: str | None = None,
    images: str | Path | None = None,
    column: str = "text",
    target: str | None = None,
    routing: bool = False,
    earlier: Sequence[str | Path] = (),
    progress: Progress = IN_NOTEBOOKS,
) -> Evaluation:
    """Measure perplexity in fp32 with strided windows, and the load of every expert; or scores on ``tasks``, or ``speed``.

    An encoder is measured by what its class is for. Masked language models: the pseudo-perplexity (arXiv 1910.14659) of some of
    each text's tokens, from windows of at most 128. Image classifiers: accuracy on ``images``, and agreement with the reference.
    Others: the cosine of their embeddings with the reference's, and how many of the ten nearest neighbours are the same. Models
    of an encoder and a decoder: the loss of what the decoder writes. CLIP and SigLIP: how often an image finds its caption.

    Windows of ``window`` tokens begin ``stride`` tokens apart (default: half a window), and each token counts only once, so that
    all tokens after the first window have at least ``window - stride`` tokens of context. Scores and speed are saved in
    ``evaluation.json``, for report and card, if :func:`upcycle.convert` or :func:`upcycle.export` wrote the model.

    Args:
        model: folder, hub id, ``.gguf`` file or ``demo``; dense or MoE.
        text: UTF-8 files, or ``prose`` / ``code``; default: both embedded validation texts, or none with tasks or speed.
        reference: another model, measured in the same way; for texts, it must have the same tokenizer.
        window: tokens per window, at most the model's context.
        stride: tokens between the beginnings of windows.
        tokens: most tokens to read of each text, from its beginning; default: 8,192 (of masked language models, 512 are scored;
            of an encoder and a decoder, 65,536 that the decoder writes).
        full: read whole texts, and all sounds, or images with captions, of a model that reads these (default: 400).
        tasks: names of lm-eval's tasks, groups or tags.
        task_folder: folder with more tasks, which may not run code.
        limit: only the first questions of each task.
        batch: sequences per forward pass of a task.
        images: for encoders of images, a folder of them; of a classifier, with a subfolder per class; of CLIP, with a caption
            (``NAME.txt``) beside each.
        column: of a model of two texts, the column of ``text`` (files of rows, hub datasets) that its encoder reads.
        target: the column that its decoder writes.
        speed: time prefill and decoding of both models, in turns, and measure their memory.
        dtype: of speed alone; default: ``auto``, the stored one where the machine multiplies it natively, else fp32.
        routing: ask what the routers of a MoE follow: token ids, places in a window, and what earlier models chose.
        earlier: of routing: earlier models of the same shape, or training runs, all of whose checkpoints are compared.
        progress: receives the progress.

    Raises:
        UsageError: both ``tokens`` and ``full`` were given, ``dtype`` without ``speed``, ``tokens`` is below 2, a text is missing or
            empty, the stride is not below the window, or a task is unknown or faulty.
        EnvironmentFault: a model does not fit into memory, or lm-eval or the data of a task is missing.
    """
    if (task_folder or limit is not None) and not tasks:
        raise UsageError("--task-folder and --limit need --tasks", hint="name the tasks: --tasks NAME,NAME")
    if full and tokens is not None:
        raise UsageError("--tokens and --full: give one of them", hint="--full reads whole texts")
    if tokens is not None and tokens < 2:
        raise UsageError(f"--tokens: at least 2 are needed to measure a text, got {tokens}", hint="leave --tokens out")
    if earlier and not routing:
        raise UsageError("--earlier compares what routers choose", hint="--routing --earlier RUN")
    if dtype and not speed:
        raise UsageError("--dtype says what --speed computes in", hint=f"--speed --dtype {dtype}")
    other = str(reference) if reference else None
    scores = timed = habits = None
    if tasks:
        task_names = [tasks] if isinstance(tasks, str) else list(tasks)
        folder = Path(task_folder) if task_folder else None
        scores = score_tasks(str(model), other, task_names, folder=folder, limit=limit, batch=batch, progress=progress)
        _keep(str(model), {"tasks": scores.as_dict()}, progress)
    if speed:
        timed = measure_speed(str(model), other, dtype=dtype or AUTO, progress=progress)
        _keep(str(model), {"speed": timed.as_dict()}, progress)
    given = [text] if isinstance(text, str) else list(text or [])
    if routing:
        most = None if full else tokens or SAMPLE
        habits = routing_habits(
            str(model), given or list(DEMO_TEXTS), most, window, list(map(str, earlier)), progress=progress
        )
    names = given or ([] if scores or timed or (habits and not other) else list(DEMO_TEXTS))
    if names and reads_more(str(model)) is not None:
        sources = [str(images)] if images else []
        wanted = {
            "text": [*sources, *(names if text else [])],
            "column": column,
            "target": target,
            "window": max(8, window),
        }
        recipe = CalibrationRecipe.model_validate(wanted)
        found = _of_two_inputs(str(model), other, recipe, sys.maxsize if full else tokens, progress)
        return replace(found, tasks=scores, speed=timed, routing=habits)
    if names and encoder_folder(str(model)) is not None:
        chosen = names if text else [*DEMO_TEXTS, EVERYDAY]
        found = _of_encoder(
            str(model),
            other,
            chosen,
            str(images) if images else None,
            window,
            sys.maxsize if full else tokens,
            progress,
        )
        return replace(found, tasks=scores, speed=timed, routing=habits)
    if images:
        raise UsageError(f"{model} reads no images", hint="leave --images out")
    if not names:
        return Evaluation(
            str(model), other, window, stride or max(1, window // 2), [], [], scores, timed, routing=habits
        )
    found = _on_texts(str(model), other, names, window, stride, None if full else tokens or SAMPLE, progress)
    return replace(found, tasks=scores, speed=timed, routing=habits)


def _keep(model: str, measured: dict[str, Any], progress: Progress) -> None:
    """Write what was measured into the model's folder, if upcycle wrote the model."""
    folder = user_path(model)
    if not (folder / records.FILE).is_file():
        return
    try:
        records.write_evaluation(folder, measured)
    except OSError as error:
        progress.note(
            f"{records.EVALUATION_FILE} cannot be written, so report and card will lack these numbers: {error.strerror}"
        )


def _on_texts(
    model: str,
    reference: str | None,
    names: Sequence[str],
    window: int,
    stride: int | None,
    tokens: int | None,
    progress: Progress,
) -> Evaluation:
    with progress.phase("loading text and model", 2):
        tokenizer = load_tokenizer(locate(model).path)
        contents = {name: unseen(name, _calibration(model)) for name in names}
        whole = {name: encode(tokenizer, content) for name, (content, _) in contents.items()}
        encoded = {name: ids[:tokens] for name, ids in whole.items()}
        short = next((name for name, ids in encoded.items() if len(ids) < 2), None)
        if short is not None:
            raise UsageError(f"{short}: fewer than two tokens", hint="choose a longer --text")
        if reference:
            _same_vocabulary(tokenizer, load_tokenizer(locate(reference).path), model, reference)
        longer = [f"{name} has {len(ids):,}" for name, ids in whole.items() if len(ids) > len(encoded[name])]
        if longer and tokens == SAMPLE:
            progress.tell(f"reading the first {tokens:,} tokens of each text ({', '.join(longer)}); --full reads all")
        progress.advance()
        runner = WindowRunner(model, window, stride)
        progress.advance()
    with load_counts(runner.model) as counts:
        measured = {name: runner.loss(ids, progress, name) for name, ids in encoded.items()}
    layers = [layer_load(layer, count) for layer, count in counts.items()]
    compared: dict[str, float] = {}
    if reference:
        del runner.model
        other = WindowRunner(reference, runner.window, runner.stride)
        compared = {name: other.loss(ids, progress, f"{name} (reference)")[0] for name, ids in encoded.items()}
    texts = [
        TextResult(
            text=name,
            tokens=len(encoded[name]),
            predicted=predicted,
            nats_per_token=loss,
            perplexity=perplexity_of(loss),
            remark=contents[name][1],
            reference_nats_per_token=compared.get(name),
            reference_perplexity=perplexity_of(compared[name]) if name in compared else None,
        )
        for name, (loss, predicted) in measured.items()
    ]
    return Evaluation(model, reference, runner.window, runner.stride, texts, layers)


def _of_encoder(
    model: str,
    reference: str | None,
    names: Sequence[str],
    images: str | None,
    window: int,
    tokens: int | None,
    progress: Progress,
) -> Evaluation:
    contents = {name: unseen(name, _calibration(model)) for name in names}
    plain = {name: content for name, (content, _) in contents.items()}
    found = measure_encoder(model, reference, plain, images, window, tokens, progress)
    texts = [
        TextResult(
            text=name,
            tokens=predicted,
            predicted=predicted,
            nats_per_token=loss,
            perplexity=perplexity_of(loss),
            remark=contents[name][1],
            reference_nats_per_token=found.reference_losses[name][0] if reference else None,
            reference_perplexity=perplexity_of(found.reference_losses[name][0]) if reference else None,
        )
        for name, (loss, predicted) in found.losses.items()
    ]
    return Evaluation(
        model,
        reference,
        found.window,
        found.window,
        texts,
        found.layers,
        embeddings=found.embeddings,
        classes=found.classes,
    )


def _of_two_inputs(
    model: str, reference: str | None, wanted: CalibrationRecipe, tokens: int | None, progress: Progress
) -> Evaluation:
    reads = reads_more(model)
    if not wanted.texts or (reads == "pairs" and wanted.target is None):
        hint = {
            "pairs": "--text ROWS.jsonl --column QUESTION --target ANSWER, the columns of encoder and decoder",
            "images and text": "--images FOLDER, with a caption (NAME.txt) beside each image",
        }.get(
            str(reads), "--text FOLDER" + (" of sounds, with a .txt beside each" if reads == "speech" else " of sounds")
        )
        raise UsageError(f"{model} reads {reads}, and none are named", hint=hint)
    calibration = _calibration(model) or {}
    seen = [PurePath(str(name)).name for name in calibration.get("text") or []]
    found = measure_two_inputs(model, reference, wanted, tokens, seen, progress)
    texts = [
        TextResult(
            text=name,
            tokens=count,
            predicted=count,
            nats_per_token=loss,
            perplexity=perplexity_of(loss),
            remark=remark,
            reference_nats_per_token=found.reference_losses.get(name),
            reference_perplexity=perplexity_of(found.reference_losses[name])
            if name in found.reference_losses
            else None,
        )
        for name, (loss, count, remark) in found.losses.items()
    ]
    return Evaluation(
        model,
        reference,
        found.window,
        0,
        texts,
        found.layers,
        embeddings=found.embeddings,
        retrieval=found.retrieval,
    )


def _calibration(model: str) -> dict[str, Any] | None:
    """Return the record of the text that a model was calibrated on, or None."""
    folder = user_path(model)
    found = records.read_record(folder)["calibration"] if (folder / records.FILE).is_file() else None
    return found if isinstance(found, dict) else None


def _same_vocabulary(first: Any, second: Any, model: str, reference: str) -> None:
    if first.get_vocab() != second.get_vocab():
        raise UsageError(
            f"{model} and {reference} have different vocabularies; perplexity per token cannot be compared",
            hint="compare models that share a tokenizer",
        )
