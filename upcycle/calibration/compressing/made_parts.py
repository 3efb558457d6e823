"""Makes tensors of a compressed Mixture-of-Experts from the inputs of its layers: router rows, matrices of experts.

One pass of the uncut model over the text, one layer in memory. What a method makes of a layer is kept in a file, from which the
refit and the writing read it.

N windows of W tokens, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.expert_terms import LayerCut
from upcycle.calibration.compressing.moe_walk import MoeWalk, Routed, active_neurons
from upcycle.errors import CheckpointError
from upcycle.files.atomic_files import write_whole
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.layer_source import ExpertTokens
from upcycle.models.stock_layers import layers_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

_HELD_OUT_EVERY = 8  # windows


def made_file(folder: Path, layer: int) -> Path:
    """Return the file with what a method made of a layer, in the dtype that is stored."""
    return folder / LAYER_BLUEPRINTS / f"made.{layer:05d}.safetensors"


def held_out_tokens(streams: torch.Tensor) -> torch.Tensor:
    """Return which tokens of ``[N, W, d]`` judge the fits: those of every eighth window; boolean, ``[N W]``."""
    windows, width = streams.shape[:2]
    return torch.arange(windows * width) // width % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def make_parts(
    checkpoint: MoeCheckpoint,
    method: Compression,
    cuts: Mapping[int, LayerCut],
    keep: int,
    dtype: str,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
) -> None:
    """Let a method make the tensors of every layer, and write them to :func:`made_file`.

    Args:
        checkpoint: the MoE before it is cut.
        method: the method.
        cuts: what each layer's experts are made of.
        keep: how much the method keeps.
        dtype: the dtype that the result is written in, as a recipe means it.
        windows: the text, token ids ``[N, W]``.
        folder: where the files are written.
        progress: where to report.

    Raises:
        CheckpointError: what was made is not finite.
    """
    from safetensors.torch import save_file

    walk = MoeWalk(layers_of(checkpoint, dtype), windows.shape[1])
    (folder / LAYER_BLUEPRINTS).mkdir(exist_ok=True)
    with progress.phase(f"making {method.name}", len(walk.layers)):
        states = torch.cat([walk.embed(windows[batch]) for batch in walk.batches(len(windows))])
        held = held_out_tokens(states)
        for index in range(len(walk.layers)):
            with walk.loaded(index):
                seen: list[Routed] = []
                for batch in walk.batches(len(windows)):
                    states[batch] = walk.run(index, states[batch], seen.append if index in cuts else None)
                if index in cuts and not made_file(folder, index).exists():
                    rows = walk.layers[index].state_dict()[_names(checkpoint, index)["router"]]
                    x, chosen = torch.cat([part.x for part in seen]), torch.cat([part.experts for part in seen])
                    weights = torch.cat([part.weights for part in seen])
                    tokens = partial(_tokens_of, walk.places[index].experts, x, chosen, weights, held)
                    made = method.made(cuts[index], keep, rows.float(), tokens, partial(checkpoint.matrices, index))
                    stored = {part: _stored(checkpoint, index, part, tensor, dtype) for part, tensor in made.items()}
                    write_whole(made_file(folder, index), partial(save_file, stored))
            progress.advance()


def made_parts(checkpoint: MoeCheckpoint, folder: Path, index: int) -> dict[str, torch.Tensor]:
    """Return what was made of a layer, fp32, by the names of the stock class inside a layer; empty: nothing was."""
    from safetensors.torch import load_file

    path = made_file(folder, index)
    if not path.exists():
        return {}
    names = _names(checkpoint, index)
    return {names[part]: tensor.float() for part, tensor in load_file(path).items()}


def _names(checkpoint: MoeCheckpoint, index: int) -> dict[str, str]:
    """Return the names, inside a layer of the stock class, of ``router``, ``gate_up`` and ``down``."""
    model, found = checkpoint.model, {}
    for name, stored in model.stock_parts(index).items():
        own = name.removeprefix(f"{model.module_paths.layer(index)}.")
        if model.role(stored[0]) == "router":
            found["router"] = own
        elif model.role(stored[0]) in ("expert", "experts"):
            found["down" if own.endswith("down_proj") else "gate_up"] = own
    return found


def _stored(checkpoint: MoeCheckpoint, index: int, part: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    model = checkpoint.model
    names = (model.stock_parts(index)[f"{model.module_paths.layer(index)}.{_names(checkpoint, index)[part]}"]) or [""]
    made = tensor.to(getattr(torch, checkpoint.dtype_of(names[0], dtype))).contiguous()
    if not bool(made.isfinite().all()):
        raise CheckpointError(f"layer {index}: {part} overflows {made.dtype}", hint="--dtype bfloat16")
    return made


def _tokens_of(
    experts: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, held: torch.Tensor, expert: int
) -> ExpertTokens:
    """Return what an expert of a loaded layer did, given all tokens' inputs and choices."""
    tokens, slots = torch.where(chosen == expert)
    return ExpertTokens(x[tokens], active_neurons(experts, x[tokens], expert), weights[tokens, slots], held[tokens])
