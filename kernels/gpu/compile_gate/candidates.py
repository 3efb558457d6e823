"""The tiles that are tried, best first: in bf16, in the order of times of several hundred on an H100.

The committed table holds the first of them that passes the gate (``python -m upcycle.kernels.gpu.compile_gate --choose``); with
a GPU, ``upcycle tune-kernels`` times all of them. A tile is ``(m, n, k, group, warps, stages)``.
"""

from __future__ import annotations

from upcycle.kernels.gpu.tile_table import GPU_KINDS, KERNEL_FAMILIES, SIZES, Key, Tile, TileTable

_Numbers = tuple[int, int, int, int, int, int]

# n of the first projection is neurons: a gated tile is twice as wide.
_UP: dict[int, list[_Numbers]] = {
    16: [(16, 64, 128, 8, 4, 3), (16, 64, 64, 8, 4, 4), (16, 32, 64, 8, 4, 4)],
    32: [(32, 64, 128, 8, 4, 3), (32, 64, 64, 8, 4, 4), (32, 64, 64, 8, 4, 3), (32, 32, 64, 8, 4, 4)],
    64: [
        (64, 64, 128, 8, 8, 4),
        (64, 64, 64, 8, 4, 4),
        (64, 64, 64, 8, 4, 3),
        (64, 64, 64, 8, 8, 3),
        (64, 32, 64, 8, 4, 3),
    ],
    128: [(128, 128, 64, 8, 8, 3), (128, 64, 64, 8, 8, 4), (128, 64, 64, 8, 8, 3), (128, 64, 32, 8, 8, 4)],
}
_GEMM: dict[int, list[_Numbers]] = {
    16: [(16, 128, 64, 8, 4, 5), (16, 128, 64, 8, 4, 4), (16, 64, 64, 8, 4, 4)],
    32: [(32, 128, 64, 8, 4, 4), (32, 128, 64, 8, 4, 3), (32, 64, 64, 8, 4, 4)],
    64: [(64, 128, 64, 8, 4, 4), (64, 128, 64, 8, 4, 3), (64, 128, 64, 8, 8, 3), (64, 64, 64, 8, 4, 4)],
    128: [
        (128, 256, 64, 8, 8, 4),
        (128, 256, 64, 8, 8, 3),
        (128, 128, 64, 8, 8, 4),
        (128, 128, 64, 8, 8, 3),
        (128, 128, 32, 8, 8, 4),
    ],
}
# One matrix: a plain first projection, and the gradient of h.
_PLAIN: dict[int, list[_Numbers]] = {
    16: [(16, 64, 128, 8, 4, 4), (16, 64, 128, 8, 4, 3), (16, 64, 64, 8, 4, 4), (16, 32, 64, 8, 4, 4)],
    32: [(32, 64, 128, 8, 4, 3), (32, 64, 64, 8, 4, 4), (32, 64, 64, 8, 4, 3), (32, 32, 64, 8, 4, 4)],
    64: [(64, 64, 64, 8, 4, 3), (64, 64, 64, 8, 4, 4), (64, 64, 64, 8, 8, 3), (64, 32, 64, 8, 4, 4)],
    128: [
        (128, 256, 64, 8, 8, 4),
        (128, 256, 64, 8, 8, 3),
        (128, 128, 64, 8, 8, 4),
        (128, 128, 64, 8, 8, 3),
        (128, 64, 64, 8, 8, 4),
        (128, 64, 32, 8, 8, 4),
    ],
}
# k is rows here: no more than an expert has. A gathered row is two loads away, hence the stages.
_WEIGHT_GRADIENT: dict[int, list[_Numbers]] = {
    16: [(64, 128, 16, 1, 4, 4), (64, 128, 16, 1, 4, 5), (128, 128, 16, 1, 8, 5)],
    32: [(64, 128, 32, 1, 4, 3), (64, 128, 32, 1, 4, 5), (128, 128, 32, 1, 8, 5), (128, 128, 32, 1, 8, 4)],
    64: [(64, 128, 64, 1, 4, 4), (64, 128, 32, 1, 4, 5), (128, 128, 64, 1, 8, 4), (128, 128, 32, 1, 8, 5)],
    128: [
        (256, 128, 32, 1, 8, 5),
        (128, 128, 64, 1, 8, 3),
        (128, 128, 64, 1, 8, 4),
        (128, 128, 32, 1, 8, 5),
        (64, 128, 32, 1, 4, 5),
    ],
}
_COMBINE: dict[int, list[_Numbers]] = {rows: [(4, 512, 1, 1, 4, 1)] for rows in (16, 32, 64, 128)}

# fp32 as three TF32 products: twice the bytes, three times the registers for fragments.
_FP32_PRODUCTS: dict[int, list[_Numbers]] = {
    16: [(16, 64, 32, 8, 4, 3), (16, 32, 32, 8, 4, 3)],
    64: [(64, 64, 32, 8, 8, 3), (64, 32, 32, 8, 4, 3), (64, 32, 32, 8, 8, 3), (64, 32, 16, 8, 8, 3)],
}
_FP32_WEIGHT_GRADIENT: dict[int, list[_Numbers]] = {
    16: [(64, 64, 16, 1, 4, 4), (64, 32, 16, 1, 4, 4)],
    64: [(64, 64, 32, 1, 4, 4), (64, 64, 32, 1, 8, 4), (64, 32, 32, 1, 4, 4)],
}


def candidates(size: int, family: str) -> dict[int, list[Tile]]:
    """Tiles by bucket of rows per expert, for ``size`` bytes per element."""
    if family == "combine":
        found = {rows: tiles for rows, tiles in _COMBINE.items() if size == 2 or rows in _FP32_PRODUCTS}
    elif size == 4:
        found = _FP32_WEIGHT_GRADIENT if family == "weight_gradient" else _FP32_PRODUCTS
    else:
        found = {
            "gemm": _GEMM,
            "down_backward": _PLAIN,
            "up/plain": _PLAIN,
            "weight_gradient": _WEIGHT_GRADIENT,
        }.get(family, _UP)
    return {rows: [Tile(*numbers) for numbers in tiles] for rows, tiles in found.items()}


def first_guess() -> TileTable:
    """A table of first candidates, which need not pass the gate."""
    return TileTable(
        {
            (kind, size, family, rows): tiles[0]
            for kind in GPU_KINDS
            for size in SIZES
            for family in KERNEL_FAMILIES
            for rows, tiles in candidates(size, family).items()
        }
    )


def choose(key: Key) -> Tile | None:
    """The first candidate for a place of the table that passes the gate in all layouts; ``None`` if there is none."""
    from upcycle.kernels.gpu.compile_gate.compile import build
    from upcycle.kernels.gpu.compile_gate.rules import faults
    from upcycle.kernels.gpu.compile_gate.variants import place_variants

    kind, size, family, rows = key
    for tile in candidates(size, family)[rows]:
        todo = dict.fromkeys(place_variants(kind, size, rows, first_guess().replaced({key: tile}), family))
        if not any(faults(build(variant)) for variant in todo):
            return tile
    return None
