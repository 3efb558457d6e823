"""Checks, before the first byte is written, that stock transformers loads what a conversion reads and what it will write.

Models are built on the meta device, which costs no memory; the tokenizer is loaded, and the text of the verification is
read with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from upcycle.architectures.stock import empty_model, load_tokenizer, quiet_transformers
from upcycle.checkpoints.merged_checkpoint import JoinedCheckpoint
from upcycle.errors import CheckpointError
from upcycle.models.stock_layers import weights_not_found
from upcycle.planning.verification_text import MeasuredText, token_windows

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.planning.job import PlannedJob


def check_loadable(job: PlannedJob, checkpoint: Checkpoint, decided: bool = False) -> MeasuredText | None:
    """Build source and result as stock models without weights, and load the tokenizer.

    Args:
        job: the conversion.
        checkpoint: its source.
        decided: whether its layers are decided already, so that no calibration text is opened.

    Returns:
        The text to verify the result on; None where it will not be verified.

    Raises:
        CheckpointError: a stock class refuses a configuration (the message names the key), or finds no weight for a parameter.
        EnvironmentFault: the tokenizer cannot be loaded.
        UsageError: the text to verify on cannot be used.
    """
    seen: list[Mapping[str, Any]] = []
    for member in _members(checkpoint):
        if member.raw_config not in seen:
            model = check_config(member.raw_config, str(member.source.path))
            seen.append(member.raw_config)
        if missing := weights_not_found(model, member.store.specs):
            raise CheckpointError(
                f"{member.source.path}: stock transformers finds no weight for '{missing[0]}'",
                hint="compare config.json with the weights: do they belong together?",
            )
    check_config(job.config, "the result")
    if job.recipe.tokenizer == "copy":
        load_tokenizer(checkpoint.source.path)
    wanted = job.recipe.verification
    return (
        token_windows(job, checkpoint, wanted.text, wanted.tokens, False if decided else None)
        if wanted.enabled
        else None
    )


def check_config(raw: Mapping[str, Any], where: str) -> Any:
    """Build the stock model of a ``config.json`` on the meta device.

    Raises:
        CheckpointError: stock transformers builds none; the message names the key that forbids it, if a single one does.
    """
    try:
        return empty_model(raw, where)
    except CheckpointError as error:
        key = _culprit(raw, where)
        if key is None:
            raise
        raise CheckpointError(
            f"{where}: config.json: stock transformers builds no model with '{key}': {_short(raw[key])} "
            f"({error.message.rpartition(': ')[2] or error.message})",
            hint=f"correct '{key}' in config.json, or take the file of the original model",
        ) from None


def _culprit(raw: Mapping[str, Any], where: str) -> str | None:
    """Return the first key without which stock transformers builds a model, or None."""
    for key in raw:
        if key == "model_type":
            continue
        try:
            with quiet_transformers():
                empty_model({name: value for name, value in raw.items() if name != key}, where)
        except CheckpointError:
            continue
        return key
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _members(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    if not isinstance(checkpoint, JoinedCheckpoint):
        yield checkpoint
        return
    for member in checkpoint.members:
        yield from _members(member)
