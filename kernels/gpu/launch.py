"""One function per kernel: from a pass and its tensors to a grid, strides and what is compiled in. Outputs are the caller's.

T tokens, S slots, H hidden, I width of the widest expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from upcycle.kernels.gpu.gpu_pass import GpuPass
from upcycle.kernels.gpu.launch_log import launch_kernel
from upcycle.kernels.gpu.triton_code.activation_backward import activation_backward_kernel
from upcycle.kernels.gpu.triton_code.bias_gradient import bias_gradient_kernel
from upcycle.kernels.gpu.triton_code.combine import combine_kernel
from upcycle.kernels.gpu.triton_code.down_projection import gemm_kernel
from upcycle.kernels.gpu.triton_code.up_projection import up_kernel
from upcycle.kernels.gpu.triton_code.weight_gradient import xty_kernel
from upcycle.kernels.layout.expert_weights import ExpertWeights

Which: TypeAlias = Literal["up", "down"]


@dataclass(frozen=True)
class Projection:
    """One of the two matrices of every expert, as kernels address it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    hidden_last: bool
    """Whether hidden is contiguous."""
    stride: int
    """Of the other dimension of one expert."""
    rows_per_neuron: int
    """Of its dimension that is not hidden."""


def projection(weights: ExpertWeights, which: Which) -> Projection:
    """``up`` or ``down`` of the experts."""
    if which == "up":
        stride = weights.up.shape[2] if weights.transposed else weights.hidden
        return Projection(weights.up, weights.up_bias, not weights.transposed, stride, weights.rows_per_neuron)
    hidden_last = weights.packed or weights.transposed
    stride = weights.hidden if hidden_last else weights.down.shape[2]
    return Projection(weights.down, weights.down_bias, hidden_last, stride, 1)


def form_of(weights: ExpertWeights) -> str:
    """How ``z`` is ordered: as the rows of ``up``."""
    if not weights.gated:
        return "plain"
    return "interleaved" if weights.interleaved else "concatenated"


def up(run: GpuPass, h: torch.Tensor, z: torch.Tensor | None) -> None:
    """Fill ``h`` ``[S, I]`` and, if given, ``z`` ``[S, 2 I]``; see ``up_kernel``."""
    form = form_of(run.weights)
    _rows_times(run, f"up/{form}", run.x, projection(run.weights, "up"), form, run.weights.activation, h, z)


def down_backward(run: GpuPass, grad: torch.Tensor, dh: torch.Tensor) -> None:
    """Fill ``dh`` ``[S, I]``: the gradient ``[T, H]`` of every row's token times its expert's ``down``.

    It is the first projection's kernel, without an activation and without a bias.
    """
    down = projection(run.weights, "down")
    _rows_times(run, "down_backward", grad, down, "plain", "none", dh, None)


def _rows_times(
    run: GpuPass,
    family: str,
    x: torch.Tensor,
    matrix: Projection,
    form: str,
    activation: str,
    h: torch.Tensor,
    z: torch.Tensor | None,
) -> None:
    """Fill ``h`` with rows of ``x`` ``[T, H]`` times their expert's matrix; see ``up_kernel``."""
    weights, tile = run.weights, run.tile(family)
    bias = matrix.bias if family != "down_backward" else None
    columns = _tiles_of(run.widest, tile.n)
    launch_kernel(
        family,
        up_kernel,
        (run.row_tiles.count * columns,),
        tile,
        x=x,
        weight=matrix.weight,
        bias=matrix.weight if bias is None else bias,
        h=h,
        z=h if z is None else z,
        row_token=run.dispatch.row_token,
        tile_expert=run.row_tiles.expert,
        tile_row=run.row_tiles.row,
        offsets=run.dispatch.offsets,
        width_offsets=run.width_offsets,
        tiles=run.row_tiles.count,
        columns=columns,
        hidden=weights.hidden,
        stride_x=x.stride(0),
        stride_weight=matrix.stride,
        stride_h=h.stride(0),
        stride_z=0 if z is None else z.stride(0),
        FORM=form,
        HIDDEN_LAST=matrix.hidden_last,
        ACTIVATION=activation,
        BIAS=bias is not None,
        SAVE_Z=z is not None,
        ALIGNED=_even(weights, 1, 16),
        EVEN=weights.hidden % tile.k == 0,
        PRECISION=run.precision,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP=tile.group,
    )


def gemm(run: GpuPass, a: torch.Tensor, which: Which, out: torch.Tensor) -> None:
    """Fill ``out`` ``[S, H]``: rows of ``a`` times their expert's ``down`` (h to outputs) or ``up`` (dz to input gradients)."""
    weights, matrix, tile = run.weights, projection(run.weights, which), run.tile("gemm")
    bias = matrix.bias if which == "down" else None
    columns = _tiles_of(weights.hidden, tile.n)
    launch_kernel(
        "gemm",
        gemm_kernel,
        (run.row_tiles.count * columns,),
        tile,
        a=a,
        weight=matrix.weight,
        bias=out if bias is None else bias,
        out=out,
        tile_expert=run.row_tiles.expert,
        tile_row=run.row_tiles.row,
        offsets=run.dispatch.offsets,
        width_offsets=run.width_offsets,
        tiles=run.row_tiles.count,
        columns=columns,
        hidden=weights.hidden,
        factor=matrix.rows_per_neuron,
        stride_a=a.stride(0),
        stride_weight=matrix.stride,
        stride_out=out.stride(0),
        HIDDEN_LAST=matrix.hidden_last,
        BIAS=bias is not None,
        EVEN=_even(weights, matrix.rows_per_neuron, tile.k),
        PRECISION=run.precision,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP=tile.group,
    )


