"""Other projects' Triton kernels of experts through our compiler and our questions: registers, spills, shared memory.

    pip install liger-kernel deepspeed
    python -P tests/benchmarks/kernels/compile_peers.py --write peers.md

Every configuration that a project's autotuner may choose is compiled for bf16, hidden size 2048, width 768. Nothing runs: this says
which of them could be launched and which spill, not how fast they are. ScatterMoE is not on PyPI.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module, metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from upcycle.kernels.gpu.compile_gate.compile import CompiledKernel, KernelVariant, build_kernel
from upcycle.kernels.gpu.compile_gate.rules import SHARED_LIMIT
from upcycle.kernels.gpu.tile_table import GPU_KINDS, Tile

HIDDEN, WIDTH, EXPERTS = 2048, 768, 8
LIGER, DEEPSPEED = "liger_kernel.ops.fused_moe_kernels", "deepspeed.ops.triton_ops.group_gemm_triton"
PEERS = {
    "liger-kernel": (
        LIGER,
        {
            "_fused_up_proj_swiglu_kernel": "gather, first projection, activation",
            "_fused_down_proj_kernel": "down projection",
            "_moe_bwd_down_proj_kernel": "backward of down projection and activation",
            "_moe_bwd_dX_expanded_kernel": "gradient of rows",
            "_moe_bwd_dW1_kernel": "gradient of gate and up",
            "_moe_bwd_dW2_kernel": "gradient of down",
        },
    ),
    "deepspeed": (
        DEEPSPEED,
        {"_group_gemm_kernel": "grouped product", "_group_gemm_dw_kernel": "gradient of weights"},
    ),
}
INTRODUCTION = """# Other projects' kernels through the same compiler

Printed by `python -P tests/benchmarks/kernels/compile_peers.py`: every configuration their autotuners may choose, compiled by Triton
{triton} for bf16, hidden size {hidden}, width {width}. Nothing was run, and **no time follows from this**: an autotuner on a GPU may
well avoid what spills. *Too large*: needs more shared memory than a block can have (99 KiB on sm_80's line, which sm_86 and sm_89
share; 227 KiB on the others). ScatterMoE is not on PyPI. Ours: docs/measured/kernels_static.md, where every configuration
that is shipped is listed; none spills.

| project | kernel | GPU | configurations | do not compile | spill | largest stack | too large | registers |
|---|---|---|---|---|---|---|---|---|"""
CONSTANTS = {"H_dim": HIDDEN, "I_dim": WIDTH, "NUM_GROUPS": EXPERTS, "BLOCK_M": 64}
CONTIGUOUS = {"stride_ak", "stride_bk", "stride_on", "stride_gn"}  # 1 at run time, which Triton compiles in
INDICES = ("idx", "start", "expert_ptr", "size")


def peer(module: str, name: str) -> Any:
    """An autotuned kernel; DeepSpeed only defines its own where Triton sees a GPU, so it is shown one."""
    from triton.backends import backends

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    return getattr(import_module(module), name)


def is_index(name: str) -> bool:
    return name.endswith("_ptr") and any(part in name for part in INDICES)


def variant(kind: str, module: str, name: str, kernel: Any, config: Any) -> KernelVariant:
    """One configuration of one kernel."""
    blocks = {**CONSTANTS, **config.kwargs}
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        label = parameter.name
        if parameter.is_constexpr or label in CONTIGUOUS:
            signature.append((label, "constexpr"))
            constants.append((label, 1 if label.startswith("stride") else blocks[label]))
            continue
        kinds = "*i32" if is_index(label) else "*bf16" if label.endswith("_ptr") else "i32"
        signature.append((label, kinds))
        if label != "M":
            aligned.append(label)
    tile = Tile(blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"], 1, config.num_warps, config.num_stages)
    return KernelVariant(kind, module, name, tuple(signature), tuple(constants), tuple(aligned), tile)


def compiled(work: tuple[str, str, str, int]) -> CompiledKernel | str:
    """In a process of its own; the message of a compiler that gives up."""
    kind, module, name, number = work
    tuned = peer(module, name)
    one = variant(kind, module, name, tuned.fn, tuned.configs[number])
    try:
        return build_kernel(tuned.fn, one)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def lines(project: str, processes: int, kinds: list[str]) -> Iterator[str]:
    module, names = PEERS[project]
    for name, purpose in names.items():
        count = len(peer(module, name).configs)
        for kind in kinds:
            work = [(kind, module, name, number) for number in range(count)]
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                made = list(pool.map(compiled, work))
            compiled_kernels = [each for each in made if isinstance(each, CompiledKernel)]
            spilling = [each for each in compiled_kernels if each.stack]
            large = [each for each in compiled_kernels if each.shared > SHARED_LIMIT[kind]]
            worst = max((each.stack for each in compiled_kernels), default=0)
            registers = [each.registers for each in compiled_kernels]
            cells = [
                f"{project} {metadata.version(project)}",
                purpose,
                kind,
                str(count),
                str(count - len(compiled_kernels)),
                str(len(spilling)),
                f"{worst}",
                str(len(large)),
                f"{min(registers)}-{max(registers)}" if registers else "-",
            ]
            yield "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kind", choices=GPU_KINDS, action="append")
    parser.add_argument("--project", choices=PEERS, action="append")
    options = parser.parse_args()
    import triton

    text = INTRODUCTION.format(triton=triton.__version__, hidden=HIDDEN, width=WIDTH).splitlines()
    print("\n".join(text), flush=True)
    for project in options.project or PEERS:
        for line in lines(project, options.processes, options.kind or list(GPU_KINDS)):
            print(line, flush=True)
            text.append(line)
    if options.write:
        options.write.write_text("\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
