"""Compiles one launch for a GPU that this machine need not have, and reads what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from upcycle.kernels.gpu.launch_log import Launch
from upcycle.kernels.gpu.tile_table import Tile

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")  # Ampere, Hopper, Blackwell
_ASYNC = ("cp.async.ca", "cp.async.cg", "cp.async.bulk")


@dataclass(frozen=True)
class KernelVariant:
    """One kernel with everything that a launch compiles in; launches that differ only in other arguments share one."""

    kind: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    """Types by parameter, in order; "constexpr" where a value is compiled in."""
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    """Parameters that are multiples of 16."""
    tile: Tile

    @property
    def title(self) -> str:
        """One line that names the variant in messages."""
        size = f"{self.tile.m}x{self.tile.n}x{self.tile.k}"
        return f"{self.kind} {self.name} {self.dtype} {size}, {self.tile.warps} warps, {self.tile.stages} stages"

    @property
    def name(self) -> str:
        """The kernel's name, followed by what sets this variant apart."""
        values = dict(self.constants)
        # The gradient of h is the first projection's kernel without an activation.
        of_h = values.get("ACTIVATION") == "none"
        parts = ["down_backward"] if of_h else [self.kernel.removesuffix("_kernel"), values.get("FORM", "")]
        parts.append("" if values.get("HIDDEN_LAST", True) else "hidden first")
        parts.append("weighted" if self.kernel == "combine_kernel" and values["WEIGHTED"] else "")
        return " ".join(filter(None, parts))

    @property
    def dtype(self) -> str:
        """The tensors' dtype, as Triton spells it."""
        return self.signature[0][1].removeprefix("*")


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of a variant."""

    variant: KernelVariant
    registers: int
    stack: int
    shared: int
    tensor_core: dict[str, int]
    """How often each tensor-core instruction occurs."""
    async_copies: int


def variant_of(launch: Launch, kind: str) -> KernelVariant:
    """The variant that Triton's launcher would compile for a launch on this kind of GPU."""
    signature, aligned = [], []
    constants: list[tuple[str, Any]] = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants.append((parameter.name, value))
            signature.append((parameter.name, "constexpr"))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, _POINTERS[value.dtype]))
            aligned.append(parameter.name)
        else:
            signature.append((parameter.name, parameter.annotation_type or "i32"))
            if not parameter.do_not_specialize and value % 16 == 0:
                aligned.append(parameter.name)
    kernel = launch.kernel.fn
    return KernelVariant(
        kind, kernel.__module__, kernel.__name__, tuple(signature), tuple(constants), tuple(aligned), launch.tile
    )


def build(variant: KernelVariant) -> CompiledKernel:
    """A variant of one of these kernels, compiled."""
    return build_kernel(getattr(import_module(variant.module), variant.kernel), variant)


def build_kernel(kernel: Any, variant: KernelVariant) -> CompiledKernel:
    """A variant of any kernel that ``triton.jit`` returned, compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    constants = {(names.index(name),): value for name, value in variant.constants}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(kernel, dict(variant.signature), constants, attributes)
    options = {"num_warps": variant.tile.warps, "num_stages": variant.tile.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(variant.kind[2:]), 32), options=options)
    registers, stack, opcodes = inspect(compiled.asm["cubin"], compiled.asm["ptx"])
    tensor_core = {name: opcodes[name] for name in _TENSOR_CORE if opcodes[name]}
    copies = sum(opcodes[name] for name in _ASYNC)
    return CompiledKernel(variant, registers, stack, compiled.metadata.shared, tensor_core, copies)


def inspect(cubin: bytes, ptx: str) -> tuple[int, int, Counter[str]]:
    """Registers per thread and bytes of stack as the assembler used them, and how often PTX names an instruction."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|cp\.async\.c[ag]|cp\.async\.bulk)\b", ptx)
    return int(found[1]), int(found[2]), Counter(names)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
