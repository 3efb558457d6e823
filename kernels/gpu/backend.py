"""A layer of experts on Triton kernels: the backend for GPUs. T tokens, S slots, H hidden, I width.

Forward: gather, first projection and activation (:mod:`up_projection`), down projection (:mod:`down_projection`), sum per token
(:mod:`combine`). Backward keeps the input and ``z`` only, or only the input. Nothing waits for the device, nothing uses
atomics: for the same shapes, table of tiles and kind of GPU, the same bits every time.

Times on a GPU are in ``docs/measured/kernels_gpu.md``; what is verified without one is in ``docs/measured/kernels_static.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.kernels.gpu import launch
from upcycle.kernels.gpu.launch_log import kind_for
from upcycle.kernels.gpu.row_tiles import RowTiles, row_tiles
from upcycle.kernels.gpu.tile_table import ROWS_OF_THEIR_OWN, VARIABLE, Tile, TileTable, default_table
from upcycle.kernels.layout.devices import why_not
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients
from upcycle.kernels.layout.routing import Routing

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(
    x: torch.Tensor,
    weights: ExpertWeights,
    routing: Routing,
    scores: torch.Tensor | None,
    keep: bool,
    table: TileTable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(output [T, H] like x, z)``; z has S rows of the widest expert's ``2 I`` (flat), and is empty without ``keep``.

    Args:
        x: ``[T, H]`` bf16, fp16 or fp32.
        weights: of the dtype and device of ``x``, in any layout; a layout whose last two dimensions are not contiguous is
            copied.
        routing: of the tokens.
        scores: fp32 ``[S]`` in the slots' order; ``None``: all 1.
        keep: whether z is wanted.
        table: tiles; ``None``: the committed ones.

    Raises:
        UsageError: shapes, dtypes or devices do not fit together.
        EnvironmentFault: the device cannot run Triton kernels.
    """
    run = _Run.of(x, weights, routing, scores, table)
    with torch.cuda.device_of(x):
        h, z = run.hidden_rows(), run.z_rows() if keep else None
        run.up(h, z)
        values = run.rows_like_x()
        run.gemm(h, "down", values)
        output = run.combine(values, run.scores)
        return output, h.new_empty(0) if z is None else z.view(-1)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: ExpertWeights,
    routing: Routing,
    scores: torch.Tensor | None,
    z: torch.Tensor,
    needs: Gradients,
    into: Gradients | None = None,
    table: TileTable | None = None,
) -> Gradients:
    """Gradients of everything that is not ``None`` in ``needs``.

    Args:
        grad: ``[T, H]``, of the output.
        x: as in :func:`forward`, like the next three.
        weights: the same.
        routing: the same.
        scores: the same.
        z: what :func:`forward` kept; empty: it is computed again.
        needs: what is wanted; values are not read.
        into: contiguous tensors like ``up`` and ``down`` (fp32 ones too) that those gradients are added to and which are
            then returned.
        table: tiles; ``None``: the committed ones.

    Raises:
        UsageError: as :func:`forward`, or ``grad`` or ``into`` does not fit.
        EnvironmentFault: as :func:`forward`.
    """
    run = _Run.of(x, weights, routing, scores, table)
    if grad.shape != x.shape or grad.dtype != x.dtype or grad.device != x.device:
        raise UsageError(f"the gradient is {_kind(grad)}, the output {_kind(x)}")
    with torch.cuda.device_of(x):
        return _gradients(run, _rows_contiguous(grad), z, needs, into)


def _gradients(run: _Run, grad: torch.Tensor, z: torch.Tensor, needs: Gradients, into: Gradients | None) -> Gradients:
    scaled_h = run.hidden_rows()
    if z.numel():
        z = z.view(run.routing.slots, run.z_width)
        dz = torch.empty_like(z)
    else:
        z = dz = run.z_rows()  # what is read of it is read before it is overwritten
        run.up(scaled_h, z)
    of_scores = run.down_backward(grad, z, dz, scaled_h)
    found = Gradients(scores=None if needs.scores is None else of_scores)
    if needs.down is not None:
        found = found._replace(down=run.weight_gradient(scaled_h, grad, "down", into))
    if needs.up is not None:
        found = found._replace(up=run.weight_gradient(dz, run.x, "up", into))
    if needs.up_bias is not None:
        found = found._replace(up_bias=run.bias_gradient(dz, "up"))
    if needs.down_bias is not None:
        found = found._replace(down_bias=run.bias_gradient(grad, "down"))
    if needs.x is not None:
        expanded = run.rows_like_x()
        run.gemm(dz, "up", expanded)
        found = found._replace(x=run.combine(expanded, None))
    return found


