"""The kernel for a few tokens on a CPU, ``few_rows.cpp``: compiled for this processor when it is first needed, and kept.

It needs a C++ compiler (``CXX``, ``c++``, ``g++`` or ``clang++``); without one, torch's products are used. What was compiled lies
in ``$XDG_CACHE_HOME/upcycle`` or ``~/.cache/upcycle``, named after the source, the compiler and the processor, and is loaded from
there only while nobody else may write to it. ``UPCYCLE_COMPILE=0`` keeps it from being compiled and used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from upcycle.kernels.experts import ExpertWeights

VARIABLE = "UPCYCLE_COMPILE"
SOURCE = Path(__file__).with_name("few_rows.cpp")
SECONDS = 120  # that a compiler gets
ALWAYS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared")
WISHES = (("-march=native", "-fopenmp"), ("-march=native",), ())  # the first that the compiler understands
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3, "relu2": 4}
KINDS = {torch.float32: 0, torch.bfloat16: 1}
_log = logging.getLogger("upcycle.kernels")

Function = Callable[..., int]


class NotCompiledError(Exception):
    """Why there is no compiled kernel."""


@lru_cache
def few_rows() -> Function | None:
    """``upcycle_few_rows`` of the source file; ``None`` where it cannot be had. What happened is logged, once."""
    try:
        library = _library()
        function: Function = ctypes.CDLL(str(library)).upcycle_few_rows
    except (NotCompiledError, OSError) as error:
        _log.info("a few tokens on the CPU run on torch's products: %s", error)
        return None
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 5, *[ctypes.c_int] * 4]  # type: ignore[attr-defined]
    function.restype = ctypes.c_int  # type: ignore[attr-defined]
    _log.info("a few tokens on the CPU run on a kernel compiled for this processor: %s", library)
    return function


def takes(weights: ExpertWeights, experts: torch.Tensor) -> bool:
    """Whether the kernel is for these experts: stacked as most models store them, in fp32 or bf16, of a processor's memory."""
    layout = not weights.packed and not weights.transposed and weights.up_bias is None and weights.down_bias is None
    stored = weights.up.dtype in KINDS and weights.up.is_contiguous() and weights.down.is_contiguous()
    return layout and stored and experts.shape[-1] <= weights.num_experts


def few_rows_output(
    x: torch.Tensor, weights: ExpertWeights, experts: torch.Tensor, scores: torch.Tensor | None
) -> torch.Tensor | None:
    """``[T, H]`` like ``x`` of experts that it :func:`takes`; ``None``: there is no kernel, or an id or a score is wrong.

    Args:
        x: ``[T, H]``.
        weights: of its dtype.
        experts: ids ``[T, K]``; E and more have no expert.
        scores: fp32 ``[T, K]``; ``None``: all 1.
    """
    function = few_rows()
    if function is None:
        return None
    x, experts = x.contiguous(), experts.to(torch.int64).contiguous()
    factors = None if scores is None else scores.contiguous()
    out = torch.empty_like(x)
    refused = function(
        KINDS[x.dtype], x.data_ptr(), weights.up.data_ptr(), weights.down.data_ptr(), experts.data_ptr(),
        None if factors is None else factors.data_ptr(), out.data_ptr(),
        len(x), experts.shape[1], weights.num_experts, weights.hidden, weights.width(0),
        ACTIVATIONS[weights.activation], weights.gated, weights.interleaved, torch.get_num_threads(),
    )  # fmt: skip
    return None if refused else out


def _library() -> Path:
    """The compiled library's file, made if there is none."""
    if os.environ.get(VARIABLE, "1") == "0":
        raise NotCompiledError(f"{VARIABLE} is 0")
    compiler = _compiler()
    name = f"few_rows-{_identity(compiler)}.so"
    folder = _folder()
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="upcycle-"))
    library = folder / name
    if not (library.exists() and _ours(library)):
        _compile(compiler, library)
    return library


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise NotCompiledError("there is no C++ compiler (c++, g++, clang++; CXX names another)")


def _identity(compiler: list[str]) -> str:
    """Of everything that a compiled library depends on."""
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiledError(f"{shlex.join(compiler)} does not run: {error}") from error
    parts = [SOURCE.read_bytes(), version, shlex.join(compiler).encode(), platform.machine().encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """The instructions it has, where Linux tells; homes are shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def _folder() -> Path | None:
    """Where compiled libraries are kept; ``None``: nowhere that only this user can write to."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "upcycle"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if _ours(folder) and os.access(folder, os.W_OK) else None


def _ours(path: Path) -> bool:
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _compile(compiler: list[str], library: Path) -> None:
    """Into ``library``, at once or not at all: other processes may be at it, too."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    made, said = Path(name), ""
    try:
        for wishes in WISHES:
            command = [*compiler, *ALWAYS, *wishes, str(SOURCE), "-o", name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            except (OSError, subprocess.SubprocessError) as error:
                raise NotCompiledError(f"{shlex.join(compiler)} does not run: {error}") from error
            if done.returncode == 0:
                made.chmod(0o700)
                made.replace(library)
                return
            said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise NotCompiledError(f"{shlex.join(compiler)} does not compile it: {said}")
    finally:
        made.unlink(missing_ok=True)
