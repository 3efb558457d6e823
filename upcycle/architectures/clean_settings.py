"""Takes settings that name code, a kernel, a repository or a path out of the JSON files of other people.

:mod:`upcycle.architectures.stock` shows transformers cleaned files only, and outputs get cleaned copies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from upcycle.files.formats.parsing import read_json

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_PROCESSOR_CLASSES = ("processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type")
# Keys of a configuration, on any level, that lead transformers to code, to a kernel, to another repository or to a file, or
# that replace parts of the stock class. A key that the model's own module reads under the same name is not among them.
_CODE = frozenset(
    (
        "auto_map",
        "custom_pipelines",
        "custom_generate",
        "trust_remote_code",
        "code_revision",
        "attn_implementation",
        "experts_implementation",
        "kernel_config",
        "use_kernels",
        "allow_all_kernels",
        "fusion_config",
        "distributed_config",
        "quantization_config",
        "compression_config",
        "transformers_weights",
        "name_or_path",
        "adapter_kwargs",
        "base_model_name_or_path",
        "backbone",
        "use_pretrained_backbone",
        "use_timm_backbone",
        "backbone_kwargs",
        "processor_class",
        "feature_extractor_type",
        "image_processor_type",
        "video_processor_type",
        "tokenizer_file",
        "vocab_file",
        "merges_file",
        "init_inputs",
        "gguf_file",
        "revision",
        "_commit_hash",
    )
)
# Attributes of transformers' base class that appear in config.json files and are plain data.
_PLAIN_ATTRIBUTES = frozenset(
    ("model_type", "rope_scaling", "num_labels", "output_attentions", "torch_dtype", "per_layer_config")
)
# Settings of generate() that transformers has moved to repositories with code, or that compile code: it refuses them or warns.
GENERATION_CODE = frozenset(
    (
        "penalty_alpha",
        "dola_layers",
        "num_beam_groups",
        "diversity_penalty",
        "constraints",
        "force_words_ids",
        "compile_config",
        "cache_implementation",
        "cache_config",
        "assistant_lora",
        "prompt_lookup_num_tokens",
        "watermarking_config",
    )
)
_TABLE = re.compile(r"tokenizer(\.[\w.-]+)?\.json")


def clean_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` without the keys, on any level, that name code, a kernel, a repository or a path; others stay."""
    return {
        key: _clean(value)
        for key, value in raw.items()
        if not _names_code(key) and (key != "tokenizer_class" or _is_stock_tokenizer(value))
    }


def clean_generation(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``generation_config.json``, cleaned as :func:`clean_config` does."""
    return {
        key: _clean(value)
        for key, value in raw.items()
        if key == "_from_model_config" or not _names_code(key, config=False)
    }


def clean_tokenizer(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``tokenizer_config.json`` or ``special_tokens_map.json``, cleaned as :func:`clean_config` does.

    It also loses vocabulary files, which transformers would open wherever they lie, and a class that transformers does not have.
    """
    kept = {}
    for key, value in raw.items():
        if key == "fast_tokenizer_files":
            usable = isinstance(value, list) and all(isinstance(name, str) and _TABLE.fullmatch(name) for name in value)
        elif key == "tokenizer_class":
            usable = _is_stock_tokenizer(value)
        else:
            usable = not _names_code(key, config=False) and not key.endswith(("_file", "_files", "_path"))
        if usable:
            kept[key] = value  # deeper keys are names of chat templates and tokens
    return kept


def clean_processor(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a processor of images, videos or sounds, cleaned as :func:`clean_config` does.

    The names of its classes stay where transformers has classes of these names.
    """
    kept = {}
    for key, value in raw.items():
        if key in _PROCESSOR_CLASSES:
            usable = _is_stock_processor(value)
        elif key == "tokenizer_class":
            usable = _is_stock_tokenizer(value)
        else:
            usable = not _names_code(key, config=False) and not key.endswith(("_file", "_files", "_path"))
        if usable:
            kept[key] = clean_processor(value) if isinstance(value, Mapping) else value
    return kept


CLEANERS = {
    CONFIG: clean_config,
    GENERATION: clean_generation,
    TOKENIZER: clean_tokenizer,
    SPECIAL: clean_tokenizer,
    **dict.fromkeys(PROCESSORS, clean_processor),
}


def clean_file(path: Path) -> dict[str, Any]:
    """Return the content of one of the settings files (:data:`CLEANERS`), cleaned for transformers or for writing.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    return CLEANERS[path.name](read_json(path))


def _names_code(key: object, config: bool = True) -> bool:
    # A key that is a number (of a label, say) was never in a file; "__float__" is how transformers writes an infinity.
    if not isinstance(key, str) or key == "__float__":
        return False
    return key in _CODE or key.startswith("_") or (config and key in _class_attributes())


@cache
def _class_attributes() -> frozenset[str]:
    """Return the names of methods and settings of transformers' base class, which a key of the same name would replace."""
    from dataclasses import fields

    from transformers import PreTrainedConfig

    own = {field.name for field in fields(PreTrainedConfig)}
    return frozenset(dir(PreTrainedConfig)) - own - _PLAIN_ATTRIBUTES


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return clean_config(value)
    return [_clean(each) for each in value] if isinstance(value, list) else value


def _is_stock_tokenizer(name: Any) -> bool:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str):
        return False
    found = tokenizer_class_from_name(name) or tokenizer_class_from_name(name.removesuffix("Fast"))
    if not isinstance(found, type) or not found.__module__.startswith("transformers."):
        return False
    # A class with _backends stands for a tokenizer whose library is not installed; it says so when it is used.
    return issubclass(found, PreTrainedTokenizerBase) or hasattr(found, "_backends")


def _is_stock_processor(name: Any) -> bool:
    return isinstance(name, str) and name.removesuffix("Fast") in _stock_processors()


@cache
def _stock_processors() -> frozenset[str]:
    """Return the names of all processors of transformers, without the ending of those that come in two kinds."""
    from importlib import import_module

    tables = (
        ("processing", "PROCESSOR"),
        ("image_processing", "IMAGE_PROCESSOR"),
        ("feature_extraction", "FEATURE_EXTRACTOR"),
        ("video_processing", "VIDEO_PROCESSOR"),
    )
    entries = [
        entry
        for module, table in tables
        for entry in getattr(
            import_module(f"transformers.models.auto.{module}_auto"), f"{table}_MAPPING_NAMES"
        ).values()
    ]
    found: set[str] = set()
    for entry in entries:
        several = (
            entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, tuple | list) else [entry]
        )
        found |= {each for each in several if isinstance(each, str)}
    return frozenset(name.removesuffix("Fast") for name in found)