@dataclass
class _Run:
    """What the kernels of one pass share."""

    x: torch.Tensor
    weights: ExpertWeights
    routing: Routing
    scores: torch.Tensor | None
    width_offsets: torch.Tensor
    tiles: RowTiles
    table: TileTable
    kind: str
    precision: str

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weights: ExpertWeights,
        routing: Routing,
        scores: torch.Tensor | None,
        table: TileTable | None,
    ) -> _Run:
        _check(x, weights, routing, scores)
        table = table or default_table()
        kind = kind_for(x.device)
        rows = -(-routing.slots // routing.num_experts)
        tiles = row_tiles(routing, table.find(kind, x.element_size(), "gemm", rows).m)
        # Three TF32 products have nearly the precision of fp32, and use tensor cores.
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        scores = None if scores is None else scores.contiguous()
        return cls(
            _rows_contiguous(x),
            _contiguous(weights),
            routing,
            scores,
            _on_device(weights.starts, x.device),
            tiles,
            table,
            kind,
            precision,
        )

    @property
    def widest(self) -> int:
        return max(self.weights.all_widths)

    @property
    def z_width(self) -> int:
        return self.weights.rows_per_neuron * self.widest

    def tile(self, family: str) -> Tile:
        rows = -(-self.routing.slots // self.routing.num_experts)
        tile = self.table.find(self.kind, self.x.element_size(), family, rows)
        if family not in ROWS_OF_THEIR_OWN and tile.m != self.tiles.block:
            raise UsageError(
                f"the table's tile of {family} has {tile.m} rows, the list of row tiles {self.tiles.block}",
                hint=f"every family needs the same buckets; unset {VARIABLE}, or tune again: upcycle tune-kernels",
            )
        return tile

    def hidden_rows(self) -> torch.Tensor:
        return self.x.new_empty(self.routing.slots, self.widest)

    def z_rows(self) -> torch.Tensor:
        return self.x.new_empty(self.routing.slots, self.z_width)

    def rows_like_x(self) -> torch.Tensor:
        return self.x.new_empty(self.routing.slots, self.weights.hidden)

    def up(self, h: torch.Tensor, z: torch.Tensor | None) -> None:
        tile = self.tile(f"up/{launch.form_of(self.weights)}")
        launch.up(self.x, self.weights, self.width_offsets, self.routing, self.tiles, tile, h, z, self.precision)

    def gemm(self, a: torch.Tensor, which: str, out: torch.Tensor) -> None:
        tile = self.tile("gemm")
        launch.gemm(a, self.weights, which, self.width_offsets, self.routing, self.tiles, tile, out, self.precision)

    def down_backward(
        self, grad: torch.Tensor, z: torch.Tensor, dz: torch.Tensor, scaled_h: torch.Tensor
    ) -> torch.Tensor | None:
        weights, starts, routing, tiles = self.weights, self.width_offsets, self.routing, self.tiles
        tile = self.tile("down_backward")
        launch.down_backward(grad, weights, starts, routing, tiles, tile, scaled_h, self.precision)
        tile = self.tile("combine")
        return launch.activation_backward(grad, weights, starts, routing, self.scores, tiles, tile, scaled_h, z, dz)

    def combine(self, values: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        out = self.x.new_empty(self.routing.tokens, self.weights.hidden)
        launch.combine(values, scores, self.routing, self.tile("combine"), out)
        return out

    def weight_gradient(self, a: torch.Tensor, b: torch.Tensor, which: str, into: Gradients | None) -> torch.Tensor:
        like = self.weights.up if which == "up" else self.weights.down
        given = None if into is None else (into.up if which == "up" else into.down)
        if given is not None and (
            given.shape != like.shape or not given.is_contiguous() or given.device != like.device
        ):
            raise UsageError(f"gradients of {which} cannot be added to {_kind(given)}, strides {given.stride()}")
        out = torch.empty_like(like, memory_format=torch.contiguous_format) if given is None else given
        launch.weight_gradient(
            a,
            b,
            self.weights,
            which,
            self.width_offsets,
            self.routing,
            self.tile("weight_gradient"),
            out,
            given is not None,
            self.precision,
        )
        return out

    def bias_gradient(self, values: torch.Tensor, which: str) -> torch.Tensor:
        like = self.weights.up_bias if which == "up" else self.weights.down_bias
        assert like is not None
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        launch.bias_gradient(
            values, self.weights, which, self.width_offsets, self.routing, self.scores, self.tile("combine"), out
        )
        return out


@lru_cache(maxsize=256)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64. Copied once: a copy from the host waits for the device."""
    return torch.tensor(numbers, device=device)


def _check(x: torch.Tensor, weights: ExpertWeights, routing: Routing, scores: torch.Tensor | None) -> None:
    reason = why_not(x.device)
    if reason:
        raise EnvironmentFault(reason, hint="UPCYCLE_KERNELS=cpu or reference runs the experts without Triton")
    if x.dtype not in DTYPES:
        raise UsageError(f"x is {x.dtype}; Triton kernels compute bfloat16, float16 and float32")
    if x.ndim != 2 or x.shape != (routing.tokens, weights.hidden):
        raise UsageError(f"x has the shape {tuple(x.shape)}, not {(routing.tokens, weights.hidden)}")
    if weights.up.dtype != x.dtype or weights.up.device != x.device:
        raise UsageError(f"x is {x.dtype} on {x.device}, the experts are {weights.up.dtype} on {weights.up.device}")
    if routing.num_experts != weights.num_experts:
        raise UsageError(f"routing is to {routing.num_experts} experts, and there are {weights.num_experts}")
    if routing.offsets.device != x.device:
        raise UsageError(f"x is on {x.device}, its routing on {routing.offsets.device}")
    if scores is not None and (
        scores.shape != (routing.slots,) or scores.dtype != torch.float32 or scores.device != x.device
    ):
        raise UsageError(
            f"router weights are {_kind(scores)}, not float32 {[routing.slots]} on {x.device}",
            hint="flatten them, and keep them in float32: weights.float().flatten()",
        )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Rows may lie apart, as in a slice; elements of a row may not."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _contiguous(weights: ExpertWeights) -> ExpertWeights:
    tensors = {
        name: tensor
        for name in ("up", "down", "up_bias", "down_bias")
        if (tensor := getattr(weights, name)) is not None and not tensor.is_contiguous()
    }
    return replace(weights, **{name: tensor.contiguous() for name, tensor in tensors.items()}) if tensors else weights
