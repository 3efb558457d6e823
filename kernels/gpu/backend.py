"""The backend for GPUs: a layer of experts on Triton kernels. T tokens, S slots, H hidden, I width.

Forward: gather, first projection and activation (:mod:`up_projection`), down projection (:mod:`down_projection`), sum per token
(:mod:`combine`). Of activations, the backward pass needs the input and ``z``, or only the input. Nothing waits for the device.
Nothing uses atomics: the same input gives the same bits every time, for the same table of tiles and kind of GPU.

Times on a GPU are in ``docs/measured/kernels_gpu.md``; what is verified without one is in ``docs/measured/kernels_static.md``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.kernels.gpu import launch
from upcycle.kernels.gpu.gpu_pass import GpuPass
from upcycle.kernels.gpu.launch_log import kind_for
from upcycle.kernels.gpu.row_tiles import row_tiles
from upcycle.kernels.gpu.tile_table import TileTable, default_table
from upcycle.kernels.layout.devices import why_not
from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients

GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(
    x: torch.Tensor,
    weights: ExpertWeights,
    dispatch: Dispatch,
    scores: torch.Tensor | None,
    keep: bool,
    table: TileTable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(output [T, H] like x, z)``; z has S rows of the widest expert's ``2 I`` (flat), and is empty without ``keep``.

    Args:
        x: ``[T, H]`` bf16, fp16 or fp32.
        weights: of the dtype and device of ``x``, in any layout; a layout whose last two dimensions are not contiguous is
            copied.
        dispatch: of the tokens.
        scores: fp32 ``[S]`` in the slots' order; ``None``: all 1.
        keep: whether z is wanted.
        table: tiles; ``None``: the committed ones.

    Raises:
        UsageError: shapes, dtypes or devices do not fit together.
        EnvironmentFault: the device cannot run Triton kernels.
    """
    run = _pass_of(x, weights, dispatch, scores, table)
    with torch.cuda.device_of(x):
        h, z = run.hidden_rows(), run.z_rows() if keep else None
        launch.up(run, h, z)
        values = run.rows(weights.hidden)
        launch.gemm(run, h, "down", values)
        output = _combined(run, values, weighted=True)
        return output, h.new_empty(0) if z is None else z.view(-1)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: ExpertWeights,
    dispatch: Dispatch,
    scores: torch.Tensor | None,
    z: torch.Tensor,
    needs: Gradients,
    into: Gradients | None = None,
    table: TileTable | None = None,
) -> Gradients:
    """Gradients of everything that is not ``None`` in ``needs``.

    Args:
        grad: ``[T, H]``, of the output.
        x: what :func:`forward` was given.
        weights: what it was given.
        dispatch: what it was given.
        scores: what it was given.
        z: what :func:`forward` kept; empty: it is computed again.
        needs: what is wanted; values are not read.
        into: contiguous tensors like ``up`` and ``down``, in their dtype or fp32. The gradients are added to them, and they
            are returned.
        table: tiles; ``None``: the committed ones.

    Raises:
        UsageError: as :func:`forward`, or ``grad`` or ``into`` does not fit.
        EnvironmentFault: as :func:`forward`.
    """
    run = _pass_of(x, weights, dispatch, scores, table)
    if grad.shape != x.shape or grad.dtype != x.dtype or grad.device != x.device:
        raise UsageError(f"the gradient is {_kind(grad)}, the output {_kind(x)}")
    with torch.cuda.device_of(x):
        return _gradients(run, _rows_contiguous(grad), z, needs, into)


def _gradients(
    run: GpuPass, grad: torch.Tensor, z: torch.Tensor, needs: Gradients, into: Gradients | None
) -> Gradients:
    scaled_h = run.hidden_rows()
    if z.numel():
        z = z.view(run.dispatch.slots, -1)
        dz = torch.empty_like(z)
    else:
        z = dz = run.z_rows()  # what is read of it is read before it is overwritten
        launch.up(run, scaled_h, z)
    launch.down_backward(run, grad, scaled_h)
    of_scores = launch.activation_backward(run, grad, scaled_h, z, dz)
    found = Gradients(scores=None if needs.scores is None else of_scores)
    if needs.down is not None:
        found = found._replace(down=_weight_gradient(run, scaled_h, grad, "down", into))
    if needs.up is not None:
        found = found._replace(up=_weight_gradient(run, dz, run.x, "up", into))
    if needs.up_bias is not None:
        found = found._replace(up_bias=_bias_gradient(run, dz, "up"))
    if needs.down_bias is not None:
        found = found._replace(down_bias=_bias_gradient(run, grad, "down"))
    if needs.x is not None:
        expanded = run.rows(run.weights.hidden)
        launch.gemm(run, dz, "up", expanded)
        found = found._replace(x=_combined(run, expanded, weighted=False))
    return found


