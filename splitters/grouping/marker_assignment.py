"""CMoE's balanced clustering of neurons by the tokens that they fire for (arXiv 2502.04416, section 3.2).

A neuron's marker column says for which tokens it is among the most active; seeds are the columns of the neurons that fire
most often. CMoE repeats every cluster once per place and solves a linear assignment of F x F. Columns are nearly empty,
so here they stay sparse, and the F x E distances go to :func:`balanced_assignment`, which finds the same optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from upcycle.errors import UsageError
from upcycle.splitters.grouping.balanced_assignment import balanced_assignment


@dataclass(frozen=True)
class MarkerClusters:
    """A clustering of M neurons into E clusters.

    Attributes:
        labels: int64 ``[M]``.
        representatives: int64 ``[E]``, the neuron nearest to each cluster's mean column.
        cost: the sum of the L1 distances from the columns to what they were last assigned to: the seeds' columns, or with more
            iterations the means of the clusters before.
    """

    labels: torch.Tensor
    representatives: torch.Tensor
    cost: float


def marker_assignment(
    markers: torch.Tensor, neurons: torch.Tensor, experts: int, *, intermediate_size: int, iterations: int = 1
) -> MarkerClusters:
    """Cluster ``neurons`` into ``experts`` whose sizes differ by at most one, by the tokens that mark them.

    Nothing is random; ties go to the neuron that stands first in ``neurons``.

    Args:
        markers: integers ``[T, K_a]``, the neurons that each token marks; those that are not in ``neurons`` do not count.
        neurons: int64 ``[M]``, the distinct neurons to cluster.
        experts: ``1 <= experts <= M``.
        intermediate_size: F; all neurons are in ``0..F-1``.
        iterations: how many assignments; each after the first is to the clusters' means (CMoE makes one).

    Raises:
        UsageError: a neuron that does not exist or is there twice, or a number out of range.
    """
    _check(markers, neurons, experts, intermediate_size, iterations)
    columns = _columns(markers, neurons, intermediate_size)
    rates = columns.sum(axis=1)
    seeds = np.argsort(-rates, kind="stable")[:experts]
    sums, sizes = columns[seeds], np.ones(experts, dtype=np.float32)
    prices: torch.Tensor | None = None
    for _ in range(iterations):
        distances = _distances(columns, sums, sizes)
        labels, prices = balanced_assignment(torch.from_numpy(distances), prices=prices)
        cost = float(np.take_along_axis(distances, labels.numpy()[:, None], axis=1).sum(dtype=np.float64))
        members = sparse.csr_array((np.ones(len(labels), dtype=np.float32), (labels.numpy(), np.arange(len(labels)))))
        sums, sizes = members @ columns, members.sum(axis=1)
    own = np.take_along_axis(_distances(columns, sums, sizes), labels.numpy()[:, None], axis=1)[:, 0]
    nearest_first = np.lexsort((own, labels.numpy()))
    firsts = nearest_first[np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int64)]
    return MarkerClusters(labels, neurons.cpu()[torch.from_numpy(firsts)].long(), cost)


def _check(markers: torch.Tensor, neurons: torch.Tensor, experts: int, size: int, iterations: int) -> None:
    if markers.ndim != 2 or neurons.ndim != 1:
        shapes = f"{list(markers.shape)} and {list(neurons.shape)}"
        raise UsageError(f"markers are [tokens, marks] and neurons [neurons], not {shapes}")
    for what, numbers in (("markers", markers), ("neurons", neurons)):
        if numbers.is_floating_point() or (numbers.numel() and not 0 <= numbers.min() <= numbers.max() < size):
            raise UsageError(f"{what} must be integers from 0 to {size - 1}, the neurons of the layer")
    if len(neurons.unique()) != len(neurons):
        raise UsageError("neurons to cluster must be distinct")
    if not 1 <= experts <= len(neurons):
        raise UsageError(f"{len(neurons)} neurons cannot form {experts} experts: give 1 to {len(neurons)} experts")
    if iterations < 1:
        raise UsageError(f"iterations must be at least 1, not {iterations}")


def _columns(markers: torch.Tensor, neurons: torch.Tensor, intermediate_size: int) -> sparse.csr_array:
    """Return sparse ``[M, T]``: 1 where a token marks a neuron."""
    tokens, marks = markers.shape
    row = np.full(intermediate_size, -1, dtype=np.int32)
    row[neurons.cpu().numpy()] = np.arange(len(neurons), dtype=np.int32)
    marked = row[markers.cpu().numpy().reshape(-1)]
    known = marked >= 0
    token = np.repeat(np.arange(tokens, dtype=np.int32), marks)[known]
    columns = sparse.csr_array(
        (np.ones(len(token), dtype=np.float32), (marked[known], token)), shape=(len(neurons), tokens)
    )
    columns.sum_duplicates()
    columns.data[:] = 1  # a token that names a neuron twice marks it once
    return columns


def _distances(columns: sparse.csr_array, sums: sparse.csr_array, sizes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return L1 distances ``[M, E]`` to the means ``sums / sizes`` (sparse ``[E, T]``).

    A mean ``c`` of marks lies in 0..1, so that ``|a - c|`` is ``a + c - 2 a c`` for a mark ``a`` of 0 or 1: only where both
    are above zero must anything be multiplied. Sums of marks are whole numbers, in fp32 exact up to 2^24 tokens.
    """
    distances: NDArray[np.float32] = (columns @ sums.T).toarray()
    distances *= -2
    distances += sums.sum(axis=1)
    distances /= sizes
    distances += columns.sum(axis=1)[:, None]
    return distances
