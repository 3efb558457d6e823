"""Hands files and settings of other people to transformers, which no other module does.

A folder is data from a stranger, and transformers does what its files say: ``auto_map`` names Python files to import,
``attn_implementation`` a repository whose native code is loaded, ``adapter_config.json`` another model, ``tokenizer_config.json``
files anywhere. So transformers never reads the folder itself. It reads a view of it: links to weights and tokenizer files with
known names, and ``config.json``, ``generation_config.json`` and ``tokenizer_config.json`` without the settings that name code, a
kernel, a repository or a path. With ``trust_remote_code=False`` and ``local_files_only=True``, no call asks or downloads anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from upcycle.architectures.stock_auto import auto_class
from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError
from upcycle.files.formats.parsing import parse_json, read_json

if TYPE_CHECKING:
    import torch

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer.*.json",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

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
_GENERATION_CODE = frozenset(
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
_OUT_OF_MEMORY = ("allocate memory", "out of memory")


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


CLEANERS = {CONFIG: clean_config, GENERATION: clean_generation, TOKENIZER: clean_tokenizer, SPECIAL: clean_tokenizer}


def clean_file(path: Path) -> dict[str, Any]:
    """Return the content of one of the settings files (:data:`CLEANERS`), cleaned for transformers or for writing.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    return CLEANERS[path.name](read_json(path))


def build_config(raw: Mapping[str, Any], where: str) -> Any:
    """Return the stock configuration that ``AutoConfig`` makes of a ``config.json``, without a dtype.

    Raises:
        CheckpointError: transformers does not know the model, or refuses a value.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    plain = {key: value for key, value in clean_config(raw).items() if "dtype" not in key}
    model_type = plain.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{where}: config.json: 'model_type' must be a name, got {model_type!r}")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{where}: config.json: 'model_type': transformers has no '{model_type}' model")
    with TemporaryDirectory(prefix="upcycle-") as folder, _explained(f"{where}: transformers cannot read config.json"):
        (Path(folder) / CONFIG).write_text(json.dumps(plain), encoding="utf-8")
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config.name_or_path = ""
    return config


def empty_model(raw: Mapping[str, Any] | Any, where: str, dtype: torch.dtype | None = None) -> Any:
    """Build the stock causal language model (or encoder) of a configuration on the meta device: shapes without memory.

    Args:
        raw: a ``config.json``, or the result of :func:`build_config`.
        where: its name in messages.
        dtype: the dtype of its weights; default: torch's default.

    Raises:
        CheckpointError: transformers does not know such a model, or refuses a value.
    """
    import torch

    config = build_config(raw, where) if isinstance(raw, Mapping) else raw
    given = {} if dtype is None else {"dtype": dtype}
    with _explained(f"{where}: transformers has no model like it"), quiet_transformers(), torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False, **given)


def load_stock_model(folder: Path, dtype: torch.dtype | str = "float32", surplus: bool = False) -> Any:
    """Load the stock causal language model (or encoder) of a folder or ``.gguf`` file on the CPU, as Auto classes do.

    Args:
        folder: a transformers folder with safetensors weights, or a ``.gguf`` file.
        dtype: the dtype of all weights; ``auto``: as stored.
        surplus: whether the files may hold weights that the model does not have, as transformers permits.

    Raises:
        CheckpointError: transformers cannot load it, or a weight is missing, unexpected or of another shape.
        EnvironmentFault: it does not fit in memory.
    """
    from transformers import AutoConfig

    named: dict[str, Any] = {"gguf_file": folder.name} if folder.is_file() else {"use_safetensors": True}
    with view(folder, weights=True) as clean, quiet_transformers(), _explained(f"transformers cannot load {folder}"):
        if folder.is_file():
            named["config"] = _gguf_config(clean, folder)
        config = named.get("config") or AutoConfig.from_pretrained(
            clean, trust_remote_code=False, local_files_only=True
        )
        loaded: Any = auto_class(config).from_pretrained(
            clean, dtype=dtype, output_loading_info=True, trust_remote_code=False, local_files_only=True, **named
        )
    model, report = loaded
    report = {kind: keys for kind, keys in report.items() if keys and not (surplus and kind == "unexpected_keys")}
    if problems := {kind: sorted(map(str, keys))[:3] for kind, keys in report.items()}:
        raise CheckpointError(f"transformers does not load {folder} cleanly: {problems}")
    model.config.name_or_path = model.name_or_path = ""
    return model


def _gguf_config(clean: Path, path: Path) -> Any:
    """Return the configuration that transformers reads of a ``.gguf`` file, with what it does not read: biases, vocabulary size."""
    from transformers import AutoConfig

    from upcycle.files.formats.gguf_file import GgufFile

    ours = GgufFile(path).config
    config: Any = AutoConfig.from_pretrained(clean, gguf_file=path.name, trust_remote_code=False, local_files_only=True)
    config.vocab_size, config.attention_bias = ours["vocab_size"], ours["attention_bias"]
    return config


def load_tokenizer(path: Path) -> Any:
    """Load the stock tokenizer of a folder or of a ``.gguf`` file.

    Raises:
        CheckpointError: a settings file is not a JSON object.
        EnvironmentFault: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    named = {"gguf_file": path.name} if path.is_file() else {}
    with view(path, tokenizer=True) as clean, quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(clean, trust_remote_code=False, local_files_only=True, **named)
        except (MemoryError, UpcycleError):
            raise
        except Exception as error:  # damaged files raise errors of many kinds
            raise EnvironmentFault(
                f"the tokenizer in {path} cannot be loaded: {_first_line(error)}", hint=_tokenizer_hint(path)
            ) from None
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)
    return tokenizer


