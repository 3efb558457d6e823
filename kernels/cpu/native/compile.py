"""Compiles the C++ files of this folder for this processor when they are first needed, and keeps the result.

It needs a C++ compiler (``CXX``, ``c++``, ``g++`` or ``clang++``); without one, torch's operations are used. What was compiled
lies in this user's cache (:func:`upcycle.files.user_paths.cache_folder`), named after the source, the compiler and the
processor, its hash beside it, and is loaded from there only while it has that hash and nobody else may write to it.
``UPCYCLE_COMPILE=0`` keeps it from being compiled and used.
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

from upcycle.files.atomic_files import write_text_whole
from upcycle.files.user_paths import cache_folder, only_ours

COMPILE_VARIABLE = "UPCYCLE_COMPILE"
SECONDS = 120  # that a compiler gets
ALWAYS = ("-O3", "-std=c++17", "-fPIC", "-shared")
WISHES = (("-march=native", "-fopenmp"), ("-march=native",), ())  # the first that the compiler understands
_log = logging.getLogger("upcycle.kernels")

Function = Callable[..., int]


class NotCompiledError(Exception):
    """The reason why there is no compiled function."""


@lru_cache
def function(name: str, what: str, arguments: tuple[type, ...], *flags: str) -> Function | None:
    """``upcycle_NAME`` of ``NAME.cpp``; ``None`` where it cannot be compiled. Which of both is logged, once.

    Args:
        name: of the file, without its ending.
        what: the operations that run on it, for the log.
        arguments: types of its arguments; it returns an ``int``.
        flags: for the compiler, beside the usual ones.
    """
    try:
        library, loaded = _library(Path(__file__).with_name(f"{name}.cpp"), flags)
        found: Function = getattr(loaded, f"upcycle_{name}")
    except (NotCompiledError, OSError, AttributeError) as error:
        _log.info("%s on the CPU run on torch's operations: %s", what, error)
        return None
    found.argtypes, found.restype = arguments, ctypes.c_int  # type: ignore[attr-defined]
    _log.info("%s on the CPU run on a kernel compiled for this processor: %s", what, library)
    return found


def _library(source: Path, flags: tuple[str, ...]) -> tuple[Path, ctypes.CDLL]:
    """The library's file and the loaded library, compiled if there is no whole one."""
    if os.environ.get(COMPILE_VARIABLE, "1") == "0":
        raise NotCompiledError(f"{COMPILE_VARIABLE} is 0")
    compiler = _compiler()
    name = f"{source.stem}-{_identity(compiler, source, flags)}.so"
    folder = cache_folder()
    if folder is None:  # what is loaded stays loaded without its file
        with tempfile.TemporaryDirectory(prefix="upcycle-") as made:
            library = Path(made) / name
            _compile(compiler, (*ALWAYS, *flags), source, library)
            return library, ctypes.CDLL(str(library))
    library = folder / name
    if not _whole(library):
        _compile(compiler, (*ALWAYS, *flags), source, library)
    return library, ctypes.CDLL(str(library))


def _whole(library: Path) -> bool:
    """Whether a library is what the compiler wrote, and only this user may write to it.

    A full disk or a crash may have cut the file short, and running a cut file ends the process (SIGBUS).
    """
    try:
        said = _hash_file(library).read_text(encoding="utf-8").strip()
        return only_ours(library) and said == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _hash_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise NotCompiledError("there is no C++ compiler (c++, g++, clang++; CXX names another)")


def _identity(compiler: list[str], source: Path, flags: tuple[str, ...]) -> str:
    """A hash of everything that a compiled library depends on."""
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiledError(f"{shlex.join(compiler)} does not run: {error}") from error
    command = shlex.join([*compiler, *ALWAYS, *flags])
    sources = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.hpp"))))
    parts = [sources, version, command.encode(), platform.machine().encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """The processor's model and instructions, where Linux tells: machines that differ may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def _compile(compiler: list[str], flags: tuple[str, ...], source: Path, library: Path) -> None:
    """Compile ``source`` and move the result to ``library`` in one step: other processes may do the same at this moment."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    made, said = Path(name), ""
    try:
        for wishes in WISHES:
            command = [*compiler, *flags, *wishes, str(source), "-o", name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            except (OSError, subprocess.SubprocessError) as error:
                raise NotCompiledError(f"{shlex.join(compiler)} does not run: {error}") from error
            if done.returncode == 0:
                made.chmod(0o700)
                digest = hashlib.sha256(made.read_bytes()).hexdigest()
                made.replace(library)
                write_text_whole(_hash_file(library), digest + "\n")
                return
            said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise NotCompiledError(f"{shlex.join(compiler)} does not compile {source.name}: {said}")
    finally:
        made.unlink(missing_ok=True)
