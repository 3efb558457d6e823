"""The static report: what the compiler made of the shipped tiles, and lower bounds of times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from upcycle.kernels.gpu.compile_gate.compile import CompiledKernel
from upcycle.kernels.gpu.compile_gate.roofline import GPUS, SHAPES, Shape, kernels, saved_bytes, total

_REGISTERS, _THREADS, _BLOCKS = 65536, 2048, 32
_SHARED_PER_SM = {"sm80": 164, "sm90": 228, "sm100": 228}  # KiB, of which every block takes one more
_INTRODUCTION = """# Kernels without a GPU: what can be known

Printed by `python -m upcycle.kernels.gpu.compile_gate`, which compiles every shipped tile for sm_80, sm_90 and sm_100 and fails
when one spills, needs too much shared memory, or lacks tensor-core instructions or asynchronous copies.

Registers, stack and shared memory are the assembler's, instructions are counted in PTX; blocks per multiprocessor, bytes and
floors are *estimates* from shapes and data sheets. Times on a GPU: [kernels_gpu.md](kernels_gpu.md).
"""


def compiler() -> str:
    """The compiler's name and version."""
    import triton

    return f"Triton {triton.__version__}"


def report(compiled_kernels: Sequence[CompiledKernel]) -> str:
    """The report as Markdown."""
    parts = [
        _INTRODUCTION,
        f"## Shipped tiles\n\n{compiler()}. Tile: rows x columns x depth (for `up`, `down_backward` and `activation_backward` columns "
        "are neurons; for `xty` rows are neurons and depth is rows). Blocks: per multiprocessor, *estimate*.\n",
        _table(
            [
                "GPU",
                "kernel",
                "dtype",
                "tile",
                "warps",
                "stages",
                "registers",
                "stack",
                "shared KiB",
                "tensor core",
                "copies",
                "blocks",
            ],
            (_row(build) for build in sorted(compiled_kernels, key=_order)),
        ),
        _floors(),
    ]
    return "\n".join(parts)


def blocks_per_sm(build: CompiledKernel) -> int:
    """The number of blocks that fit on a multiprocessor by registers, shared memory and threads; an estimate."""
    threads = 32 * build.variant.tile.warps
    by_registers = _REGISTERS // (-(-build.registers // 8) * 8 * threads)
    by_shared = _SHARED_PER_SM[build.variant.kind] * 1024 // (build.shared + 1024)
    return min(by_registers, by_shared, _THREADS // threads, _BLOCKS)


def _order(build: CompiledKernel) -> tuple[object, ...]:
    variant = build.variant
    return int(variant.kind[2:]), variant.dtype, variant.name, variant.tile.m, variant.tile.n, variant.tile.k


def _row(build: CompiledKernel) -> list[str]:
    variant, tile = build.variant, build.variant.tile
    return [
        variant.kind,
        variant.name,
        variant.dtype,
        f"{tile.m}x{tile.n}" + (f"x{tile.k}" if tile.k > 1 else ""),
        str(tile.warps),
        str(tile.stages),
        str(build.registers),
        str(build.stack),
        f"{build.shared / 1024:.0f}",
        " ".join(f"{count} {name}" for name, count in build.tensor_core.items()) or "-",
        str(build.async_copies),
        str(blocks_per_sm(build)),
    ]


def _floors() -> str:
    parts = [
        "\n## Floors (estimate)\n\nThe time a perfect kernel needs at the data sheets' peaks: the larger of FLOPs over "
        + ", ".join(f"{gpu.flops / 1e12:.0f}" for gpu in GPUS)
        + " TFLOP/s and bytes over "
        + ", ".join(f"{gpu.bandwidth / 1e12:.2f}" for gpu in GPUS)
        + " TB/s ("
        + ", ".join(gpu.name for gpu in GPUS)
        + "). Milliseconds, each kernel by itself, bf16.\n"
    ]
    rows = []
    for shape in SHAPES:
        for name, training in (("forward", False), ("forward + backward", True)):
            cost = total(shape, training)
            costs = list(kernels(shape).values())[: None if training else 3]
            floors = (f"{1e3 * sum(each.floor(gpu) for each in costs):.2f}" for gpu in GPUS)
            rows.append([_name(shape), name, f"{cost.flops / 1e12:.3f}", f"{cost.bytes / 2**30:.2f}", *floors])
    parts.append(_table(["shape", "pass", "TFLOP", "GiB", *(gpu.name for gpu in GPUS)], rows))
    shape = SHAPES[0]
    parts.append(f"\n{_name(shape)}, by kernel:\n")
    parts.append(
        _table(
            ["kernel", "GFLOP", "MiB", *(gpu.name for gpu in GPUS)],
            (
                [
                    name,
                    f"{cost.flops / 1e9:.1f}",
                    f"{cost.bytes / 2**20:.0f}",
                    *(f"{1e3 * cost.floor(gpu):.3f}" for gpu in GPUS),
                ]
                for name, cost in kernels(shape).items()
            ),
        )
    )
    parts.append("\nKept for the backward pass, besides weights and index vectors:\n")
    parts.append(
        _table(
            ["shape", "input and z", "input only"],
            (
                [_name(each), *(f"{saved_bytes(each, keep) / 2**20:.0f} MiB" for keep in (True, False))]
                for each in SHAPES
            ),
        )
    )
    return "\n".join(parts)


def _name(shape: Shape) -> str:
    return f"{shape.name} (T {shape.tokens}, H {shape.hidden}, I {shape.width}, E {shape.experts}, K {shape.top_k})"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
