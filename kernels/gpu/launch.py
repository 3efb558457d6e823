"""One function per kernel: its grid, its strides and what is compiled in, from tensors. Outputs are the caller's."""

from __future__ import annotations

import torch

from upcycle.kernels.gpu.launch_log import launch
from upcycle.kernels.gpu.row_tiles import RowTiles
from upcycle.kernels.gpu.tile_table import Tile
from upcycle.kernels.gpu.triton_code.activation_backward import activation_backward_kernel
from upcycle.kernels.gpu.triton_code.bias_gradient import bias_gradient_kernel
from upcycle.kernels.gpu.triton_code.combine import combine_kernel
from upcycle.kernels.gpu.triton_code.down_projection import gemm_kernel
from upcycle.kernels.gpu.triton_code.up_projection import up_kernel
from upcycle.kernels.gpu.triton_code.weight_gradient import xty_kernel
from upcycle.kernels.layout.expert_weights import ExpertWeights
from upcycle.kernels.layout.routing import Routing


def form_of(weights: ExpertWeights) -> str:
    """How ``z`` is ordered: as the rows of ``up``."""
    if not weights.gated:
        return "plain"
    return "interleaved" if weights.interleaved else "concatenated"


def _strides(weights: ExpertWeights) -> tuple[tuple[bool, int], tuple[bool, int]]:
    """Of ``up`` and ``down``: whether hidden is contiguous, and the stride of the other dimension of one expert."""
    up = (not weights.transposed, weights.hidden if not weights.transposed else weights.up.shape[2])
    hidden_last = weights.packed or weights.transposed
    return up, (hidden_last, weights.hidden if hidden_last else weights.down.shape[2])


def _even(weights: ExpertWeights, factor: int, block: int) -> bool:
    return all(width * factor % block == 0 for width in set(weights.all_widths))


