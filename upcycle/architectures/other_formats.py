"""What stock transformers must be told to read a ``.gguf`` file, or weights in FP8, as a full-precision model on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upcycle.files.formats.tensor_files import read_config
from upcycle.files.formats.tensor_names import is_block_fp8

# Settings of FP8 weights that say what they are. Others could lead transformers to kernels of somebody's repository.
_FP8_SETTINGS = ("quant_method", "weight_block_size", "activation_scheme", "modules_to_not_convert", "ignored_layers")


def gguf_config(clean: Path, path: Path) -> Any:
    """Return the configuration that transformers reads of a ``.gguf`` file, with what it does not read: biases, sizes.

    Args:
        clean: a folder that shows transformers this file.
        path: the file.
    """
    from transformers import AutoConfig

    from upcycle.files.formats.gguf_file import GgufFile

    ours = GgufFile(path).config
    config: Any = AutoConfig.from_pretrained(clean, gguf_file=path.name, trust_remote_code=False, local_files_only=True)
    for key in ours.keys() & {"vocab_size", "attention_bias", "head_dim", "pad_token_id"}:
        setattr(config, key, ours[key])
    return config


def fp8_settings(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` with which transformers multiplies FP8 weights by their scales; None without such weights.

    Unless it is told to, it does that only where there is no GPU.
    """
    raw = read_config(folder)
    if not is_block_fp8(raw):
        return None
    settings = raw["quantization_config"]
    return {**{key: settings[key] for key in _FP8_SETTINGS if key in settings}, "dequantize": True}
