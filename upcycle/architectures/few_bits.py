"""What stock transformers needs to load folders whose weights are in few bits (compressed-tensors)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import EnvironmentFault
from upcycle.files.formats.packed_folder import PackedFolder, is_mixed, is_packed, packed_settings
from upcycle.files.formats.tensor_files import read_config

if TYPE_CHECKING:
    import torch


def packed_config(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` with which transformers unpacks a folder.

    None: its weights are in full precision (or in FP8 blocks), or their experts are in several widths, which it does not unpack.

    Raises:
        EnvironmentFault: the package that unpacks them is missing.
    """
    raw = read_config(folder) if folder.is_dir() else {}
    if not is_packed(raw) or is_mixed(raw):
        return None
    if find_spec("compressed_tensors") is None:
        raise EnvironmentFault(
            f"{folder} holds weights in few bits, which transformers reads with compressed-tensors",
            hint="pip install 'upcycle[quant]'",
        )
    return packed_settings(raw)


def unpacked(folder: Path) -> dict[str, torch.Tensor] | None:
    """Return all weights of a folder whose experts are in several widths, unpacked; None for all other folders."""
    raw = read_config(folder) if folder.is_dir() else {}
    if not is_mixed(raw):
        return None
    store = PackedFolder(folder, raw)
    return {name: store.read(name) for name in store.specs}


def unpack_linear_layers(model: Any, dtype: torch.dtype | str) -> None:
    """Multiply the integers of a model's linear layers by their scales now, which its first call would do, and set its dtype."""
    with quiet_unpacking():
        if not isinstance(dtype, str):
            model.to(dtype)
        model.hf_quantizer.compressor.decompress_model(model)


@contextmanager
def quiet_unpacking() -> Iterator[None]:
    """Keep the progress bars and remarks of compressed-tensors off the terminal inside the ``with`` block."""
    from loguru import logger

    logger.disable("compressed_tensors")
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.enable("compressed_tensors")