def _columns(size: int, block: int) -> int:
    return -(-size // block)


def up(
    x: torch.Tensor,
    weights: ExpertWeights,
    width_offsets: torch.Tensor,
    routing: Routing,
    tiles: RowTiles,
    tile: Tile,
    h: torch.Tensor,
    z: torch.Tensor | None,
    precision: str,
) -> None:
    """Fill ``h`` ``[S, I]`` and, if given, ``z`` ``[S, 2 I]`` (I of the widest expert); see ``up_kernel``."""
    bias, form = weights.up_bias, form_of(weights)
    shared = weights, width_offsets, routing, tiles, tile
    _rows_times(f"up/{form}", x, weights.up, bias, "up", form, weights.activation, *shared, h, z, precision)


def _rows_times(
    family: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    which: str,
    form: str,
    activation: str,
    weights: ExpertWeights,
    width_offsets: torch.Tensor,
    routing: Routing,
    tiles: RowTiles,
    tile: Tile,
    h: torch.Tensor,
    z: torch.Tensor | None,
    precision: str,
) -> None:
    """Rows of ``x`` ``[T, H]`` times their expert's ``weight``, which is ``up`` or ``down``; see ``up_kernel``."""
    hidden_last, stride = _strides(weights)[0 if which == "up" else 1]
    columns = _columns(max(weights.all_widths), tile.n)
    launch(
        family,
        up_kernel,
        (tiles.count * columns,),
        tile,
        x=x,
        weight=weight,
        bias=weight if bias is None else bias,
        h=h,
        z=h if z is None else z,
        row_token=routing.row_token,
        tile_expert=tiles.expert,
        tile_row=tiles.row,
        offsets=routing.offsets,
        width_offsets=width_offsets,
        tiles=tiles.count,
        columns=columns,
        hidden=weights.hidden,
        stride_x=x.stride(0),
        stride_weight=stride,
        stride_h=h.stride(0),
        stride_z=0 if z is None else z.stride(0),
        FORM=form,
        HIDDEN_LAST=hidden_last,
        ACTIVATION=activation,
        BIAS=bias is not None,
        SAVE_Z=z is not None,
        ALIGNED=_even(weights, 1, 16),
        EVEN=weights.hidden % tile.k == 0,
        PRECISION=precision,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP=tile.group,
    )


def gemm(
    a: torch.Tensor,
    weights: ExpertWeights,
    which: str,
    width_offsets: torch.Tensor,
    routing: Routing,
    tiles: RowTiles,
    tile: Tile,
    out: torch.Tensor,
    precision: str,
) -> None:
    """``out`` ``[S, H]`` = rows of ``a`` times their expert's ``down`` (h to outputs) or ``up`` (dz to input gradients)."""
    hidden_last, stride = _strides(weights)[0 if which == "up" else 1]
    factor = weights.rows_per_neuron if which == "up" else 1
    bias = weights.down_bias if which == "down" else None
    columns = _columns(weights.hidden, tile.n)
    launch(
        "gemm",
        gemm_kernel,
        (tiles.count * columns,),
        tile,
        a=a,
        weight=weights.up if which == "up" else weights.down,
        bias=out if bias is None else bias,
        out=out,
        tile_expert=tiles.expert,
        tile_row=tiles.row,
        offsets=routing.offsets,
        width_offsets=width_offsets,
        tiles=tiles.count,
        columns=columns,
        hidden=weights.hidden,
        factor=factor,
        stride_a=a.stride(0),
        stride_weight=stride,
        stride_out=out.stride(0),
        HIDDEN_LAST=hidden_last,
        BIAS=bias is not None,
        EVEN=_even(weights, factor, tile.k),
        PRECISION=precision,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP=tile.group,
    )


def combine(values: torch.Tensor, scores: torch.Tensor | None, routing: Routing, tile: Tile, out: torch.Tensor) -> None:
    """``out`` ``[T, H]``: every token's sum over its rows of ``values`` ``[S, H]``; see ``combine_kernel``."""
    fixed = routing.token_offsets is None
    launch(
        "combine",
        combine_kernel,
        (_columns(routing.tokens, tile.m), _columns(out.shape[1], tile.n)),
        tile,
        values=values,
        scores=values if scores is None else scores,
        out=out,
        slot_row=routing.slot_row,
        token_offsets=routing.slot_row if routing.token_offsets is None else routing.token_offsets,
        tokens=routing.tokens,
        hidden=out.shape[1],
        top_k=routing.top_k or 0,
        stride_values=values.stride(0),
        stride_out=out.stride(0),
        FIXED=fixed,
        WEIGHTED=scores is not None,
        BLOCK_T=tile.m,
        BLOCK_N=tile.n,
    )


def down_backward(
    grad: torch.Tensor,
    weights: ExpertWeights,
    width_offsets: torch.Tensor,
    routing: Routing,
    tiles: RowTiles,
    tile: Tile,
    out: torch.Tensor,
    precision: str,
) -> None:
    """``out`` ``[S, I]`` = the gradient ``[T, H]`` of every row's token times its expert's ``down``: the first projection's kernel."""
    shared = weights, width_offsets, routing, tiles, tile
    _rows_times("down_backward", grad, weights.down, None, "down", "plain", "none", *shared, out, None, precision)


def activation_backward(
    grad: torch.Tensor,
    weights: ExpertWeights,
    width_offsets: torch.Tensor,
    routing: Routing,
    scores: torch.Tensor | None,
    tiles: RowTiles,
    tile: Tile,
    h: torch.Tensor,
    z: torch.Tensor,
    dz: torch.Tensor,
) -> torch.Tensor | None:
    """Fill ``dz`` ``[S, 2 I]``, turn ``h`` from ``down_backward``'s result into ``s * h``; returns ds ``[S]``, if there are scores."""
    found = None if scores is None else torch.zeros_like(scores)
    rows = min(tile.m, tiles.block)  # more would reach into the expert's next tile
    launch(
        "combine",
        activation_backward_kernel,
        (tiles.count * _columns(tiles.block, rows),),
        tile,
        grad=grad,
        bias=weights.down if weights.down_bias is None else weights.down_bias,
        h=h,
        z=z,
        dz=dz,
        scores=h if scores is None else scores,
        dscores=h if found is None else found,
        row_token=routing.row_token,
        row_slot=routing.row_slot,
        tile_expert=tiles.expert,
        tile_row=tiles.row,
        offsets=routing.offsets,
        width_offsets=width_offsets,
        hidden=weights.hidden,
        stride_grad=grad.stride(0),
        stride_h=h.stride(0),
        stride_z=z.stride(0),
        FORM=form_of(weights),
        ACTIVATION=weights.activation,
        WEIGHTED=scores is not None,
        BIAS=weights.down_bias is not None,
        ALIGNED=_even(weights, 1, 16),
        ROWS=tiles.block,
        BLOCK_M=rows,
        BLOCK_N=tile.n,
    )
    return found


def weight_gradient(
    a: torch.Tensor,
    b: torch.Tensor,
    weights: ExpertWeights,
    which: str,
    width_offsets: torch.Tensor,
    routing: Routing,
    tile: Tile,
    out: torch.Tensor,
    accumulate: bool,
    precision: str,
) -> None:
    """``out`` like ``up`` or ``down`` = a^T b per expert; ``a`` ``[S, ...]`` in rows, ``b`` ``[T, H]`` in tokens."""
    hidden_last, stride = _strides(weights)[0 if which == "up" else 1]
    factor = weights.rows_per_neuron if which == "up" else 1
    columns = _columns(weights.hidden, tile.n)
    launch(
        "weight_gradient",
        xty_kernel,
        (columns * _columns(max(weights.all_widths) * factor, tile.m), weights.num_experts),
        tile,
        a=a,
        b=b,
        out=out,
        row_token=routing.row_token,
        offsets=routing.offsets,
        width_offsets=width_offsets,
        columns=columns,
        hidden=weights.hidden,
        factor=factor,
        stride_a=a.stride(0),
        stride_b=b.stride(0),
        stride_out=stride,
        HIDDEN_LAST=hidden_last,
        GATHER=True,
        ACCUMULATE=accumulate,
        ALIGNED=_even(weights, 1, 16),
        PRECISION=precision,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
    )


def bias_gradient(
    values: torch.Tensor,
    weights: ExpertWeights,
    which: str,
    width_offsets: torch.Tensor,
    routing: Routing,
    scores: torch.Tensor | None,
    tile: Tile,
    out: torch.Tensor,
) -> None:
    """``out`` like ``up_bias`` from dz in rows, or like ``down_bias`` from the output's gradient in tokens."""
    of_down = which == "down"
    size = weights.hidden if of_down else weights.rows_per_neuron * max(weights.all_widths)
    launch(
        "combine",
        bias_gradient_kernel,
        (_columns(size, tile.n), weights.num_experts),
        tile,
        values=values,
        scores=values if scores is None or not of_down else scores,
        out=out,
        row_token=routing.row_token,
        row_slot=routing.row_slot,
        offsets=routing.offsets,
        width_offsets=width_offsets,
        hidden=weights.hidden,
        factor=weights.rows_per_neuron,
        stride_values=values.stride(0),
        OF_DOWN=of_down,
        WEIGHTED=of_down and scores is not None,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
    )