def _pass_of(
    x: torch.Tensor,
    weights: ExpertWeights,
    dispatch: Dispatch,
    scores: torch.Tensor | None,
    table: TileTable | None,
) -> GpuPass:
    """The checked input of a pass, in the form kernels read."""
    _check(x, weights, dispatch, scores)
    table = table or default_table()
    kind = kind_for(x.device)
    rows = -(-dispatch.slots // dispatch.num_experts)
    return GpuPass(
        _rows_contiguous(x),
        _contiguous(weights),
        dispatch,
        None if scores is None else scores.contiguous(),
        _on_device(weights.starts, x.device),
        row_tiles(dispatch, table.find(kind, x.element_size(), "gemm", rows).m),
        table,
        kind,
        "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
    )


def _combined(run: GpuPass, values: torch.Tensor, weighted: bool) -> torch.Tensor:
    """``[T, H]``: every token's sum over its rows of ``values`` ``[S, H]``."""
    out = run.x.new_empty(run.dispatch.tokens, run.weights.hidden)
    launch.combine(run, values, weighted, out)
    return out


def _weight_gradient(
    run: GpuPass, a: torch.Tensor, b: torch.Tensor, which: launch.Which, into: Gradients | None
) -> torch.Tensor:
    like = run.weights.up if which == "up" else run.weights.down
    given = None if into is None else (into.up if which == "up" else into.down)
    if given is not None and (given.shape != like.shape or not given.is_contiguous() or given.device != like.device):
        raise UsageError(f"gradients of {which} cannot be added to {_kind(given)}, strides {given.stride()}")
    out = torch.empty_like(like, memory_format=torch.contiguous_format) if given is None else given
    launch.weight_gradient(run, a, b, which, out, accumulate=given is not None)
    return out


def _bias_gradient(run: GpuPass, values: torch.Tensor, which: launch.Which) -> torch.Tensor:
    like = run.weights.up_bias if which == "up" else run.weights.down_bias
    assert like is not None
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    launch.bias_gradient(run, values, which, out)
    return out


@lru_cache(maxsize=256)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 numbers on a device, copied once: every copy from the host waits for the device."""
    return torch.tensor(numbers, device=device)


def _check(x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch, scores: torch.Tensor | None) -> None:
    reason = why_not(x.device)
    if reason:
        raise EnvironmentFault(reason, hint="UPCYCLE_KERNELS=cpu or reference runs the experts without Triton")
    if x.dtype not in GPU_DTYPES:
        raise UsageError(f"x is {x.dtype}; Triton kernels compute bfloat16, float16 and float32")
    if x.ndim != 2 or x.shape != (dispatch.tokens, weights.hidden):
        raise UsageError(f"x has the shape {tuple(x.shape)}, not {(dispatch.tokens, weights.hidden)}")
    if weights.up.dtype != x.dtype or weights.up.device != x.device:
        raise UsageError(f"x is {x.dtype} on {x.device}, the experts are {weights.up.dtype} on {weights.up.device}")
    if dispatch.num_experts != weights.num_experts:
        raise UsageError(f"routing is to {dispatch.num_experts} experts, and there are {weights.num_experts}")
    if dispatch.offsets.device != x.device:
        raise UsageError(f"x is on {x.device}, its routing on {dispatch.offsets.device}")
    if scores is not None and (
        scores.shape != (dispatch.slots,) or scores.dtype != torch.float32 or scores.device != x.device
    ):
        raise UsageError(
            f"router weights are {_kind(scores)}, not float32 {[dispatch.slots]} on {x.device}",
            hint="flatten them, and keep them in float32: weights.float().flatten()",
        )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the elements of every row side by side; rows may lie apart, as in a slice."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _contiguous(weights: ExpertWeights) -> ExpertWeights:
    tensors = {
        name: tensor
        for name in ("up", "down", "up_bias", "down_bias")
        if (tensor := getattr(weights, name)) is not None and not tensor.is_contiguous()
    }
    return replace(weights, **{name: tensor.contiguous() for name, tensor in tensors.items()}) if tensors else weights
