"""The rules that a compiled tile must meet to be shipped."""

from __future__ import annotations

from upcycle.kernels.gpu.compile_gate.compile import CompiledKernel

# Shared memory one block can have. The first table is also used on sm_86, sm_89 and sm_120, which have 99 KiB.
SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
_OPCODE = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma"}
_WIDE_TILE = 64  # rows that the instructions of Hopper and Blackwell need at least; smaller tiles use Ampere's
_PRODUCTS = ("up_kernel", "gemm_kernel", "xty_kernel")


def faults(result: CompiledKernel) -> list[str]:
    """The rules that a compiled kernel breaks, in words; empty if it may be shipped."""
    found, variant = [], result.variant
    if result.stack:
        found.append(f"{result.stack} bytes of stack: registers spill")
    if result.shared > SHARED_LIMIT[variant.kind]:
        found.append(f"{result.shared / 1024:.0f} KiB of shared memory, above {SHARED_LIMIT[variant.kind] // 1024}")
    if variant.kernel in _PRODUCTS:
        wanted = _OPCODE[variant.kind] if variant.tile.m >= _WIDE_TILE else "mma.sync"
        if wanted not in result.tensor_core and (wanted != "mma.sync" or not result.tensor_core):
            found.append(f"no tensor-core instruction {wanted}")
        if not result.async_copies:
            found.append("no asynchronous copy")
    return found
