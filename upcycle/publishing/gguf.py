"""Writes a model as a GGUF file, by llama.cpp's own converter and ``llama-quantize``, under llama.cpp's names of types."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.architectures.dense.widened import refuse_masked
from upcycle.errors import CheckpointError, EnvironmentFault, RefusalError, UsageError
from upcycle.files.atomic_files import write_whole
from upcycle.files.formats.tensor_files import SafetensorsFolder, read_config
from upcycle.files.output.scratch import scratch
from upcycle.files.output.workspace import explained_system_errors
from upcycle.files.user_paths import user_path
from upcycle.hardware.child_processes import engine_environment
from upcycle.progress import SILENT, Progress
from upcycle.registry import suggestion
from upcycle.verification.engines.engine import NotHeld, last_lines
from upcycle.verification.engines.llama_cpp_engine import LLAMA_CPP_HINT, convert_to_gguf, found_program

CONVERTED = ("f32", "f16", "bf16", "q8_0")  # what the converter itself writes
QUANTIZED = (
    *(
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q2_k",
        "q2_k_s",
        "q3_k_s",
        "q3_k_m",
        "q3_k_l",
        "q4_k_s",
        "q4_k_m",
        "q5_k_s",
        "q5_k_m",
    ),
    *("q6_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl"),
    *("iq4_xs", "tq1_0", "tq2_0"),
)
_MAGIC = b"GGUF"
_QUANTIZER = "llama-quantize"
_WHOLE = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class GgufExport:
    """What was written: the file, its type, and its bytes."""

    out: str
    type: str
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return dict(vars(self))


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    type: str = "q8_0",
    python: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> GgufExport:
    """Write a stock model as a GGUF file.

    Args:
        model: its folder.
        out: the file, which ends in ``.gguf``.
        type: llama.cpp's name, such as ``q4_k_m``: :data:`CONVERTED` and :data:`QUANTIZED`.
        python: the Python that has what the converter imports; None: this one.
        overwrite: replace a GGUF file, once the new one is complete.
        progress: what to report to.

    Raises:
        UsageError: the type is unknown, or ``out`` is there already or is something else than a GGUF file.
        CheckpointError: ``model`` is no whole model.
        RefusalError: llama.cpp does not know the architecture, or cannot quantize it so; the message has its words.
        EnvironmentFault: llama.cpp is not there; the hint says where it is looked for.
    """
    kind, folder = type.lower(), user_path(model)
    if kind not in (*CONVERTED, *QUANTIZED):
        raise UsageError(f"llama.cpp has no type '{type}'", hint=suggestion(kind, (*CONVERTED, *QUANTIZED)))
    out = _checked_out(user_path(out).absolute(), overwrite)
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="name the folder of a stock model, or a checkpoint of a run")
    refuse_masked(folder, str(model))
    dtype = str(read_config(folder).get("dtype") or read_config(folder).get("torch_dtype"))
    SafetensorsFolder(folder)  # a folder that is no whole model is refused now
    quantizer = None if kind in CONVERTED else _quantizer()
    converted = kind if quantizer is None else _WHOLE.get(dtype, "f32")
    with explained_system_errors(out), scratch("gguf") as work, progress.phase("writing GGUF", 2):
        whole = work / "model.gguf"
        try:
            convert_to_gguf(folder, whole, work, python or sys.executable, converted)
        except NotHeld as error:
            raise RefusalError(error.message, hint="a newer llama.cpp may know it") from None
        progress.advance()
        if quantizer is not None:
            whole = _quantized(quantizer, whole, work, kind)
        with whole.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise CheckpointError(f"llama.cpp wrote something else than a GGUF file for {folder}")
        write_whole(out, lambda partial: _copied(whole, partial))
        progress.advance()
    return GgufExport(str(out), kind, out.stat().st_size)


def _checked_out(out: Path, overwrite: bool) -> Path:
    if out.suffix != ".gguf":
        raise UsageError(f"{out} does not end in .gguf", hint="name the file to write: OUT.gguf")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{out.parent} is no folder that can be written to", hint="make it first, or name another")
    if os.path.lexists(out):
        if not overwrite:
            raise UsageError(f"{out} is there already", hint="another file, or --overwrite")
        if not out.is_file() or _start(out) != _MAGIC:
            raise UsageError(
                f"{out} is no GGUF file, and is not overwritten", hint="move it away, or choose another name"
            )
    return out


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _quantizer() -> str:
    found = found_program(_QUANTIZER)
    if found is None:
        raise EnvironmentFault(
            f"llama.cpp's {_QUANTIZER} was not found, and the converter alone writes {', '.join(CONVERTED)}",
            hint=f"build it (cmake -B build && cmake --build build --target {_QUANTIZER}), and: {LLAMA_CPP_HINT}",
        )
    return found


def _quantized(program: str, whole: Path, work: Path, kind: str) -> Path:
    """Quantize a GGUF file; returns the new one."""
    out, log = work / "quantized.gguf", work / "quantize.log"
    with log.open("wb") as output:
        command = [program, str(whole), str(out), kind.upper(), str(os.cpu_count() or 1)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=work,
                env=engine_environment(),
                check=False,
            )
        except OSError as error:
            raise EnvironmentFault(
                f"{program} cannot be run: {error.strerror}", hint="build llama.cpp for this machine"
            ) from None
    if done.returncode or not out.is_file():
        end = last_lines(log) or f"code {done.returncode}"
        raise RefusalError(
            f"{_QUANTIZER} cannot write {kind}:\n{end}",
            hint="another --type, such as q4_k_m; iq1 and iq2 types need an importance matrix",
        )
    whole.unlink()
    return out


def _copied(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(1 << 24):
            write.write(block)