@contextmanager
def view(path: Path, weights: bool = False, tokenizer: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that shows transformers the known files of another folder and nothing else.

    Args:
        path: a transformers folder, or a ``.gguf`` file.
        weights: whether to link the weights.
        tokenizer: whether to link the tokenizer's files.

    Raises:
        CheckpointError: a settings file is not a JSON object.
        EnvironmentFault: the system's folder for temporary files cannot be written.
    """
    patterns = (WEIGHT_FILES if weights else ()) + (TOKENIZER_FILES if tokenizer else ())
    settings = {CONFIG: True, GENERATION: weights, TOKENIZER: tokenizer, SPECIAL: tokenizer}
    with _temporary_folder() as folder:
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
            yield folder
            return
        for pattern in patterns:
            for file in sorted(path.glob(pattern)):
                place = folder / file.relative_to(path)
                place.parent.mkdir(exist_ok=True)
                place.symlink_to(file.resolve())
        for name in (name for name, wanted in settings.items() if wanted and (path / name).is_file()):
            content = clean_file(path / name)
            if name == GENERATION:
                content = {key: value for key, value in content.items() if key not in _GENERATION_CODE}
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        yield folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal inside the ``with`` block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        made = TemporaryDirectory(prefix="upcycle-")
    except OSError as error:
        raise EnvironmentFault(
            f"no temporary folder can be made: {error.strerror}", hint="set TMPDIR to a folder that can be written"
        ) from None
    with made as folder:
        yield Path(folder)


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


def _tokenizer_hint(path: Path) -> str:
    settings = path / TOKENIZER
    named = parse_json(settings.read_bytes(), str(settings)) if settings.is_file() else {}
    if isinstance(named, dict) and "auto_map" in named:
        return "it is a tokenizer of its own code, which is never run: add a whole tokenizer.json, or take one with it"
    return "pip install sentencepiece tiktoken, or add tokenizer.json"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn every error that transformers raises in the ``with`` block into an error of the checkpoint or of the machine.

    Raises:
        CheckpointError: transformers raised any error other than a lack of memory.
        EnvironmentFault: there is not enough memory.
    """
    try:
        yield
    except (UpcycleError, MemoryError):
        raise
    except Exception as error:  # the stock classes raise errors of many kinds
        if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise EnvironmentFault(
                f"{what}: it does not fit in memory", hint="use a machine with more memory"
            ) from None
        raise CheckpointError(f"{what}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