def combine(run: GpuPass, values: torch.Tensor, weighted: bool, out: torch.Tensor) -> None:
    """Fill ``out`` ``[T, H]``: every token's sum over its rows of ``values`` ``[S, H]``; see ``combine_kernel``.

    ``weighted``: by the pass' scores, if it has some.
    """
    dispatch, tile = run.dispatch, run.tile("combine")
    scores = run.scores if weighted else None
    launch_kernel(
        "combine",
        combine_kernel,
        (_tiles_of(dispatch.tokens, tile.m), _tiles_of(out.shape[1], tile.n)),
        tile,
        values=values,
        scores=values if scores is None else scores,
        out=out,
        slot_row=dispatch.slot_row,
        token_offsets=dispatch.slot_row if dispatch.token_offsets is None else dispatch.token_offsets,
        tokens=dispatch.tokens,
        hidden=out.shape[1],
        top_k=dispatch.top_k or 0,
        stride_values=values.stride(0),
        stride_out=out.stride(0),
        FIXED=dispatch.token_offsets is None,
        WEIGHTED=scores is not None,
        BLOCK_T=tile.m,
        BLOCK_N=tile.n,
    )


def activation_backward(
    run: GpuPass, grad: torch.Tensor, h: torch.Tensor, z: torch.Tensor, dz: torch.Tensor
) -> torch.Tensor | None:
    """Fill ``dz`` ``[S, 2 I]`` and turn ``h`` from ``down_backward``'s result into ``s * h``.

    Returns:
        The scores' gradient ``[S]``, if there are scores.
    """
    weights, scores, tile = run.weights, run.scores, run.tile("combine")
    found = None if scores is None else torch.zeros_like(scores)
    rows = min(tile.m, run.row_tiles.block)  # more would reach into the expert's next tile
    launch_kernel(
        "combine",
        activation_backward_kernel,
        (run.row_tiles.count * _tiles_of(run.row_tiles.block, rows),),
        tile,
        grad=grad,
        bias=weights.down if weights.down_bias is None else weights.down_bias,
        h=h,
        z=z,
        dz=dz,
        scores=h if scores is None else scores,
        dscores=h if found is None else found,
        row_token=run.dispatch.row_token,
        row_slot=run.dispatch.row_slot,
        tile_expert=run.row_tiles.expert,
        tile_row=run.row_tiles.row,
        offsets=run.dispatch.offsets,
        width_offsets=run.width_offsets,
        hidden=weights.hidden,
        stride_grad=grad.stride(0),
        stride_h=h.stride(0),
        stride_z=z.stride(0),
        FORM=form_of(weights),
        ACTIVATION=weights.activation,
        WEIGHTED=scores is not None,
        BIAS=weights.down_bias is not None,
        ALIGNED=_even(weights, 1, 16),
        ROWS=run.row_tiles.block,
        BLOCK_M=rows,
        BLOCK_N=tile.n,
    )
    return found


def weight_gradient(
    run: GpuPass, a: torch.Tensor, b: torch.Tensor, which: Which, out: torch.Tensor, accumulate: bool
) -> None:
    """Fill ``out``, like ``up`` or ``down``, with a^T b per expert, or add that to it.

    Args:
        run: the pass.
        a: ``[S, ...]``, in rows.
        b: ``[T, H]``, in tokens.
        which: the matrix whose gradient it is.
        out: contiguous.
        accumulate: add.
    """
    weights, matrix, tile = run.weights, projection(run.weights, which), run.tile("weight_gradient")
    columns = _tiles_of(weights.hidden, tile.n)
    launch_kernel(
        "weight_gradient",
        xty_kernel,
        (columns * _tiles_of(run.widest * matrix.rows_per_neuron, tile.m), weights.num_experts),
        tile,
        a=a,
        b=b,
        out=out,
        row_token=run.dispatch.row_token,
        offsets=run.dispatch.offsets,
        width_offsets=run.width_offsets,
        columns=columns,
        hidden=weights.hidden,
        factor=matrix.rows_per_neuron,
        stride_a=a.stride(0),
        stride_b=b.stride(0),
        stride_out=matrix.stride,
        HIDDEN_LAST=matrix.hidden_last,
        GATHER=True,
        ACCUMULATE=accumulate,
        ALIGNED=_even(weights, 1, 16),
        PRECISION=run.precision,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
    )


def bias_gradient(run: GpuPass, values: torch.Tensor, which: Which, out: torch.Tensor) -> None:
    """Fill ``out``: like ``up_bias`` from dz in rows, or like ``down_bias`` from the output's gradient in tokens."""
    weights, tile, of_down = run.weights, run.tile("combine"), which == "down"
    scores = run.scores if of_down else None
    launch_kernel(
        "combine",
        bias_gradient_kernel,
        (
            _tiles_of(weights.hidden if of_down else weights.rows_per_neuron * run.widest, tile.n),
            weights.num_experts,
        ),
        tile,
        values=values,
        scores=values if scores is None else scores,
        out=out,
        row_token=run.dispatch.row_token,
        row_slot=run.dispatch.row_slot,
        offsets=run.dispatch.offsets,
        width_offsets=run.width_offsets,
        hidden=weights.hidden,
        factor=weights.rows_per_neuron,
        stride_values=values.stride(0),
        OF_DOWN=of_down,
        WEIGHTED=scores is not None,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
    )


def _even(weights: ExpertWeights, factor: int, block: int) -> bool:
    """Whether ``factor`` times every expert's width is a multiple of ``block``."""
    return all(width * factor % block == 0 for width in set(weights.all_widths))


def _tiles_of(size: int, block: int) -> int:
    """How many tiles of ``block`` cover ``size``."""
    return -(-size // block)
