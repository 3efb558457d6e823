"""Reads what a model whose passes pause at its layers is calibrated on: texts, pairs, sounds, images, images and captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.stock import build_config
from upcycle.architectures.stock_auto import is_encoder
from upcycle.ffn.activations import HELD_OUT_EVERY
from upcycle.inputs.read import FoundInputs, find_inputs, planned_batches
from upcycle.inputs.reader import InputBatch, start_token
from upcycle.planning.cost import CALIBRATION_BATCH_TOKENS

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.planning.expert_job import ExpertJob
    from upcycle.progress import Progress


@dataclass(frozen=True)
class InputSet:
    """Holds what a model is calibrated on, read when it is needed.

    Attributes:
        sha256: the hashes of it.
        about: what ``upcycle.json`` says of it.
    """

    found: FoundInputs
    tokens: int
    sha256: list[str]
    about: dict[str, Any]

    def batches(self) -> list[InputBatch]:
        """Return the arguments of the model, in batches."""
        plan = planned_batches(self.found, self.tokens, CALIBRATION_BATCH_TOKENS, HELD_OUT_EVERY)
        return [self.found.reader.batch(main, texts) for main, texts in plan.batches]


def reads_texts(job: ExpertJob) -> bool:
    """Return whether plain texts are enough: for a model that reads one text, or a pair of the same, not of two columns."""
    if job.family.calibrates_on:
        return False
    return job.family.reads == "text" or (job.family.reads == "pairs" and job.recipe.calibration.target is None)


def calibration_inputs(job: ExpertJob, checkpoint: DenseCheckpoint, progress: Progress) -> InputSet:
    """Find the inputs of a calibration, as many as make the recipe's tokens.

    Raises:
        UsageError: a source has none, or one that is not what the model reads; the message names it.
        CheckpointError: a processor does not fit the model.
        EnvironmentFault: a processor or a dataset cannot be read.
    """
    wanted, path = job.recipe.calibration, checkpoint.source.path
    found = find_inputs(job.family.calibrates_on or job.family.reads, wanted, path, checkpoint.raw_config, job.context)
    plan = planned_batches(found, wanted.tokens, CALIBRATION_BATCH_TOKENS, HELD_OUT_EVERY)
    first, texts = plan.batches[0]
    found.reader.batch(first[:1], texts[:1])  # a processor that does not fit is found before dear work
    if plan.tokens < 0.9 * wanted.tokens:
        progress.note(f"calibrating on {plan.tokens:,} tokens: there are no more (asked for {wanted.tokens:,})")
    about = {
        "text": wanted.texts,
        "tokens": plan.tokens,
        "window": max(map(found.reader.tokens, first)),
        found.what: sum(len(main) for main, _ in plan.batches),
        f"{found.what}_sha256": found.sha256[0],
        "held_out": found.held_out,
    }
    if found.texts:
        about |= {"texts": sum(len(some) for _, some in plan.batches), "texts_sha256": found.sha256[1]}
    return InputSet(found, wanted.tokens, found.sha256, about)


def text_batches(job: ExpertJob, checkpoint: DenseCheckpoint, windows: torch.Tensor) -> list[InputBatch]:
    """Return the arguments of a model for token ids ``[N, W]``; a decoder reads the text of its encoder, one token behind."""
    count, window = windows.shape
    rows = max(1, min(CALIBRATION_BATCH_TOKENS // window, count // HELD_OUT_EVERY))
    config = build_config(checkpoint.raw_config, str(checkpoint.source.path))
    made = []
    for ids in windows.split(rows):
        arguments = {"input_ids": ids}
        if job.family.reads == "pairs" and not is_encoder(config):
            start = torch.full((len(ids), 1), start_token(config, checkpoint.source.path))
            arguments["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)
        made.append(InputBatch(arguments))
    return made
