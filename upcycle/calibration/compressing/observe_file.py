"""Observes a MoE into a file of its own, for compressions in many sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from upcycle.architectures.stock import load_tokenizer
from upcycle.calibration.compressing.observe_moe import observe_layers
from upcycle.calibration.own_text import with_own_text
from upcycle.calibration.read_tokens import tokens_of
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.output.workspace import explained_system_errors
from upcycle.files.user_paths import user_path
from upcycle.methods.compressing.observations import FEW_TOKENS, Observations, noted
from upcycle.notebook import IN_NOTEBOOKS
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.text.mixture import read_texts, traces
from upcycle.text.text_record import text_record


def observe(
    moe: str | Path,
    out: str | Path,
    text: str,
    tokens: int = 32768,
    dtype: str = "keep",
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress = IN_NOTEBOOKS,
    window: int | None = None,
) -> dict[str, Any]:
    """Observe the experts of ``moe`` on text, and write the observations into the file ``out``.

    Args:
        moe: a local folder or hub id.
        out: the file.
        text: as ``calibration.text`` of a recipe.
        tokens: how many tokens of it.
        dtype: the dtype to round the weights to.
        revision: branch, tag or commit of a hub id.
        overwrite: replace a file of observations.
        progress: where to report.
        window: tokens per window; None: as a recipe's ``calibration.window``.

    Returns:
        How many tokens every layer's experts saw, as plain data.

    Raises:
        UsageError: ``out`` is something else than a file of observations, or the text cannot be read.
        EnvironmentFault: its folder cannot be written to, or the disk is full.
        UpcycleError: the model cannot be read.
    """
    moe, out = str(moe), user_path(Path(out)).absolute()
    if out.is_dir():
        raise UsageError(f"{out} is a folder, and observations are one file", hint=f"{out / 'seen.safetensors'}")
    if out.exists():
        if not overwrite:
            raise UsageError(f"{out} is there already", hint="another file, or --overwrite")
        Observations.about(out)  # nothing else is replaced
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no folder", hint="make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{out.parent} cannot be written to", hint="name a file in another folder")
    calibration: dict[str, Any] = {"text": text.split(",") if "," in text else text, "tokens": tokens}
    if window is not None:
        calibration["window"] = window
    recipe = parse_recipe({"source": moe, "revision": revision, "calibration": calibration, "dtype": dtype}, "observe")
    checkpoint = MoeCheckpoint.open(moe, revision)
    wanted = recipe.calibration
    window = min(wanted.window, checkpoint.model.context, tokens)
    tokenizer = load_tokenizer(checkpoint.source.path)
    windows, own = tokens_of(wanted, read_texts(wanted), window, tokenizer, checkpoint, recipe.seed)
    if own is not None:
        kept = out.with_name(out.name + ".written")
        windows, _ = with_own_text(own, windows, checkpoint.source.path, kept, progress)
        kept.unlink(missing_ok=True)
    assert windows is not None
    about = {**text_record(recipe, windows), **traces(wanted)}
    with explained_system_errors(out):
        seen = observe_layers(checkpoint, dtype, windows, about, progress, out)
    noted(seen, progress)
    layers = [
        {"layer": layer, "unused": int((found.load == 0).sum()), "few": int((found.load < FEW_TOKENS).sum())}
        for layer, found in seen.layers.items()
    ]
    return {
        "out": str(out),
        "experts": checkpoint.model.experts,
        "top_k": seen.top_k,
        "tokens": windows.numel(),
        "layers": layers,
    }
