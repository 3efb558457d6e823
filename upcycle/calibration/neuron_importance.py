"""Measures the importance of every neuron for every kind of text, |h * dL/dh|, with one decoder layer in memory.

LLaMA-MoE (arXiv 2406.16554) clusters the text and, per cluster and neuron, averages over tokens the first-order Taylor
estimate of what removing the neuron does to the loss. Forward, the inputs of all layers are kept in files; backward, each
layer is run once more with gradients, and hands the gradient of its input to the one below.

Deviation: texts are clustered by the dense model's own final hidden states (mean per piece of text, k-means), not by a second
embedding model. A piece is a window, or where that makes fewer than two per cluster, a half, a quarter and so on of one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from upcycle.errors import UsageError
from upcycle.files.formats.token_files import TokenFile
from upcycle.models.layer_runner import LayerRunner, logits_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.planning.expert_job import ExpertJob

_LOGIT_BYTES = 1 << 28  # of the fp32 logits of a batch, at most
SHORTEST_PIECE = 32  # tokens


@dataclass(frozen=True)
class _Clustering:
    """A division of the text into pieces of so many tokens, and the cluster of each, int64 ``[N]``."""

    piece: int
    labels: torch.Tensor
    clusters: int


def write_importance(
    path: Path,
    runner: LayerRunner,
    checkpoint: DenseCheckpoint,
    windows: torch.Tensor,
    clusters: int,
    job: ExpertJob,
    progress: Progress,
) -> None:
    """Measure all layers on ``windows`` ``[N, W]`` and write fp32 ``importance.L`` ``[clusters, F]`` for each.

    Raises:
        UsageError: there are fewer pieces of text than clusters.
    """
    from safetensors.torch import save

    (found,) = measure_importance(path.parent, runner, checkpoint, windows, [clusters], job, progress).values()
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(save({f"importance.{index}": tensor for index, tensor in found.items()}))
    temporary.rename(path)


def measure_importance(
    folder: Path,
    runner: LayerRunner,
    checkpoint: DenseCheckpoint,
    windows: torch.Tensor,
    clusters: Collection[int],
    job: ExpertJob,
    progress: Progress,
) -> dict[int, dict[int, torch.Tensor]]:
    """Measure all layers on ``windows`` ``[N, W]``, for several numbers of clusters by one pass forward and one backward.

    Args:
        folder: for the files of states and gradients, which are removed.
        runner: runs the dense model's layers.
        checkpoint: the dense model.
        windows: token ids.
        clusters: into how many clusters the text is divided, one for every expert.
        job: any conversion of the model, for its seed and dtype.
        progress: receives the progress.

    Returns:
        For each number of clusters, layer -> fp32 ``[clusters, F]``.

    Raises:
        UsageError: there are fewer pieces of text than clusters.
    """
    pieces = {count: _piece(windows, count) for count in clusters}
    width, layers = job.dense.hidden_size, job.dense.num_hidden_layers
    vocabulary = 4 * windows.shape[1] * job.dense.vocab_size
    batch = max(1, min(4096, _LOGIT_BYTES // vocabulary * windows.shape[1]) // windows.shape[1]) * windows.shape[1]
    states = [TokenFile(folder / f"forward.{index}", width) for index in range(layers + 1)]
    gradients = [TokenFile(folder / f"gradient.{index}", width) for index in range(layers + 1)]
    with progress.phase("measuring importance", 2 * layers):
        with torch.no_grad():
            states[0].write(map(runner.embed, windows.flatten().split(batch)))
            for index in range(layers):
                with runner.loaded(index):
                    states[index + 1].write(runner.whole(index, block) for block in states[index].blocks(batch))
                progress.advance()
        clusterings = [
            _Clustering(piece, _text_clusters(states[layers], piece, batch, count, job.recipe.seed), count)
            for count, piece in pieces.items()
        ]
        _loss_gradients(checkpoint, job, windows, states[layers], gradients[layers], batch)
        found: dict[int, dict[int, torch.Tensor]] = {count: {} for count in pieces}
        for index in reversed(range(layers)):
            measured = _backward(runner, index, states, gradients, clusterings, batch)
            for count, importance in zip(pieces, measured, strict=True):
                found[count][index] = importance
            states[index + 1].release()
            gradients[index + 1].release()
            progress.advance()
    for file in (states[0], gradients[0]):
        file.release()
    return found


def _piece(windows: torch.Tensor, clusters: int) -> int:
    """Return the length of the pieces of text that are divided into so many clusters."""
    piece = windows.shape[1]
    while windows.numel() // piece < 2 * clusters and piece % 2 == 0 and piece > SHORTEST_PIECE:
        piece //= 2
    if windows.numel() // piece < clusters:
        raise UsageError(
            f"{clusters} text clusters, one per expert, need as many pieces of text; there are {windows.numel() // piece}",
            hint="more --calibration-tokens, or fewer experts",
        )
    return piece


def read_importance(path: Path) -> dict[int, torch.Tensor]:
    """Return the importance that :func:`write_importance` wrote: layer -> fp32 ``[C, F]``."""
    from safetensors.torch import load_file

    return {int(name.split(".")[1]): tensor for name, tensor in load_file(path).items()}


def _text_clusters(final: TokenFile, piece: int, batch: int, clusters: int, seed: int) -> torch.Tensor:
    """Return the cluster of every piece of text, int64 ``[N]``."""
    from sklearn.cluster import KMeans

    means = [block.view(-1, piece, block.shape[1]).mean(1) / block.norm(dim=1).mean() for block in final.blocks(batch)]
    points = torch.nn.functional.normalize(torch.cat(means), dim=1)
    fitted = KMeans(clusters, n_init=4, random_state=seed % 2**32).fit(points.double().numpy())
    return torch.from_numpy(fitted.labels_).long()


def _loss_gradients(
    checkpoint: DenseCheckpoint,
    job: ExpertJob,
    windows: torch.Tensor,
    final: TokenFile,
    gradient: TokenFile,
    batch: int,
) -> None:
    """Write the gradient of the mean next-token loss with respect to the last layer's output."""
    from upcycle.models.stock_model import dense_reader, skeleton

    model = skeleton(checkpoint.raw_config, dense_reader(checkpoint, job.recipe.dtype)(None))
    predicted = len(windows) * (windows.shape[1] - 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def rows() -> Iterator[torch.Tensor]:
        for states, ids in zip(final.blocks(batch), windows.split(batch // windows.shape[1]), strict=True):
            leaf = states.view(*ids.shape, -1).requires_grad_()
            logits = logits_of(model, checkpoint, leaf)[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / predicted
            (found,) = torch.autograd.grad(loss, leaf)
            yield found.flatten(0, 1)

    gradient.write(rows())


def _backward(
    runner: LayerRunner,
    index: int,
    states: list[TokenFile],
    gradients: list[TokenFile],
    clusterings: Sequence[_Clustering],
    batch: int,
) -> list[torch.Tensor]:
    """Return one layer's importance by each clustering, fp32 ``[C, F]``, and write the gradient of its input."""
    sums: list[torch.Tensor] = []
    window = runner.window
    with runner.loaded(index):
        layer = runner.layers[index]
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        seen: list[torch.Tensor] = []
        hook = runner.down(index).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

        def rows() -> Iterator[torch.Tensor]:
            first = 0  # token of the block
            for block, above in zip(states[index].blocks(batch), gradients[index + 1].blocks(batch), strict=True):
                count = len(block) // window
                leaf = block.view(count, window, -1).requires_grad_()
                output = runner.forward(index, leaf)
                hidden = seen.pop()
                below, slope = torch.autograd.grad(output, (leaf, hidden), above.view_as(output))
                effect = (hidden.detach() * slope).abs().double().view(count * window, -1)
                if not sums:
                    width = effect.shape[1]
                    sums.extend(torch.zeros(each.clusters, width, dtype=torch.float64) for each in clusterings)
                for each, total in zip(clusterings, sums, strict=True):
                    mine = each.labels[first // each.piece : (first + len(block)) // each.piece]
                    total.index_add_(0, mine, effect.view(len(mine), each.piece, -1).sum(1))
                first += len(block)
                yield below.reshape(-1, below.shape[-1])

        try:
            gradients[index].write(rows())
        finally:
            hook.remove()
    tokens = [each.piece * each.labels.bincount(minlength=each.clusters) for each in clusterings]
    return [(total / count.clamp(min=1)[:, None]).float() for total, count in zip(sums, tokens, strict=True)]
